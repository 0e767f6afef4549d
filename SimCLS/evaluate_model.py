#!/usr/bin/env python3
"""Stage 5 of 5: evaluate a scorer's choice among candidate summaries against the generator's first, on test documents.

    python3 evaluate_model.py --generator_name models/t5_covid --dataset_name clean_covid.csv --scorer_path cache/run/scorer.bin
    python3 evaluate_model.py --samples samples/test --scorer_path cache/run/scorer.bin
    python3 evaluate_model.py --summaries chosen.txt --references test.target --sources test.source

The last form scores files with one summary per line. ROUGE-1, -2 and -Lsum are mean F-measures, with stemming, of
tokenized, lower-cased text, as in the samples of preprocess.py. ROUGE-Lsum depends on the sentences. They are split by
NLTK's English data if installed, else by what Punkt learns from the test documents, as in preprocess.py. With
--summaries, Punkt learns from --sources; without these, a short list of abbreviations is used. The score of the random
candidate is the mean over a document's candidates; the worst and the best are those by the mean of the three ROUGE.

Intervals contain 95 % of the means of 10,000 bootstrap samples of the documents (percentile method). The p-value is
from a paired permutation test with 10,000 random swaps of the two systems' scores within documents: the share of them,
counting the actual assignment too, whose means differ at least as much (two-sided).
"""  # noqa: E501 (commands)

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import numpy as np
from data_utils import ROUGE
from model import read_description
from utils import read_lines

from harness import arguments, devices, distributed, endings
from harness.arguments import positive_int
from harness.endings import UserError
from harness.files import RECORD_FORMAT, output_lock, places, portable, write_record
from harness.job import refuse_job
from harness.machine import describe_machine
from harness.precision import add_half_precision, choose_precision
from scorer.choices import (
    add_judge_arguments,
    by_rules,
    by_scorer,
    check_scorer_path,
    load_judge,
    score_candidates,
    usable_weights,
    with_agreement,
    words,
)
from scorer.combination import fitted_to
from scorer.evaluation_record import EXPERIMENT, digest_of_input, digest_of_models, refuse_to_replace
from scorer.significance import ALONE, FREE, P_VALUES, summarise
from search.generator import (
    CANDIDATES,
    OF_ONE_SEARCH,
    CandidateGenerator,
    add_search_arguments,
    begins_with_beam_search,
    check_search,
    generate_samples,
    generator_dtype,
    load_generator,
    search_settings,
)
from texts import provenance
from texts.documents import add_dataset_arguments, clean, read_splits
from texts.rouge_scores import add_rouge_argument, check_references, mean_score, score, signature
from texts.samples import as_document, as_sample, provenance_of, read_sample, sample_files
from texts.sentences import SentenceSplitter

SHOWN = 3
# Settings of a search -> the arguments that set them.
ASKED = {
    "length_penalty": "length_penalty", "min_length": "min_length", "no_repeat_ngram_size": "no_repeat_ngram_size",
    "max_source_length": "max_source_length", "max_length": "decoder_max_len",
}  # fmt: skip
# Arguments without effect: the first with --samples; the second with --samples, unless --generator_name is given too;
# all three with --summaries.
OF_DOCUMENTS = ("dataset_name", "doc_col_name", "sum_col_name", "dataset_percent", "search", *OF_ONE_SEARCH)
OF_GENERATOR = (*ASKED.values(), "engine")
OF_CANDIDATES = ("scorer_path", "half_precision", "num_cands")
ORDER = (*FREE, "worst", "best", ALONE, "SimCLS")
# Arguments that do not affect the figures.
NEUTRAL = ("output", "batch_size", "cand_gen_batch", "device", "threads")


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    add = parser.add_argument
    add_judge_arguments(parser)
    add_half_precision(parser, "generate and score in float16 when no type is named; on a CPU, and for a generator of "
                       "the T5 family, bfloat16", unnamed="auto")  # fmt: skip
    devices.add_arguments(parser)
    add("--batch_size", type=positive_int, default=16, help="documents scored per batch")
    add("--output", type=Path,
        help="JSON record; by default evaluation.json in the folder of the scorer, or of --summaries")  # fmt: skip
    data = parser.add_argument_group("candidates of a generator")
    add = data.add_argument
    add("--generator_name", help="folder, or name on the hub")
    add_dataset_arguments(data, percent="share of the test split")
    add_rouge_argument(parser)
    add_search_arguments(parser)
    parser.set_defaults(num_cands=None)  # With --samples, a given number must be theirs.
    files = parser.add_argument_group("instead: prepared samples, or summaries")
    files.add_argument("--samples", type=Path, help="folder of test samples made by preprocess.py")
    files.add_argument("--summaries", type=Path, help="text file, one summary per line")
    files.add_argument("--references", type=Path, help="text file, one reference per line")
    files.add_argument("--sources", type=Path, help="text file of the documents, from which Punkt learns (optional)")
    return parser


