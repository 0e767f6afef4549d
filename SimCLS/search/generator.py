"""The generator: a sequence-to-sequence model, its search settings, and its candidates by one or several searches."""

import argparse
import copy
import functools
import itertools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from utils import progress

from harness import arguments, endings
from harness.endings import UserError
from pretrained.model_folders import DROPOUT_KEYS, NO_LIMIT, check_length, half_precision_dtype, load, most_tokens
from search.ctranslate2_beams import CTranslate2Beams
from search.diverse_beam import DiverseBeamSearch
from search.identity import config_digest, fingerprint
from search.sampling import NucleusSampling
from search.token_rules import check_end, check_settings, check_start, check_target_vocabulary
from texts import provenance
from texts.documents import clean
from texts.samples import as_sample
from texts.sentences import SentenceSplitter

# Defaults for a generator whose tokenizer or generation config has no maximum length.
SOURCE_LENGTH, SUMMARY_LENGTH = 512, 64
CANDIDATES = 16
SEARCHES = ("diverse", "beam", "sample")
ENGINES = {"pytorch": None, "ctranslate2": "float32", "ctranslate2_int8": "int8"}  # Name -> compute type.
TOKENIZED_TOGETHER = 1000
# Arguments of a single kind of search -> (this kind, values that are also allowed with other kinds).
OF_ONE_SEARCH = {
    "num_groups": ("diverse", (None, 1)), "diversity_penalty": ("diverse", (1.0, 0.0)), "top_p": ("sample", (0.9,)),
    "seed": ("sample", (0,)),
}  # fmt: skip


def add_search_arguments(parser):
    """Add the arguments of the search, in their own group; `search_settings` reads them."""
    integer, number = arguments.positive_int, arguments.non_negative_float
    search = parser.add_argument_group("search for candidates; defaults marked * are those of the generation config")
    search.add_argument("--search", type=searches, default="diverse", metavar="diverse|beam|sample", help="diverse or "
        "plain beam search, or nucleus sampling; or several, as in beam+sample: their candidates come in this order, "
        "and a document is encoded once")  # fmt: skip
    search.add_argument("--num_cands", type=integer, default=CANDIDATES, help="candidates per document and search")
    search.add_argument("--num_groups", type=integer, help="groups of beams; by default one per candidate")
    search.add_argument("--diversity_penalty", type=number, default=1.0, help="for tokens of earlier groups")
    search.add_argument("--top_p", type=arguments.positive_share, default=0.9,
        help="for --search sample: total probability of the tokens to draw from")  # fmt: skip
    search.add_argument("--seed", type=arguments.seed, default=0, help="seed of --search sample")
    search.add_argument(
        "--length_penalty", type=arguments.exponent, help="exponent of the length by which scores are divided *"
    )
    search.add_argument("--min_length", type=arguments.non_negative_int, help="fewest tokens before the end *")
    search.add_argument("--no_repeat_ngram_size", type=arguments.non_negative_int, help="0 allows repetition *")
    search.add_argument("--decoder_max_len", type=integer, help=f"most tokens of a candidate (* or {SUMMARY_LENGTH})")
    search.add_argument(
        "--max_source_length", type=integer, help="most tokens of a document; by default the tokenizer's"
    )
    search.add_argument("--engine", choices=ENGINES, default="pytorch", help="for --search beam: ours, or the "
        "optional package CTranslate2, faster on a CPU, in float32 or in int8")  # fmt: skip
    search.add_argument("--cand_gen_batch", type=integer, default=16, help="documents per batch")


def searches(text):
    """argparse type: names of SEARCHES, each once, joined by "+"."""
    names = text.split("+")
    if not set(names) <= set(SEARCHES) or len(names) > len(set(names)):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SEARCHES)}, or several joined by +")
    return text


def candidates_a_document(args):
    """The number of candidates per document, over all searches of --search."""
    return args.num_cands * len(args.search.split("+"))


