"""The value of each candidate search: the ROUGE of its best candidate, and the processor time that it takes.

    python3 benchmarks/searches.py
    python3 benchmarks/searches.py --scorer_path cache/short/scorer.bin    # also what SimCLS chooses among them

The demo generator writes candidates for test documents by every search of SEARCHES, in bfloat16 if the processor
supports it. ROUGE is the mean of ROUGE-1, -2 and -Lsum, in %: of the first candidate, averaged over all candidates, and
of the best, which no scorer can exceed (with its 95 % interval over documents). Processor time is summed over all
threads and covers encoding, searching and decoding to text; the median over the rounds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import CPU, ROOT, finish, get_parser, interleaved, new_record

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import numpy as np
import torch
from model import load_scorer

from harness import arguments, endings
from harness.machine import multiplies_bfloat16
from harness.precision import choose_precision
from scorer.choices import by_scorer, score_candidates, with_agreement
from scorer.combination import fitted_to
from scorer.significance import bootstrap_interval
from search.generator import (
    CandidateGenerator,
    add_search_arguments,
    generate_samples,
    length_batches,
    load_generator,
    search_settings,
)
from texts.documents import find_dataset, read_documents, split_documents

# (search, candidates of each kind of search in it, further arguments)
SEARCHES = (
    ("beam", 8, ""),
    ("diverse", 8, ""),
    ("diverse", 8, "--diversity_penalty 0.3"),
    ("sample", 8, ""),
    ("beam", 16, ""),
    ("diverse", 16, ""),
    ("sample", 16, ""),
    ("beam+diverse", 8, ""),
    ("beam+sample", 8, ""),
)


def get_args_parser():
    parser = get_parser(__doc__, "searches", rounds=3)
    add = parser.add_argument
    add("--data", default="sample", help="CSV file or data set name")
    add("--generator_name", default=str(ROOT / "SimCLS" / "demo"), help="folder")
    add("--scorer_path", type=Path, help="trained scorer, to choose among the candidates")
    add("--documents", type=arguments.positive_int, default=150, help="documents of the test split")
    add("--batch", type=arguments.positive_int, default=32, help="documents per batch")
    return parser


def main():
    args = get_args_parser().parse_args()
    documents = split_documents(read_documents(find_dataset(args.data)))["test"][: args.documents]
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    model, tokenizer = load_generator(args.generator_name, dtype)
    generators = {name: CandidateGenerator(model, tokenizer, settings) for name, settings in arms(model)}
    scorer = load_scorer(weights=args.scorer_path) if args.scorer_path else None
    rows = [judge(name, each, documents, scorer, args) for name, each in generators.items()]
    sources = next(iter(generators.values())).tokenize([document.text for document in documents])
    batches = [[sources[place] for place in places] for places in length_batches(sources, args.batch)]
    seconds = interleaved(
        {name: lambda own=each: generate(own, batches) for name, each in generators.items()}, args.rounds
    )
    for row, times in zip(rows, seconds.values(), strict=True):
        row["processor_ms_a_document"] = 1000 * statistics.median(times) / len(documents)
    record = new_record(
        "searches",
        CPU,
        model=Path(args.generator_name).name,
        dataset=Path(args.data).name,
        documents=len(documents),
        precision=str(dtype).removeprefix("torch."),
        rounds=args.rounds,
        seconds=seconds,
        searches=rows,
    )
    finish(record, args)


def arms(model):
    """Yield (name, settings) for each of SEARCHES."""
    parser = argparse.ArgumentParser()
    add_search_arguments(parser)
    for search, count, more in SEARCHES:
        own = parser.parse_args(f"--search {search} --num_cands {count} {more}".split())
        name = f"{search}, {count} each" if "+" in search else f"{search}, {count}"
        yield (
            f"{name}, {more.replace('--', '').replace('_', ' ')}".removesuffix(", "),
            search_settings(own, model.generation_config, search),
        )


def generate(generator, batches):
    """The processor seconds of generating candidates for batches of tokenized documents."""
    started = time.process_time()
    for batch in batches:
        generator.generate(batch)
    return time.process_time() - started


def judge(name, generator, documents, scorer, args):
    """The table's row for one search; ROUGE in %."""
    samples = generate_samples(generator, documents, args.batch)
    rouge = [sample["rouge"].mean(1) for sample in samples]
    texts = [{tuple(sentences) for sentences, _ in sample["candidates"]} for sample in samples]
    best = np.array([[each.max()] for each in rouge])
    low, high = bootstrap_interval(best).ravel()
    row = {
        "search": name,
        "candidates": len(rouge[0]),
        "different": float(np.mean([len(each) for each in texts])),
        "first": 100 * float(np.mean([each[0] for each in rouge])),
        "mean": 100 * float(np.mean([each.mean() for each in rouge])),
        "best": 100 * float(best.mean()),
        "best_interval": f"{100 * low:.1f} to {100 * high:.1f}",
    }
    if scorer:
        weights, encoding, _ = scorer
        scores = score_candidates(weights, encoding, samples, args.batch, CPU, choose_precision(None, CPU))
        warnings = []
        chosen = by_scorer(scores, with_agreement(samples), fitted_to(args.scorer_path, warnings))
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
        row["chosen"] = 100 * float(np.mean([each[place] for each, place in zip(rouge, chosen, strict=True)]))
    return row


if __name__ == "__main__":
    endings.run(main)
