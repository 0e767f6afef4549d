"""Generate diverse candidate summaries of the documents of a CSV, for all three splits.

    python3 gen_candidate.py --generator_name models/t5_covid --dataset_name clean_covid.csv --num_cands 16
    torchrun --nproc_per_node=2 gen_candidate.py ...    # shares the documents out; the files are the same

Writes {output_dir}/{generator}_{num_cands}/{split}.source, .target and .out, and the same three with .tokenized (Penn
Treebank tokens): one sample a line, the candidates of a document on neighbouring lines, best first. Killed and started
again with the same arguments, it goes on where it stopped and ends with the same files.

Candidates come from diverse beam search with as many groups as candidates, as in SimCLS (Liu and Liu 2021).
"""

import argparse
import contextlib
import functools
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import arguments, endings, torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import numpy as np
import torch
import transformers
from candidate_files import CandidateFiles
from diverse_beam import DiverseBeamSearch
from documents import find_dataset, read_documents, safe_name, split_documents, take_percent
from pretrained import check_length, half_precision_dtype, load
from tqdm import tqdm

from harness.distributed import world as join_world
from harness.endings import UserError
from harness.files import output_lock
from harness.precision import choose_precision, half_precision_type

# For a generator whose tokenizer or generation config names no length.
SOURCE_LENGTH, SUMMARY_LENGTH = 512, 64
CANDIDATES = 16
TOKENIZED_TOGETHER = 1000
half_precision_or_auto = functools.partial(half_precision_type, unnamed="auto")
SECONDS_BETWEEN_LINES = 20


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator_name", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--dataset_name", default="sample", help="CSV file or data set name (default: %(default)s)")
    parser.add_argument("--doc_col_name", default="abstract", help="column of the documents (default: %(default)s)")
    parser.add_argument("--sum_col_name", default="title", help="column of the summaries (default: %(default)s)")
    parser.add_argument(
        "--dataset_percent", type=arguments.positive_float, default=100, help="share of each split (default: 100)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("candidates"), help="parent of the new folder (default: %(default)s)"
    )
    parser.add_argument("--half_precision", type=half_precision_or_auto, nargs="?", const="auto",
        metavar="float16|bfloat16", help="float16 when no type is named; on a CPU, and for the T5 family, which "
        "overflows in float16, bfloat16")  # fmt: skip
    add_search_arguments(parser)
    return parser


def add_search_arguments(parser):
    """The arguments of the search, in a group of their own; `search_settings` reads them."""
    integer, number = arguments.positive_int, arguments.non_negative_float
    search = parser.add_argument_group("search for candidates; defaults marked * are those of the generation config")
    search.add_argument(
        "--num_cands", type=integer, default=CANDIDATES, help=f"candidates a document (default: {CANDIDATES})"
    )
    search.add_argument("--num_groups", type=integer, help="groups of beams (default: one a candidate)")
    search.add_argument("--diversity_penalty", type=number, default=1.0, help="default: %(default)s")
    search.add_argument("--length_penalty", type=float, help="exponent of the length that scores are divided by *")
    search.add_argument("--min_length", type=arguments.non_negative_int, help="tokens before the end *")
    search.add_argument("--no_repeat_ngram_size", type=arguments.non_negative_int, help="0 allows repetition *")
    search.add_argument("--decoder_max_len", type=integer, help=f"most tokens of a candidate (* or {SUMMARY_LENGTH})")
    search.add_argument(
        "--max_source_length", type=integer, help="tokens of a document, cut there (default: the tokenizer's)"
    )
    search.add_argument("--cand_gen_batch", type=integer, default=16, help="documents a batch (default: %(default)s)")


