#!/usr/bin/env python3
"""Stage 5 of 5: measure what a scorer's choice among candidate summaries buys over a generator's first candidate, on test documents.

    python3 evaluate_model.py --generator_name models/t5_covid --dataset_name clean_covid.csv --scorer_path cache/run/scorer.bin
    python3 evaluate_model.py --samples samples/test --scorer_path cache/run/scorer.bin
    python3 evaluate_model.py --summaries chosen.txt --references test.target --sources test.source

The last scores files, one summary a line. ROUGE-1, -2 and -Lsum are mean F-measures, stemmed, of tokenized, lower-cased
text, as in the samples of preprocess.py. Sentences, which matter to ROUGE-Lsum, are split by NLTK's English data when
it is installed, else by what Punkt learns from the test documents, as preprocess.py does for the test split: with
--summaries from those of --sources, and without it by a short list of abbreviations. The random candidate's is the mean
over a document's candidates; the worst and the best are those by the mean of the three.

Intervals hold 95 % of the means of 10,000 bootstrap samples of the documents (percentiles). The p-value is that of a
paired permutation test: in how many of 10,000 random exchanges of the two systems' figures within documents, this one
included, the means differ at least as much (two-sided).
"""  # noqa: E501 (commands)

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import numpy as np
from data_utils import ROUGE, SampleSet, tokenize_samples
from model import load_scorer, score_samples
from pretrained import half_precision_name
from utils import read_lines

from harness import arguments, devices, distributed, endings
from harness.arguments import positive_float, positive_int
from harness.endings import UserError
from harness.files import write_record
from harness.machine import describe_machine
from harness.precision import choose_precision, half_precision_or_auto
from harness.runs import FORMAT
from search.generator import (
    CANDIDATES,
    CandidateGenerator,
    add_search_arguments,
    check_groups,
    generate_samples,
    generator_dtype,
    load_generator,
    search_settings,
)
from texts.documents import find_dataset, read_documents, split_documents, take_percent
from texts.samples import as_sample, read_sample, rouge_of, sample_files
from texts.scoring import add_rouge_argument, check_references
from texts.sentences import SentenceSplitter

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 500
SEED = 0  # Of the resampling: the same figures give the same intervals.
SHOWN = 3


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scorer_path", type=Path, help="trained scorer, such as cache/run/scorer.bin")
    add("--model_type", help="its encoder, a folder or a hub name (default: that of scorer.json beside the scorer)")
    add("--total_len", type=positive_int, help="tokens of a document that it reads (default: as in its training)")
    add("--max_len", type=positive_int, help="tokens of a summary that it reads (default: as in its training)")
    add("--half_precision", type=half_precision_or_auto, nargs="?", const="auto", metavar="float16|bfloat16",
        help="generate and score in float16 when no type is named; on a CPU, and for a generator of the T5 family, "
             "bfloat16")  # fmt: skip
    devices.add_arguments(parser)
    add("--batch_size", type=positive_int, default=16, help="documents scored together (default: %(default)s)")
    add(
        "--output",
        type=Path,
        help="record, as JSON (default: evaluation.json beside the scorer, or beside --summaries)",
    )
    data = parser.add_argument_group("candidates of a generator")
    add = data.add_argument
    add("--generator_name", help="a folder, or a name on the hub")
    add("--dataset_name", default="sample", help="CSV file or data set name (default: %(default)s)")
    add("--dataset_percent", type=positive_float, default=100, help="share of the test split (default: 100)")
    add("--doc_col_name", default="abstract", help="column of the documents (default: %(default)s)")
    add("--sum_col_name", default="title", help="column of the summaries (default: %(default)s)")
    add_rouge_argument(parser)
    add_search_arguments(parser)
    parser.set_defaults(num_cands=None)  # With --samples a number has to be theirs.
    files = parser.add_argument_group("instead: prepared samples, or summaries")
    files.add_argument("--samples", type=Path, help="folder of test samples, as preprocess.py makes them")
    files.add_argument("--summaries", type=Path, help="text file, one summary a line")
    files.add_argument("--references", type=Path, help="text file, one reference a line")
    files.add_argument("--sources", type=Path, help="text file of the documents, from which Punkt learns (optional)")
    return parser


