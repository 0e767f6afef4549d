"""The speed-up of candidate generation over transformers 4.56.2, with equal tokens. Targets: TARGETS.

    python3 benchmarks/candidates.py --data pubmed_abstracts.csv.gz --reference_python /path/of/venv/bin/python

Three models generate 8 candidates per document, with one group per beam: one of T5-small's shape with random weights
(its candidates never end by themselves), a small BART with random weights, and the generator given with
--generator_name, if any. The arms:

    original    transformers 4.56.2, documents in file order, in batches of 32, all padded to 512 tokens
    sorted      transformers 4.56.2, documents sorted by length, padded to the longest of the batch
    ours        DiverseBeamSearch, documents sorted by length
    bfloat16    the same in bfloat16, if the processor supports it

Batches of 32 are the original's default. On a CPU smaller ones are faster: --original_batch 1 shows `original` at its
best.

The reference runs in a separate interpreter, whose environment has transformers 4.56.2; without --reference_python, it
is the same algorithm reimplemented on the installed version's modules. Before the timing, all arms in single precision
must give equal tokens; for bfloat16, the record has the share of these candidates that it finds, too.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import CPU, Reference, check, finish, get_parser, interleaved, new_record, ratio_summary

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import torch
import transformers
from candidate_sides import LONGEST, NEEDS, make_cases, run_ours, run_reference, shared
from candidates_reference import DIVERSITY_PENALTY

from harness import arguments, endings
from harness.machine import multiplies_bfloat16
from search.diverse_beam import DiverseBeamSearch
from search.generator import length_batches
from texts.documents import find_dataset, read_documents, split_documents

TARGETS = {
    "cpu": {
        "t5-small shape, original": ("at least", 8.0),
        "t5-small shape, original against bfloat16": ("at least", 8.0),
        "t5-small shape, sorted": ("at least", 2.5),
        "bart kind, sorted": ("at least", 2.5),
    }
}


def get_args_parser():
    parser = get_parser(__doc__, "candidates", rounds=6)
    integer = arguments.positive_int
    parser.add_argument("--data", default="sample", help="CSV file or data set name")
    parser.add_argument("--documents", type=integer, default=16, help="documents of the test split")
    parser.add_argument("--generator_name", "--model", dest="model", help="folder of a generator to time as well")
    parser.add_argument("--reference_python", default=sys.executable, help="interpreter that has transformers 4.56.2")
    parser.add_argument("--num_cands", type=integer, default=8, help="candidates per document")
    parser.add_argument("--decoder_max_len", type=integer, default=64, help="maximum tokens of a candidate")
    parser.add_argument("--batch", type=integer, default=16, help="documents per batch of ours")
    parser.add_argument("--original_batch", type=integer, default=32, help="documents per batch of the original")
    parser.add_argument(
        "--reference_batch", type=integer, default=4, help="documents per batch of the sorted reference; 4 is its best"
    )
    return parser


def main():
    args = get_args_parser().parse_args()
    documents = split_documents(read_documents(find_dataset(args.data)))
    texts = [document.text for document in documents["test"][: args.documents]]
    reference = Reference(args.reference_python, "candidates_reference.py", needs=NEEDS)
    with tempfile.TemporaryDirectory() as folder, reference:
        print(f"reference: {reference.name}; {torch.get_num_threads()} threads", flush=True)
        results = {}
        for name, model_folder, sources in make_cases(args, documents["train"], texts, Path(folder)):
            results[name] = time_case(name, model_folder, sources, reference, args)
        record = new_record(
            "candidates",
            CPU,
            reference=reference.name,
            candidates=args.num_cands,
            decoder_max_len=args.decoder_max_len,
            batches={"original": args.original_batch, "sorted": args.reference_batch, "ours": args.batch},
            documents=len(texts),
            results=results,
        )
    finish(record, args)


def time_case(name, model_folder, sources, reference, args):
    """Check that all arms give equal tokens, then time them in turn."""
    searches = {"ours": torch.float32} | ({"bfloat16": torch.bfloat16} if multiplies_bfloat16() else {})
    searches = {arm: make_search(model_folder, dtype, args) for arm, dtype in searches.items()}
    request = {"model": str(model_folder), "num_cands": args.num_cands, "max_length": args.decoder_max_len}
    places, size = range(len(sources)), args.original_batch
    as_they_come = [places[start : start + size] for start in range(0, len(places), size)]
    by_length, pad = length_batches(sources, args.reference_batch), searches["ours"].pad_token
    arms = {
        "original": lambda: run_reference(reference, sources, as_they_come, request | {"pad_to": LONGEST}, pad),
        "sorted": lambda: run_reference(reference, sources, by_length, request | {"pad_to": None}, pad),
        **{arm: lambda search=search: run_ours(search, sources, args.batch) for arm, search in searches.items()},
    }
    outputs = {arm: run()[1] for arm, run in arms.items()}
    for arm in ("original", "sorted"):
        equal = sum(a == b for a, b in zip(outputs[arm], outputs["ours"], strict=True))
        print(f"{name}: the tokens of {equal} of {len(sources)} documents equal those of {arm}", flush=True)
        check(equal == len(sources), f"{name}: the tokens differ from those of {arm}")
    same = {arm: shared(outputs[arm], outputs["ours"]) for arm in searches if arm != "ours"}
    for arm, share in same.items():
        print(f"{name}: {arm} finds {100 * share:.0f} % of the candidates of single precision", flush=True)
    # The reference's seconds are measured inside its process.
    seconds = interleaved({arm: lambda run=run: run()[0] for arm, run in arms.items()}, args.rounds)
    lengths = [len(candidate) for some in outputs["ours"] for candidate in some]
    return {
        "mean_source_tokens": sum(map(len, sources)) / len(sources),
        "mean_candidate_tokens": sum(lengths) / len(lengths),
        "seconds": seconds,
        "documents_per_second": {arm: len(sources) / median(times) for arm, times in seconds.items()},
        "same_candidates": same,
        "ratios": {
            f"{theirs}{against}": ratio_summary(seconds[theirs], seconds[ours])
            for ours, against in (("ours", ""), ("bfloat16", " against bfloat16"))
            if ours in searches
            for theirs in ("original", "sorted")
        },
    }


def make_search(model_folder, dtype, args):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(model_folder, dtype=dtype).eval()
    return DiverseBeamSearch(
        model,
        num_beams=args.num_cands,
        num_groups=args.num_cands,
        diversity_penalty=DIVERSITY_PENALTY,
        max_length=args.decoder_max_len,
        min_length=model.generation_config.min_length or 0,
        no_repeat_ngram_size=model.generation_config.no_repeat_ngram_size or 0,
    )


if __name__ == "__main__":
    endings.run(main)