def main():
    parser = get_args_parser()
    args = parser.parse_args()
    refuse_job()
    check_arguments(args, arguments.given(parser, args))
    beside = args.summaries or args.scorer_path
    output = args.output or beside.with_name("evaluation.json")
    settings = {name: value for name, value in vars(args).items() if name not in NEUTRAL}
    # The lock: a second evaluation would replace what this one writes, or the other way round.
    with distributed.world(devices.choose(args)) as world, output_lock(output.with_name(output.name + ".lock"), output):
        judge = None if args.summaries else load_judge(args, world)
        used = {"places": places(settings), "input_digest": digest_of_input(args)}
        if judge:
            used |= {"precision": judge.precision.label, "scorer_digest": provenance.digest_files([args.scorer_path])}
            used["models_digest"] = digest_of_models(args, judge.description["encoder"])
        refuse_to_replace(output, portable(settings), used)
        judged = judge_candidates(args, world, judge) if judge else judge_files(args)
        result = summarise(judged.systems) | judged.facts
        print_table(result)
        record = {"format": RECORD_FORMAT, "experiment": EXPERIMENT, "arguments": vars(args)} | used
        write_record(output, record | {"machine": describe_machine(world.device)} | result)


def check_arguments(args, given):
    """UserError unless there is exactly one source of summaries, with everything that it needs and nothing else.

    given: the names of the arguments that do not have their default values.
    """
    sources = [name for name in ("samples", "generator_name", "summaries") if getattr(args, name)]
    if len(sources) != 1 and sources != ["samples", "generator_name"]:
        raise UserError("give --generator_name, --samples, or --summaries with --references")
    if bool(args.summaries) != bool(args.references):
        raise UserError("--summaries and --references go together")
    if args.sources and not args.summaries:
        raise UserError("--sources goes only with --summaries; leave it out")
    if sources != ["generator_name"]:
        unused = OF_DOCUMENTS + OF_GENERATOR * (not args.generator_name) + OF_CANDIDATES * bool(args.summaries)
        for name in given:
            if name in unused:
                raise UserError(f"--{name} does not go with --{sources[0]}; leave it out")
    if args.generator_name and not args.samples:
        args.num_cands = args.num_cands or CANDIDATES
        check_search(args)
    if not args.summaries and not args.scorer_path:
        raise UserError(f"--{sources[0]} needs --scorer_path, a scorer that main.py trained")
    check_scorer_path(args)


# --------------------------------------------------------------------------------------------------- the figures


class Judged(NamedTuple):
    """systems: name -> ROUGE-1, -2 and -Lsum of each document, float64 [documents, 3]. facts: further values for the
    record, besides the summary of `systems`."""

    systems: dict
    facts: dict


def judge_files(args):
    """The Judged of the lines of --summaries."""
    texts, targets = (list(map(clean, read_lines(path))) for path in (args.summaries, args.references))
    if len(texts) != len(targets) or not texts:
        raise UserError(
            f"{args.summaries} has {len(texts)} lines, {args.references} {len(targets)}; both need the same, at least 1"
        )
    check_references(targets, args.rouge_tokens, args.references)
    splitter = SentenceSplitter(read_lines(args.sources) if args.sources else None)
    pairs = zip(targets, texts, strict=True)
    rouge = [as_sample("", target, [text], splitter.split, args.rouge_tokens)["rouge"][0] for target, text in pairs]
    mean_words = float(np.mean([len(text.split()) for text in texts]))
    facts = {"words": {"summaries": mean_words}, "rouge": signature(args.rouge_tokens, splitter.kind)}
    return Judged({"summaries": np.array(rouge)}, facts)