def main():
    args = get_args_parser().parse_args()
    check_groups(args)
    documents = read_documents(find_dataset(args.dataset_name), args.doc_col_name, args.sum_col_name)
    splits = {split: take_percent(part, args.dataset_percent) for split, part in split_documents(documents).items()}
    with join_world() as world:
        precision = choose_precision(args.half_precision, world.device, say=world.say)
        with world.first_on_machine():
            model, tokenizer = load_generator(args.generator_name, generator_dtype(args.half_precision, precision))
        generator = CandidateGenerator(
            model.to(world.device),
            tokenizer,
            search_settings(args, model.generation_config),
            args.max_source_length,
        )
        folder = args.output_dir / f"{safe_name(args.generator_name)}_{args.num_cands}"
        lock = output_lock(folder.with_name(folder.name + ".lock")) if world.is_main else contextlib.nullcontext()
        with lock:
            folder.mkdir(exist_ok=True, parents=True)
            world.barrier()
            for split, part in splits.items():
                generate_split(generator, folder, split, part, args.cand_gen_batch, world)
        world.say(f"written: {folder}")


def check_groups(args):
    """UserError unless --num_groups, where it is given, divides --num_cands."""
    if args.num_groups and args.num_cands % args.num_groups:
        raise UserError(f"--num_groups {args.num_groups} does not divide --num_cands {args.num_cands}")


def search_settings(args, config):
    """The arguments of DiverseBeamSearch: the user's, else those of the generation config, else neutral ones."""

    def choose(name, neutral):
        for value in (getattr(args, name, None), getattr(config, name, None)):
            if value is not None:
                return value
        return neutral

    # 20 is what transformers fills in where nothing is said.
    own_length = config.max_length if config.max_length not in (None, 20) else SUMMARY_LENGTH
    return {
        "num_beams": args.num_cands,
        "num_groups": args.num_groups or args.num_cands,
        "diversity_penalty": args.diversity_penalty,
        "max_length": args.decoder_max_len or own_length,
        "min_length": choose("min_length", 0),
        "length_penalty": choose("length_penalty", 1.0),
        "no_repeat_ngram_size": choose("no_repeat_ngram_size", 0),
        "early_stopping": choose("early_stopping", False),
    }


def generator_dtype(half_precision, precision):
    """The dtype of the generator's weights as `load_generator` takes it. precision: chosen by `half_precision`."""
    return lambda config: half_precision_dtype(config, half_precision, precision) or torch.float32


def load_generator(name, dtype):
    """(model in eval mode, tokenizer) of a folder or a hub name. Raises UserError when it cannot be loaded.

    dtype: of the weights, or a function from the model's config to it.
    """
    where = "in this folder" if Path(name).is_dir() else "under this name, neither as a folder nor on the hub"
    model, tokenizer = load(
        name,
        transformers.AutoModelForSeq2SeqLM,
        problem=f"--generator_name {name!r}: no sequence-to-sequence model with its tokenizer can be loaded {where}",
        advice="give a folder that finetune_model.py or create_model.py wrote",
        dtype=dtype,
    )
    return model.eval(), tokenizer