def main():
    args = get_args_parser().parse_args()
    check_arguments(args)
    with distributed.world(devices.choose(args)) as world:
        if args.summaries:
            systems = {"summaries": score_files(args.summaries, args.references, args.sources, args.rouge_tokens)}
            default_output = args.summaries.with_name("evaluation.json")
        else:
            lengths = {"total_len": args.total_len, "max_len": args.max_len}
            scorer, encoding, description = load_scorer(args.model_type, args.scorer_path, **lengths)
            half_precision = half_precision_name(args.half_precision, description["architecture"])
            precision = choose_precision(half_precision, world.device, true_fp32=True)
            samples = load_test_samples(args, world, precision)
            compare_counts(samples, args.num_cands, description.get("candidates"))
            systems, choices = compare(scorer.to(world.device), encoding, samples, args.batch_size, world, precision)
            show_documents(samples, choices)
            default_output = args.scorer_path.with_name("evaluation.json")
        result = summarise(systems)
        print_table(result)
        record = {"format": FORMAT, "experiment": "simcls_evaluation", "arguments": vars(args)}
        write_record(args.output or default_output, record | {"machine": describe_machine(world.device)} | result)


def check_arguments(args):
    """UserError unless there is exactly one source of summaries, with what it needs."""
    sources = [name for name in ("generator_name", "samples", "summaries") if getattr(args, name)]
    if len(sources) != 1:
        raise UserError("name one of --generator_name, --samples, and --summaries with --references")
    if bool(args.summaries) != bool(args.references):
        raise UserError("--summaries and --references go together")
    if args.sources and not args.summaries:
        raise UserError("--sources goes with --summaries; the other candidates come with their documents")
    if args.generator_name:
        args.num_cands = args.num_cands or CANDIDATES
        check_groups(args)
    if not args.summaries and not args.scorer_path:
        raise UserError(f"--{sources[0]} needs --scorer_path, a scorer that main.py trained")
    if args.scorer_path and not args.scorer_path.is_file():
        raise UserError(f"--scorer_path {args.scorer_path} is no file; main.py writes cache/<run>/scorer.bin")


# --------------------------------------------------------------------------------------------------- the figures


def score_files(summaries, references, sources=None, tokens="standard"):
    """The ROUGE of each line of `summaries` against that of `references`: float64 [lines, 3].

    sources: file of the documents, from which Punkt learns where sentences end.
    """
    texts, targets = list(read_lines(summaries)), list(read_lines(references))
    if len(texts) != len(targets) or not texts:
        raise UserError(f"{summaries} has {len(texts)} lines, {references} {len(targets)}; they need the same, and one")
    check_references(targets, tokens, references)
    split = SentenceSplitter(read_lines(sources) if sources else None).split
    sample_of = (as_sample("", target, [text], split, tokens) for text, target in zip(texts, targets, strict=True))
    return np.array([sample["rouge"][0] for sample in sample_of])


def load_test_samples(args, world, precision):
    """The test samples, a list: those of --samples, or generated ones of the test documents, in their order."""
    if args.samples:
        samples = [read_sample(path) for path in sample_files(args.samples)]
        check_references((" ".join(sample["abstract"]) for sample in samples), args.rouge_tokens, args.samples)
        return [sample | {"rouge": rouge_of(sample, args.rouge_tokens)} for sample in samples]
    documents = read_documents(find_dataset(args.dataset_name), args.doc_col_name, args.sum_col_name)
    documents = take_percent(split_documents(documents)["test"], args.dataset_percent)
    check_references((document.summary for document in documents), args.rouge_tokens, args.dataset_name)
    model, tokenizer = load_generator(args.generator_name, generator_dtype(args.half_precision, precision))
    settings = search_settings(args, model.generation_config)
    generator = CandidateGenerator(model.to(world.device), tokenizer, settings, args.max_source_length)
    return generate_samples(generator, documents, args.cand_gen_batch, args.rouge_tokens)


def compare_counts(samples, wanted, trained):
    """UserError where documents have other numbers of candidates than `wanted`, if that is said; a line where they
    differ among documents, or from those that the scorer was trained on.

    wanted, trained: candidates a document, or None. A scorer of a published release does not tell.
    """
    counts = sorted({len(sample["candidates"]) for sample in samples})
    found = "-".join(map(str, {counts[0]: 0, counts[-1]: 0}))
    if wanted and counts != [wanted]:
        raise UserError(f"the samples have {found} candidates a document, not the {wanted} of --num_cands")
    if len(counts) > 1:
        print(f"the documents have {found} candidates; are they of one run?")
    if trained and counts[-1] != trained:
        print(f"the scorer was trained on {trained} candidates a document, and chooses among {found} here")