def judge_candidates(args, world, judge):
    """The Judged of all ways to choose among the candidates of --samples or --generator_name; prints some examples."""
    # The generator's precision; the scorer's may differ, since "auto" depends on the model family.
    precision = choose_precision(args.half_precision, world.device, say=lambda line: None)
    candidates = load_candidates(args, world, precision)
    samples = with_agreement(candidates.samples, args.rouge_tokens)
    compare_counts(samples, args.num_cands if args.samples else None, judge.description.get("candidates"))
    trained = read_description(args.scorer_path) or {}
    made = provenance_of(args.samples) if args.samples else {"split": "test", "candidates": candidates.origin}
    warnings = provenance.check_belonging(made, trained, args.rouge_tokens)
    if args.generator_name and not candidates.origin:
        warnings.append("the samples' generator is unknown; the plain beam may be from another generator or search")
    weights = usable_weights(fitted_to(args.scorer_path, warnings), samples, warnings)
    for line in warnings:
        world.say(f"warning: {line}")
    scores = score_candidates(judge.scorer, judge.encoding, samples, args.batch_size, world.device, judge.precision)
    chosen = by_rules(samples)
    if weights:
        chosen[ALONE] = by_scorer(scores, samples)
    chosen["SimCLS"] = by_scorer(scores, samples, weights)
    systems, mean_words = compare(samples, chosen, candidates.plain)
    show_documents(samples, chosen["SimCLS"])
    facts = {"words": mean_words, "rouge": signature(args.rouge_tokens, candidates.splitter), "warnings": warnings}
    facts |= {"training": trained.get("training")}  # So that the report averages over seeds, and nothing else.
    return Judged(systems, facts | {"weights": weights, "provenance": candidates.origin})


class JudgedCandidates(NamedTuple):
    samples: list  # Dicts as from `read_sample`, with "rouge".
    plain: list | None  # Samples whose first candidates come from the generator's plain beam search.
    origin: dict | None  # The provenance of the candidates.
    splitter: str  # The sentence splitter, in words.


def load_candidates(args, world, precision):
    """The JudgedCandidates of --samples, or those generated for the test documents, in the documents' order."""
    if args.samples:
        found = read_samples(args)
        if found.plain or not args.generator_name:
            return found
        documents = [as_document(sample) for sample in found.samples]
        args = argparse.Namespace(**vars(args) | {"num_cands": len(found.samples[0]["candidates"])})
        generator = load_search(args, world, precision, "beam", found.origin)
        return found._replace(plain=generate_samples(generator, documents, args.cand_gen_batch, args.rouge_tokens))
    path, every, splits = read_splits(args)
    documents = splits["test"]
    check_references((document.summary for document in documents), args.rouge_tokens, args.dataset_name)
    generator = load_search(args, world, precision, args.search)
    splitter = SentenceSplitter(document.text for document in documents)
    how = args.cand_gen_batch, args.rouge_tokens, splitter.split
    samples = plain = generate_samples(generator, documents, *how)
    if not begins_with_beam_search(generator.settings):
        beam = load_search(args, world, precision, "beam")
        plain = generate_samples(beam, documents, *how)
    return JudgedCandidates(samples, plain, generator.origin(args.generator_name, path, every), splitter.kind)


def load_search(args, world, precision, search, origin=None):
    """The CandidateGenerator of --generator_name with a `search` of this kind.

    origin: the provenance of candidates to compare with, or None; all other settings of the search are taken from it.
    UserError if they were made by another generator.
    """
    model, tokenizer = load_generator(args.generator_name, generator_dtype(args.half_precision, precision))
    settings, source_length = search_settings(args, model.generation_config, search), args.max_source_length
    if origin:
        settings, source_length = as_in_samples(settings, origin, args), origin["max_source_length"]
    generator = CandidateGenerator(model.to(world.device), tokenizer, settings, source_length)
    ours = generator.how()
    if origin and any(origin.get(name, ours[name]) != ours[name] for name in ("generator", "config")):
        raise UserError(
            f"--generator_name {args.generator_name}: the samples were made with {origin['generator_name']}, with "
            "other weights, config.json or precision; give that generator and the same --half_precision"
        )
    return generator


def as_in_samples(settings, origin, args):
    """`settings` with those of the samples' provenance, except num_groups; UserError if an argument contradicts it."""
    searches = origin["search"].get("searches", [origin["search"]])
    of_beams = next((each for each in searches if "num_beams" in each), searches[0])
    theirs = of_beams | {"max_source_length": origin["max_source_length"]}
    for name, argument in ASKED.items():
        asked = getattr(args, argument)
        if asked is not None and asked != theirs.get(name, asked):
            raise UserError(f"--{argument} {asked}: the samples were made with {theirs[name]}; leave it out")
    return settings | {name: theirs[name] for name in settings.keys() & (theirs.keys() - {"num_groups"})}