class CandidateGenerator:
    """Documents to candidate summaries, by diverse beam search.

    settings: the arguments of DiverseBeamSearch. max_source_length: tokens at which documents are cut, or None for the
    tokenizer's own. Raises UserError for lengths or a generation config that the model cannot do.
    """

    def __init__(self, model, tokenizer, settings, max_source_length=None):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        # A tokenizer without a limit says 1e30.
        own_length = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else SOURCE_LENGTH
        self.max_source_length = max_source_length or min(own_length, positions)
        for argument, length in (
            ("--max_source_length", self.max_source_length),
            ("--decoder_max_len", settings["max_length"]),
        ):
            if length > positions:
                raise UserError(f"{argument} {length} is more than the {positions} positions of this generator")
        check_length("--max_source_length", self.max_source_length, len(tokenizer("")["input_ids"]))
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise UserError(f"the tokenizer has {len(tokenizer)} tokens, more than the generator's embeddings")
        try:
            self.search = DiverseBeamSearch(model, **settings)
        except ValueError as error:
            raise UserError(str(error)) from None

    def tokenize(self, texts):
        """The token ids of documents: a list of int32 arrays."""
        sources = []
        for start in range(0, len(texts), TOKENIZED_TOGETHER):
            some = texts[start : start + TOKENIZED_TOGETHER]
            encoded = self.tokenizer(some, truncation=True, max_length=self.max_source_length)
            # A tokenizer without special tokens may know nothing of a text.
            sources += [np.array(ids or [self.search.pad_token], np.int32) for ids in encoded["input_ids"]]
        return sources

    def generate(self, sources):
        """Candidates of one batch of tokenized documents: for each a list of str, best first."""
        lengths = torch.tensor([len(source) for source in sources]).unsqueeze(1)
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        input_ids = torch.full(mask.shape, self.search.pad_token)
        input_ids[mask.bool()] = torch.from_numpy(np.concatenate(sources)).long()
        tokens, _ = self.search(input_ids.to(self.model.device), mask.to(self.model.device))
        texts = self.tokenizer.batch_decode(
            tokens.flatten(0, 1).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        count = self.settings["num_beams"]
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    @functools.cached_property
    def fingerprint(self):
        """A digest of the weights, the vocabulary and the special tokens."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        tokens = self.model.generation_config.to_dict() | {"transformers_version": None}
        for part in (sorted(self.tokenizer.get_vocab().items()), tokens):
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def length_batches(sources, size):
    """Batches of documents of like length, the longest first: lists of places in `sources`."""
    order = sorted(range(len(sources)), key=lambda place: -len(sources[place]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_split(generator, folder, split, documents, batch_size, world):
    """Bring the candidate files of one split to completion; every process of `world` makes a share of the batches."""
    settings = generator.settings | {
        "generator": generator.fingerprint,
        "documents": hashlib.sha256(json.dumps(documents).encode()).hexdigest(),
        "max_source_length": generator.max_source_length,
    }
    files = CandidateFiles(folder, split, settings, world)
    complete = files.complete()
    if world.is_main and not complete:
        files.prepare()
    world.barrier()
    if complete:
        world.say(f"{split}: the candidates of {len(documents)} documents are there already")
        return
    sources = generator.tokenize([document.text for document in documents])
    finished = files.finished()
    world.barrier()  # All have read what is finished, before any of them adds to it.
    if finished:
        world.say(f"{split}: going on after {len(finished)} of {len(documents)} documents")
    share = unfinished_batches(sources, batch_size, finished)[world.rank :: world.size]
    with files.open() as file, Progress(split, sum(map(len, share)), world) as progress:
        for places in share:
            candidates = generator.generate([sources[place] for place in places])
            files.add(file, places, [documents[place] for place in places], candidates)
            progress.add(len(places))
    world.barrier()
    if world.is_main:
        files.publish(documents)


def unfinished_batches(sources, size, finished):
    """The `length_batches` without the places in the set `finished`: a run that goes on makes the batches that it would
    have made, so that sums are rounded alike, unless the size has changed."""
    batches = [[place for place in batch if place not in finished] for batch in length_batches(sources, size)]
    return [batch for batch in batches if batch]


class Progress:
    """Documents done by the main process and their rate: a bar on a terminal, else a line now and then."""

    def __init__(self, split, total, world):
        self.total, self.done, self.started = total, 0, time.perf_counter()
        self.label = split if world.size == 1 else f"{split}, process 1 of {world.size}"
        self.quiet = not world.is_main
        self.bar = tqdm(total=total, desc=self.label, unit="doc", disable=self.quiet or not sys.stderr.isatty())
        self.next_line = self.started + SECONDS_BETWEEN_LINES

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def add(self, documents):
        self.done += documents
        self.bar.update(documents)
        now = time.perf_counter()
        if not self.quiet and self.bar.disable and (now >= self.next_line or self.done == self.total):
            rate = self.done / (now - self.started)
            print(f"{self.label}: {self.done} of {self.total} documents, {rate:.2f} documents/s", flush=True)
            self.next_line = now + SECONDS_BETWEEN_LINES


if __name__ == "__main__":
    endings.run(main)
