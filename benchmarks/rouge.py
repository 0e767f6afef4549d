"""The speed-up of rouge-score-rs over compare-mt's scorer, with 16 candidates per document. Target: 10.

    python3 benchmarks/rouge.py --data pubmed_abstracts.csv.gz --reference_python /path/of/venv/bin/python

Both sides use the same number of processes, and start them anew in every round. First, our scores are checked to equal
those of `rouge-score` to 1e-12 on every pair of reference and candidate; then two kinds of text are timed:

    titles      the document's summary as reference; sentences and fragments of its text as candidates
    paragraphs  the first four sentences of the text as reference; three of its sentences as each candidate
"""

import functools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import CPU, Reference, check, finish, get_parser, interleaved, new_record, ratio_summary

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from utils import map_in_order, progress

from harness import arguments, endings
from texts.documents import find_dataset, read_documents
from texts.rouge_scores import METRICS, score
from texts.sentences import SentenceSplitter

CANDIDATES = 16
CHUNK = 64  # Documents per task of a process.
TOLERANCE = 1e-12
TARGETS = {"cpu": {"titles": ("at least", 10.0), "paragraphs": ("at least", 10.0)}}


def get_args_parser():
    parser = get_parser(__doc__, "rouge", rounds=7)
    parser.add_argument("--data", default="sample", help="CSV file of documents, or sample")
    parser.add_argument("--documents", type=arguments.positive_int, help="check only the first ones")
    parser.add_argument("--timed_titles", type=arguments.positive_int, default=1500, help="documents per round")
    parser.add_argument("--timed_paragraphs", type=arguments.positive_int, default=200, help="documents per round")
    parser.add_argument("--num_workers", "--workers", type=arguments.positive_int, default=2, help="processes a side")
    parser.add_argument("--reference_python", default=sys.executable, help="interpreter that has compare-mt")
    return parser


def main():
    args = get_args_parser().parse_args()
    titles, paragraphs = make_pairs(read_documents(find_dataset(args.data))[: args.documents])
    largest = largest_difference(titles + paragraphs[: args.timed_paragraphs], args.num_workers)
    pairs = CANDIDATES * (len(titles) + len(paragraphs[: args.timed_paragraphs]))
    print(f"largest difference from rouge-score over {pairs} pairs: {largest:.1e}", flush=True)
    check(largest <= TOLERANCE, "our scores differ from rouge-score's")
    work = {"titles": titles[: args.timed_titles], "paragraphs": paragraphs[: args.timed_paragraphs]}
    needs = "compare-mt, or at least rouge-score"
    with Reference(args.reference_python, "rouge_reference.py", args.num_workers, needs=needs) as reference:
        results = {name: time_both(name, some, reference, args) for name, some in work.items()}
    record = new_record(
        "rouge",
        CPU,
        reference=reference.name,
        processes=args.num_workers,
        candidates=CANDIDATES,
        pairs_checked=pairs,
        largest_difference=largest,
        results=results,
    )
    finish(record, args)


def make_pairs(documents):
    """(titles, paragraphs): per Document, a reference and CANDIDATES candidates, each a list of sentences."""
    splitter = SentenceSplitter(document.text for document in documents)
    rng = random.Random(0)
    titles, paragraphs = [], []
    for document in documents:
        sentences, words = splitter.split(document.text), document.text.split()
        titles.append(([document.summary], [title_candidate(sentences, words, rng) for _ in range(CANDIDATES)]))
        triples = [rng.sample(sentences, min(3, len(sentences))) for _ in range(CANDIDATES)]
        paragraphs.append((sentences[:4], triples))
    return titles, paragraphs


def title_candidate(sentences, words, rng):
    if rng.random() < 0.5:
        return rng.sample(sentences, rng.randint(1, min(2, len(sentences))))
    start = rng.randrange(len(words))
    return [" ".join(words[start : start + rng.randint(5, 25)])]


@functools.cache
def oracle():
    return RougeScorer(METRICS, use_stemmer=True)


def difference(document):
    """The largest difference from `rouge-score` over all F-measures of one document."""
    sentences, candidates = document
    expected = [oracle().score("\n".join(sentences), "\n".join(candidate)) for candidate in candidates]
    expected = np.array([[each[metric].fmeasure for metric in METRICS] for each in expected])
    return float(np.abs(score(sentences, candidates) - expected).max())


def score_document(document):
    return score(*document)


def largest_difference(pairs, workers):
    differences = progress(map_in_order(difference, pairs, workers, CANDIDATES), len(pairs), "checked documents")
    return float(np.max(list(differences)))  # max() would leave out a NaN that does not come first.


def time_both(name, pairs, reference, args):
    """Time both sides on the same documents, after checking that they give the same scores."""

    def ours():
        return list(map_in_order(score_document, pairs, args.num_workers, CHUNK))

    theirs = np.array(reference.ask(pairs)["scores"])
    check(np.abs(np.array(ours()) - theirs).max() <= TOLERANCE, f"{name}: the two sides differ")
    # Their seconds are measured inside their process, so they do not include sending the text.
    seconds = interleaved({"theirs": lambda: reference.ask(pairs)["seconds"], "ours": ours}, args.rounds)
    ratio = ratio_summary(seconds["theirs"], seconds["ours"])
    rates = {arm: len(pairs) * CANDIDATES / float(np.median(values)) for arm, values in seconds.items()}
    print(f"{name}: {reference.name} {rates['theirs']:.0f} pairs/s, rouge-score-rs {rates['ours']:.0f}", flush=True)
    return {"pairs": len(pairs) * CANDIDATES, "seconds": seconds, "pairs_per_second": rates, "ratio": ratio}


if __name__ == "__main__":
    endings.run(main)