def read_samples(args):
    """The JudgedCandidates of --samples; prints a line if there cannot be a row for plain beam search."""
    samples = [read_sample(path) for path in sample_files(args.samples)]
    check_references((" ".join(sample["abstract"]) for sample in samples), args.rouge_tokens, args.samples)
    for sample in samples:
        texts = [sentences for sentences, _ in sample["candidates"]]
        sample["rouge"] = score(sample["abstract"], texts, args.rouge_tokens)
    made = provenance.read(args.samples) or {}
    origin = provenance.origin(made)
    is_plain = origin is not None and begins_with_beam_search(origin["search"])
    if not is_plain and not args.generator_name:
        print("no row for plain beam search, which these samples do not contain; add --generator_name to get it")
    return JudgedCandidates(samples, samples if is_plain else None, origin, made.get("sentences", "as in the samples"))


def compare(samples, chosen, plain=None):
    """(name -> ROUGE of each document, float64 [documents, 3]; name -> mean words of a summary), in the table's order.

    chosen: name -> the index of the chosen candidate in each sample. plain: samples whose first candidates come from
    plain beam search, or None.
    """
    rouge = [sample["rouge"] for sample in samples]
    lengths = [np.array([words(text) for text, _ in sample["candidates_untok"]]) for sample in samples]
    means = [mean_score(each) for each in rouge]
    ends = {"worst": [each.argmin() for each in means], "best": [each.argmax() for each in means]}
    picked = {
        name: [[every[place] for every, place in zip(figures, places, strict=True)] for figures in (rouge, lengths)]
        for name, places in {**chosen, **ends}.items()
    }
    picked["random"] = [[every.mean(0) for every in figures] for figures in (rouge, lengths)]
    if plain:
        first = [words(sample["candidates_untok"][0][0]) for sample in plain]
        picked["plain beam"] = [[sample["rouge"][0] for sample in plain], first]
    picked = {name: picked[name] for name in ORDER if name in picked}
    systems = {name: np.array(figures) for name, (figures, _) in picked.items()}
    return systems, {name: float(np.mean(counts)) for name, (_, counts) in picked.items()}


def compare_counts(samples, wanted, trained):
    """UserError unless every document has `wanted` candidates, if given. Prints a line if their number differs between
    documents, or from the scorer's training.

    wanted, trained: candidates per document, or None; `trained` is unknown for the published scorers.
    """
    counts = sorted({len(sample["candidates"]) for sample in samples})
    found = "-".join(map(str, {counts[0]: 0, counts[-1]: 0}))
    if wanted and counts != [wanted]:
        raise UserError(f"the samples have {found} candidates per document, not --num_cands {wanted}; leave it out")
    if len(counts) > 1:
        print(f"the documents have {found} candidates each; are they from one run?")
    if trained and counts[-1] != trained:
        print(f"the scorer was trained on {trained} candidates per document, but chooses among {found} here")


# -------------------------------------------------------------------------------------------------------- printing


def show_documents(samples, choices):
    """Print a few test documents with their reference, first candidate and chosen candidate."""
    for sample, choice in list(zip(samples, choices, strict=True))[:SHOWN]:
        texts = {
            "document": sample["article_untok"],
            "reference": sample["abstract_untok"],
            "first candidate": sample["candidates_untok"][0][0],
            "chosen candidate": sample["candidates_untok"][choice][0],
        }
        for name, sentences in texts.items():
            text = " ".join(sentences)
            print(f"{name + ':':<18}{text if len(text) <= 300 else text[:297] + '...'}")
        print()


def print_table(result):
    print(f"{result['documents']} documents; mean F in percent, 95 % interval; words per summary")
    print(f"{'':<21}" + "".join(f"{metric:>21}" for metric in ROUGE) + f"{'words':>7}")
    for name, metrics in result["systems"].items():
        cells = [
            f"{100 * each['mean']:.2f} ({100 * each['low']:.2f}-{100 * each['high']:.2f})" for each in metrics.values()
        ]
        print(f"{name:<21}" + "".join(f"{cell:>21}" for cell in cells) + f"{result['words'][name]:>7.1f}")
    for whose, key in P_VALUES.items():
        for name, p_values in result.get(key, {}).items():
            strongest = " *" if name == result["strongest"] else ""
            print(f"{'p, ' + name + strongest:<21}" + "".join(f"{p:>21.2g}" for p in p_values.values()))
        if key in result:
            print(f"p: {whose} against that row; * the strongest row that needs no scorer")
    print(result["rouge"])


if __name__ == "__main__":
    endings.run(main)