def compare(scorer, encoding, samples, batch_size, world, precision):
    """The ROUGE of each way to choose a candidate, name -> float64 [documents, 3], and the scorer's choices."""
    every = [sample["rouge"] for sample in samples]
    dataset = SampleSet(tokenize_samples(samples, encoding, sys.maxsize), encoding, world.device.type)
    numbers = np.argsort(dataset.document_lengths, kind="stable")
    choices = np.empty(len(samples), dtype=np.int64)
    for part, batch, scores, _ in score_samples(scorer, dataset, numbers, batch_size, world.device, precision):
        choices[part] = scores.masked_fill(~batch.present, -2).argmax(1).cpu().numpy()
    chosen = {
        "generator": [0] * len(samples),
        "SimCLS": choices,
        "worst": [rouge.mean(1).argmin() for rouge in every],
        "best": [rouge.mean(1).argmax() for rouge in every],
    }
    systems = {
        name: np.array([rouge[place] for rouge, place in zip(every, places, strict=True)])
        for name, places in chosen.items()
    }
    systems["random"] = np.array([rouge.mean(0) for rouge in every])
    return {name: systems[name] for name in ("generator", "SimCLS", "random", "worst", "best")}, choices


# ------------------------------------------------------------------------------------------------ how sure they are


def summarise(systems):
    """The record's part: "documents", "systems" -> metric -> "mean", "low", "high", and "p_value" -> metric.

    systems: name -> float64 [documents, 3]. The p-value is SimCLS's against the generator, where both are there.
    """
    count = len(next(iter(systems.values())))
    lows, highs = bootstrap_interval(np.concatenate(list(systems.values()), axis=1))
    result = {"documents": count, "systems": {}}
    for place, (name, figures) in enumerate(systems.items()):
        result["systems"][name] = {
            metric: {"mean": float(mean), "low": float(low), "high": float(high)}
            for metric, mean, low, high in zip(
                ROUGE, figures.mean(0), lows[3 * place :], highs[3 * place :], strict=False
            )
        }
    if {"SimCLS", "generator"} <= systems.keys():
        p_values = permutation_test(systems["SimCLS"] - systems["generator"])
        result["p_value"] = dict(zip(ROUGE, map(float, p_values), strict=True))
    return result


def bootstrap_interval(figures):
    """The 2.5th and 97.5th percentile of the means over bootstrap samples of the rows of `figures` [n, columns]."""
    random, count = np.random.default_rng(SEED), len(figures)
    means = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        picked = random.integers(0, count, (RESAMPLES_AT_ONCE, count))
        times = np.zeros((RESAMPLES_AT_ONCE, count))
        np.add.at(times, (np.arange(RESAMPLES_AT_ONCE)[:, None], picked), 1)
        means.append(times @ figures / count)
    return np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)


def permutation_test(differences):
    """The two-sided p-value of each column of `differences` [n, columns]: of their mean under random signs."""
    random, count = np.random.default_rng(SEED), len(differences)
    observed = np.abs(differences.mean(0))
    as_far = np.ones(differences.shape[1])
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        signs = random.integers(0, 2, (RESAMPLES_AT_ONCE, count)) * 2.0 - 1
        # The margin is for rounding: the same sum in another order counts as equal.
        as_far += (np.abs(signs @ differences / count) >= observed - 1e-12).sum(0)
    return as_far / (RESAMPLES // RESAMPLES_AT_ONCE * RESAMPLES_AT_ONCE + 1)


# -------------------------------------------------------------------------------------------------------- printing


def show_documents(samples, choices):
    """Print some test documents with their reference, first candidate and chosen candidate."""
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
    print(f"{result['documents']} documents; mean F in percent, 95 % interval")
    print(f"{'':<12}" + "".join(f"{metric:>24}" for metric in ROUGE))
    for name, metrics in result["systems"].items():
        cells = [
            f"{100 * each['mean']:.2f} ({100 * each['low']:.2f}-{100 * each['high']:.2f})" for each in metrics.values()
        ]
        print(f"{name:<12}" + "".join(f"{cell:>24}" for cell in cells))
    if "p_value" in result:
        print(f"{'p, SimCLS':<12}" + "".join(f"{p:>24.2g}" for p in result["p_value"].values()))


if __name__ == "__main__":
    endings.run(main)