def check_search(args):
    """UserError unless --num_groups, if given, divides --num_cands, --engine supports the search and precision, and
    --search has the kinds of search whose arguments are given."""
    for name, (search, silent) in OF_ONE_SEARCH.items():
        if search not in args.search.split("+") and getattr(args, name) not in silent:
            raise UserError(f"--{name} goes with --search {search}, not {args.search}; leave it out")
    if ENGINES[args.engine] and args.search != "beam":
        raise UserError(f"--engine {args.engine} supports only --search beam; add that, or leave --engine out")
    if ENGINES[args.engine] and args.half_precision:
        raise UserError(f"--engine {args.engine} computes in {ENGINES[args.engine]}; leave --half_precision out")
    if args.num_groups and args.num_cands % args.num_groups:
        raise UserError(f"--num_groups {args.num_groups} does not divide --num_cands {args.num_cands}")


def search_settings(args, config, search="diverse"):
    """The arguments of DiverseBeamSearch or NucleusSampling: the user's, else the generation config's, else neutral
    ones. For several searches {"searches": a list of such arguments, "max_length"}.

    search: "diverse"; "beam" for one group, whatever the arguments say; "sample"; or several, joined by "+". UserError
    if the minimum length exceeds the maximum.
    """
    if "+" in search:
        each = [search_settings(args, config, name) for name in search.split("+")]
        return {"searches": each, "max_length": each[0]["max_length"]}

    def choose(name, neutral):
        for value in (getattr(args, name, None), getattr(config, name, None)):
            if value is not None:
                return value
        return neutral

    both = {
        "max_length": args.decoder_max_len or own_length(config),
        "min_length": choose("min_length", 0),
        "no_repeat_ngram_size": choose("no_repeat_ngram_size", 0),
    }
    check_least(both["min_length"], both["max_length"], "--min_length, --decoder_max_len")
    if search == "sample":
        return {"num_samples": args.num_cands, "top_p": args.top_p, "seed": args.seed, **both}
    groups = 1 if search == "beam" else args.num_groups or args.num_cands
    engine = ENGINES[getattr(args, "engine", "pytorch")]
    if engine:
        both |= {"engine": f"ctranslate2, {engine}", "early_stopping": True}
    return {
        "num_beams": args.num_cands,
        "num_groups": groups,
        "diversity_penalty": args.diversity_penalty,
        "length_penalty": choose("length_penalty", 1.0),
        "early_stopping": choose("early_stopping", False),
    } | both


def check_least(least, most, flags):
    """UserError if the minimum length `least` exceeds the maximum `most`. flags: that set them, for the message."""
    if least > most:
        raise UserError(
            f"a min_length of {least} tokens is above the max_length of {most}; set {flags} or the generator's "
            "generation_config.json"
        )


def own_length(config):
    """The generation config's maximum tokens of a summary, including the start token; SUMMARY_LENGTH if it has none."""
    if config.max_new_tokens is not None:  # Takes precedence over max_length, as in transformers.
        own = config.max_new_tokens + 1
    else:
        unset = transformers.GenerationConfig().max_length  # None, but 20 in older versions.
        own = None if config.max_length == unset else config.max_length
    return SUMMARY_LENGTH if own is None or own >= NO_LIMIT else own


def own_source_length(model, tokenizer):
    """The tokenizer's maximum tokens of a document, or else SOURCE_LENGTH; at most the encoder's positions."""
    own = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else SOURCE_LENGTH
    return min(own, most_tokens(model.get_encoder()))


def generator_dtype(half_precision, precision):
    """The dtype of the generator's weights, for `load_generator`. precision: chosen by `half_precision`."""
    return lambda config: half_precision_dtype(config, half_precision, precision) or torch.float32


def load_generator(name, dtype=torch.float32, dropout=None):
    """(model in eval mode, tokenizer) from a folder or a name on the hub; UserError if it cannot be loaded or used.

    dtype: of the weights, or a function from the model's config to it. dropout: its probability in training, by default
    the model's own.
    """
    where = "this folder" if Path(name).is_dir() else "this name, as a folder or on the hub"
    model, tokenizer = load(
        name,
        transformers.AutoModelForSeq2SeqLM,
        problem=f"--generator_name {name!r}: cannot load a sequence-to-sequence model and its tokenizer from {where}",
        advice="give a folder written by finetune_model.py or create_model.py, or demo/",
        dtype=dtype,
        **({} if dropout is None else dict.fromkeys(DROPOUT_KEYS, dropout)),
    )
    try:
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer has no pad token; set pad_token in tokenizer_config.json")
        check_settings(model.generation_config)
        check_start(model, tokenizer)
        check_end(model, tokenizer)
        check_target_vocabulary(model, tokenizer)
    except ValueError as error:
        raise UserError(f"--generator_name {name!r}: {error}") from None
    # Which would only change the form of what the library's own search returns.
    model.generation_config.return_dict_in_generate = False
    if getattr(model.config, "attention_type", None) == "block_sparse":
        # The library leaves BigBird's sparse attention for good at the first short batch, so candidates would depend on
        # what came before.
        model.get_encoder().set_attention_type("original_full")
    return model.eval(), tokenizer


