"""The throughput (documents/s) of our plain beam search relative to CTranslate2's, with equal candidates.

    python3 benchmarks/beams.py --reference_python /path/of/venv/bin/python

A model of T5-small's shape with random weights, and the demo generator, write 8 candidates per document by beam search
that stops when eight have ended. The arms, all with the same number of threads: ours and CTranslate2 in single
precision; ours in bfloat16, if the processor supports it, and CTranslate2 in int8. Before the timing, both must return
equal candidates in single precision, up to ties, with no tokens forbidden. For each arm the record has the share of
CTranslate2's float32 candidates that it also finds and, for the trained generator, the ROUGE of the first and of the
best candidate.

CTranslate2 4.8 runs in a separate interpreter, whose environment needs ctranslate2, torch and transformers. It has no
diverse beam search.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import CPU, ROOT, Reference, check, finish, get_parser, interleaved, new_record, ratio_summary

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import numpy as np
import torch
import transformers
from candidate_sides import END, make_cases, run_ours, shared, strip

from harness import arguments, endings
from harness.machine import multiplies_bfloat16
from search.diverse_beam import DiverseBeamSearch
from search.generator import length_batches
from texts.documents import clean, find_dataset, read_documents, split_documents
from texts.samples import as_sample
from texts.sentences import SentenceSplitter

NEEDS = "ctranslate2 4.8, torch and transformers"
SHAPE, DEMO = "t5-small shape", "demonstration"
TIE = 1e-3  # Score difference that counts as a tie; scores are mean log-probabilities per token.
TARGETS = {
    "cpu": {
        "t5-small shape, float32": ("at least", 1.2),
        "demonstration, float32": ("at least", 1.0),
        "t5-small shape, bfloat16 against int8": ("at least", 1.0),
        "demonstration, bfloat16 against int8": ("at least", 1.0),
    }
}


def get_args_parser():
    parser = get_parser(__doc__, "beams", rounds=6)
    integer = arguments.positive_int
    parser.add_argument("--reference_python", required=True, help="interpreter that has ctranslate2")
    parser.add_argument("--data", default="sample", help="CSV file or data set name")
    parser.add_argument("--documents", type=integer, default=32, help="documents of the test split")
    parser.add_argument("--threads", type=integer, default=1, help="threads of each side")
    parser.add_argument("--num_cands", type=integer, default=8, help="beams and candidates")
    parser.add_argument("--batch", type=integer, default=16, help="documents per batch, on both sides")
    parser.add_argument("--max_source_length", type=integer, default=256, help="maximum tokens of a document")
    parser.add_argument("--decoder_max_len", type=integer, default=25, help="maximum tokens of a candidate")
    parser.set_defaults(model=str(ROOT / "SimCLS" / "demo"))
    return parser


def main():
    args = get_args_parser().parse_args()
    torch.set_num_threads(args.threads)
    splits = split_documents(read_documents(find_dataset(args.data)))
    documents = splits["test"][: args.documents]
    texts, results = [document.text for document in documents], {}
    reference = Reference(args.reference_python, "beams_reference.py", needs=NEEDS)
    with tempfile.TemporaryDirectory() as folder, reference:
        print(f"reference: {reference.name}; {args.threads} threads", flush=True)
        for name, model_folder, sources in make_cases(args, splits["train"], texts, Path(folder)):
            sources = [ids if len(ids) <= args.max_source_length else ids[: args.max_source_length - 1] + [END]
                       for ids in sources]  # fmt: skip
            shown, learnt = {args.model: (DEMO, documents), SHAPE: (SHAPE, None)}.get(name, (None, None))
            if shown:
                results[shown] = time_case(shown, Case(model_folder, sources, reference, args), args, learnt)
        record = new_record(
            "beams",
            CPU,
            reference=reference.name,
            settings={name: getattr(args, name) for name in ("rounds", "threads", "num_cands", "batch")},
            documents=len(texts),
            results=results,
        )
    finish(record, args)


class Case:
    """One model with its documents, searched by both sides.

    arms: {name: callable without arguments that returns (seconds, the unpadded candidates of each document)}.
    """

    def __init__(self, model_folder, sources, reference, args):
        self.folder, self.sources, self.reference, self.args = model_folder, sources, reference, args
        self.batches = length_batches(sources, args.batch)
        config = transformers.GenerationConfig.from_pretrained(model_folder)
        self.settings = {
            "max_length": args.decoder_max_len,
            "min_length": config.min_length or 0,
            "no_repeat_ngram_size": config.no_repeat_ngram_size or 0,
        }
        dtypes = ("float32", *["bfloat16"] * multiplies_bfloat16())
        searches = {f"ours, {dtype}": self.search(getattr(torch, dtype), self.settings) for dtype in dtypes}
        self.arms = {name: lambda search=search: run_ours(search, sources, args.batch)
                     for name, search in searches.items()}  # fmt: skip
        for compute_type in ("float32", "int8"):
            self.arms[f"CTranslate2, {compute_type}"] = lambda kind=compute_type: self.ask(kind, self.settings)[:2]

    def search(self, dtype, settings):
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(self.folder, dtype=dtype).eval()
        plain = {"num_beams": self.args.num_cands, "num_groups": 1, "diversity_penalty": 0.0, "early_stopping": True}
        return DiverseBeamSearch(model, **plain, **settings)

    def ask(self, compute_type, settings):
        """(seconds, candidates, their scores) from CTranslate2; the latter two are lists with one list per document."""
        order = [place for places in self.batches for place in places]
        request = {"model": str(self.folder), "compute_type": compute_type, "threads": self.args.threads}
        request |= {"num_cands": self.args.num_cands, **settings}
        answer = self.reference.ask(
            request | {"batches": [[self.sources[place] for place in places] for places in self.batches]}
        )
        found = (dict(zip(order, answer[part], strict=True)) for part in ("tokens", "scores"))
        return answer["seconds"], *([part[place] for place in range(len(order))] for part in found)

    def check_equal(self):
        """Raise AssertionError unless, in single precision, both sides' candidates have the same scores up to TIE."""
        # Nothing is forbidden: CTranslate2 redistributes a forbidden token's probability; transformers and we do not.
        settings = self.settings | {"min_length": 0, "no_repeat_ngram_size": 0}
        search, documents, apart = self.search(torch.float32, settings), len(self.sources), 0.0
        _, theirs, their_scores = self.ask("float32", settings)
        same = 0
        for ids, some, scores in zip(self.sources, theirs, their_scores, strict=True):
            found = search(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
            if strip(found.tokens[0].tolist(), search.pad_token) == some:
                same += 1
            apart = max(apart, float(np.abs(found.scores[0].numpy() - scores).max()))
        print(
            f"candidates of {same} of {documents} documents are equal; scores differ by at most {apart:.1e}", flush=True
        )
        check(apart <= TIE, "CTranslate2's candidates have other scores")
        return {"documents_with_equal_candidates": same, "largest_difference_of_scores": apart}


def time_case(name, case, args, documents=None):
    """Check that both sides agree, then time the arms in turn. documents: given only for a trained model."""
    result = case.check_equal()
    found = {arm: run()[1] for arm, run in case.arms.items()}
    seconds = interleaved({arm: lambda run=run: run()[0] for arm, run in case.arms.items()}, args.rounds)
    fastest = "bfloat16" if "ours, bfloat16" in seconds else "float32"
    pairs = {"float32": ("float32", "float32"), f"{fastest} against int8": (fastest, "int8")}
    count = len(case.sources)
    result |= {
        "mean_source_tokens": sum(map(len, case.sources)) / count,
        "seconds": seconds,
        "documents_per_second": {arm: count / median(times) for arm, times in seconds.items()},
        "quality": {arm: quality(some, found["CTranslate2, float32"], documents) for arm, some in found.items()},
        "ratios": {
            pair: ratio_summary(seconds[f"CTranslate2, {theirs}"], seconds[f"ours, {ours}"])
            for pair, (ours, theirs) in pairs.items()
        },
    }
    for arm, rate in result["documents_per_second"].items():
        figures = ", ".join(f"{what} {value:.1f}" for what, value in result["quality"][arm].items())
        print(f"{name}: {arm}: {rate:.1f} documents/s; {figures}", flush=True)
    return result


def quality(candidates, expected, documents):
    """The quality of the candidates, in %: the share of the `expected` candidates among them and, given `documents`,
    the mean of the three ROUGE scores for the first and for the best candidate."""
    figures = {"the same": 100 * shared(candidates, expected)}
    if documents:
        tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "SimCLS" / "demo", local_files_only=True)
        split = SentenceSplitter(document.text for document in documents).split
        texts = [map(clean, tokenizer.batch_decode(some, skip_special_tokens=True)) for some in candidates]
        pairs = zip(documents, texts, strict=True)
        means = [as_sample(*document, list(some), split)["rouge"].mean(1) for document, some in pairs]
        figures |= {"first": 100 * float(np.mean([mean[0] for mean in means]))}
        figures |= {"best": 100 * float(np.mean([mean.max() for mean in means]))}
    return figures


if __name__ == "__main__":
    endings.run(main)
