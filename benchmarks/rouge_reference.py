"""The reference side of rouge.py: compare-mt's scorer and a pool of processes, as SimCLS and BRIO use them.

Runs in the interpreter of an environment with compare-mt (`pip install compare-mt`), and imports nothing from this
repository. Without compare-mt it uses `rouge-score`, of which compare-mt contains an older copy.

    python rouge_reference.py WORKERS

Reads one JSON line per task from stdin, [[reference sentences, [candidate sentences, ...]], ...], and writes one JSON
line, {"seconds", "scores"}; the scores are F-measures [document][candidate][rouge1, rouge2, rougeLsum]. The first line
of output is {"name"}, the scorer's name.
"""

import json
import sys
import time
from importlib import metadata
from multiprocessing import Pool

try:
    from compare_mt.rouge.rouge_scorer import RougeScorer

    NAME = f"compare-mt {metadata.version('compare-mt')}"
except ImportError:
    from rouge_score.rouge_scorer import RougeScorer

    NAME = f"rouge-score {metadata.version('rouge-score')}"

METRICS = ["rouge1", "rouge2", "rougeLsum"]
scorer = RougeScorer(METRICS, use_stemmer=True)


def score_document(document):
    reference, candidates = document
    target = "\n".join(reference)
    scores = [scorer.score(target, "\n".join(candidate)) for candidate in candidates]
    return [[score[metric].fmeasure for metric in METRICS] for score in scores]


def main():
    workers = int(sys.argv[1])
    print(json.dumps({"name": NAME}), flush=True)
    for line in sys.stdin:
        documents = json.loads(line)
        start = time.perf_counter()
        with Pool(workers) as pool:
            scores = list(pool.imap(score_document, documents, chunksize=16))
        print(json.dumps({"seconds": time.perf_counter() - start, "scores": scores}), flush=True)


if __name__ == "__main__":
    main()