def candidate_generator(args, world, precision):
    """The CandidateGenerator of --generator_name, on the device of `world`, with the search of the arguments."""
    model, tokenizer = load_generator(args.generator_name, generator_dtype(args.half_precision, precision))
    settings = search_settings(args, model.generation_config, args.search)
    return CandidateGenerator(model.to(world.device), tokenizer, settings, args.max_source_length)


class Candidate(NamedTuple):
    """A summary, the sum of its tokens' log-probabilities by the generator alone, and their number."""

    text: str
    log_prob: float
    tokens: int


def check_generation(name, model, tokenizer, beams):
    """UserError if the generation config of the generator `name` cannot be saved, or used with this many `beams`.
    Otherwise training would fail only after an epoch."""
    config = copy.deepcopy(model.generation_config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
        model.generation_config.num_return_sequences = None
        encoded = tokenizer(["a"], return_tensors="pt")
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        model.generate(**inputs, num_beams=beams, max_length=4, min_length=0, min_new_tokens=None)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OSError, ImportError) as error:
        if endings.explain(error):  # Out of memory, full disk: not the config's fault.
            raise
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
        reason = lines[1] if lines and lines[0].startswith("GenerationConfig is invalid") else "".join(lines[:1])
        raise UserError(
            f"--generator_name {name!r}: validation cannot generate with its generation config, or cannot save it "
            f"({reason}); correct its generation_config.json"
        ) from None
    model.generation_config = config


class CandidateGenerator:
    """Generates candidate summaries of documents, by one or several searches.

    settings: as from `search_settings`. max_source_length: tokens at which documents are cut, or None for the
    tokenizer's own. Raises UserError for lengths or a generation config that are not supported.
    """

    def __init__(self, model, tokenizer, settings, max_source_length=None):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.max_source_length = max_source_length or own_source_length(model, tokenizer)
        special = len(tokenizer("")["input_ids"])
        length = "--max_source_length" if max_source_length else "its tokenizer's model_max_length"
        check_length(length, self.max_source_length, special, most_tokens(model.get_encoder()))
        check_length("--decoder_max_len", settings["max_length"], 1, most_tokens(model.get_decoder()))
        try:
            self.searches = make_searches(model, settings.get("searches", [settings]))
        except ValueError as error:
            where = f" ({model.name_or_path}/generation_config.json)" if "generation config" in str(error) else ""
            raise UserError(f"{error}{where}") from None
        self.pad_token = self.searches[0].pad_token

    def tokenize(self, texts):
        """The token ids of documents: a list of int32 arrays."""
        sources = []
        for start in range(0, len(texts), TOKENIZED_TOGETHER):
            some = texts[start : start + TOKENIZED_TOGETHER]
            encoded = self.tokenizer(some, truncation=True, max_length=self.max_source_length)
            # A tokenizer without special tokens may return no token for a text.
            sources += [np.array(ids or [self.pad_token], np.int32) for ids in encoded["input_ids"]]
        return sources

    def generate(self, sources):
        """The candidates of one batch of tokenized documents: a list of Candidate each, best first for each search."""
        lengths = torch.tensor([len(source) for source in sources]).unsqueeze(1)
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        input_ids = torch.full(mask.shape, self.pad_token)
        input_ids[mask.bool()] = torch.from_numpy(np.concatenate(sources)).long()
        documents = input_ids.to(self.model.device), mask.to(self.model.device)
        encoded = self.searches[0].encode(*documents)
        parts = [self.read(search(*documents, encoded)) for search in self.searches]
        return [list(itertools.chain(*some)) for some in zip(*parts, strict=True)]

    def candidates(self, texts, batch_size, label=None):
        """The candidates of documents, as from `generate`, in the documents' order. label: of the progress, or None."""
        sources, found = self.tokenize(texts), [None] * len(texts)
        batches = length_batches(sources, batch_size)
        for places in progress(batches, len(batches), label) if label else batches:
            for place, some in zip(places, self.generate([sources[place] for place in places]), strict=True):
                found[place] = some
        return found

    def read(self, found):
        """A list of Candidate per document. found: the Candidates of a search. UserError for log-probabilities that are
        not finite."""
        texts = self.tokenizer.batch_decode(
            found.tokens.flatten(0, 1).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if not found.log_probs.isfinite().all():
            raise UserError(
                f"the generator {self.model.name_or_path} gives candidates a log-probability that is not finite; "
                "correct its config.json, use bfloat16 instead of float16, or train it with a smaller --lr"
            )
        likelihoods = found.log_probs.flatten().tolist(), found.lengths.flatten().tolist()
        # Rounded as in the candidate files.
        every = [
            Candidate(clean(text), round(log_prob, 6), tokens)
            for text, log_prob, tokens in zip(texts, *likelihoods, strict=True)
        ]
        count = found.tokens.shape[1]
        return [every[start : start + count] for start in range(0, len(every), count)]

    def how(self):
        """How this generator makes candidates, the part of their provenance that does not depend on the text."""
        return {
            "generator": self.fingerprint,
            "config": self.config_digest,
            "search": self.settings,
            "max_source_length": self.max_source_length,
        }

    def origin(self, name, path, documents):
        """The provenance of this generator's candidates. name: of the generator. path: of the text. documents: all of
        the text, also those without candidates."""
        return provenance.describe(
            generator_name=Path(name).resolve().name if Path(name).is_dir() else name,
            **self.how(),
            text_name=Path(path).name,
            text=provenance.digest(documents),
        )

    @functools.cached_property
    def fingerprint(self):
        return fingerprint(self.model, self.tokenizer)

    @property
    def config_digest(self):
        return config_digest(self.model)


def is_of(model, tokenizer, made):
    """Whether samples with the provenance `made` have candidates from this generator, whatever its precision was then;
    True if unknown."""
    candidates = (made or {}).get("candidates") or {}
    origin, ours = candidates.get("generator"), config_digest(model)
    if candidates.get("config", ours) != ours:
        return False
    types = (torch.float32, torch.bfloat16, torch.float16)
    return origin is None or any(fingerprint(model, tokenizer, dtype) == origin for dtype in types)


def make_searches(model, settings):
    """A search for each of a list of search settings; they share one decoder."""
    if "engine" in settings[0]:
        known = "num_beams", "max_length", "min_length", "length_penalty", "no_repeat_ngram_size"
        of_engine = {name: settings[0][name] for name in known}
        return [CTranslate2Beams(model, **of_engine, compute_type=settings[0]["engine"].split()[-1])]
    made, decoder = [], None
    for each in settings:
        made.append((NucleusSampling if "top_p" in each else DiverseBeamSearch)(model, **each, decoder=decoder))
        decoder = made[0].decoder
    return made


def begins_with_beam_search(settings):
    """Whether the first candidate by these `search_settings` is that of plain beam search."""
    return settings.get("searches", [settings])[0].get("num_groups") == 1


def length_batches(sources, size):
    """Batches of documents of similar length, longest first: lists of indices into `sources`."""
    order = sorted(range(len(sources)), key=lambda place: -len(sources[place]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_samples(generator, documents, batch_size, rouge_tokens="standard", split=None):
    """The samples of `documents`, a list, with candidates from a CandidateGenerator.

    split: text -> list of sentences; by default that of a SentenceSplitter which learns from these documents.
    """
    texts = [document.text for document in documents]
    candidates = generator.candidates(texts, batch_size, "batches of candidates")
    split = split or SentenceSplitter(document.text for document in documents).split
    return [
        as_sample(
            *document,
            [candidate.text for candidate in some],
            split,
            rouge_tokens,
            [[candidate.log_prob, candidate.tokens] for candidate in some],
        )
        for document, some in zip(documents, candidates, strict=True)
    ]
