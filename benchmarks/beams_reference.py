"""The reference side of beams.py: beam search by CTranslate2, in the interpreter that runs this script.

That interpreter needs ctranslate2, torch and transformers. Reads one JSON request per line from stdin, {"model": folder
of a T5, "compute_type", "threads", "batches": list of batches of lists of token ids, "num_cands", "max_length",
"min_length", "no_repeat_ngram_size"}, and writes one JSON answer per line to stdout, {"seconds", "tokens": a list of
candidates per document, "scores": their scores}. The first line of output is {"name"}.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "SimCLS")]

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import ctranslate2
import torch
import transformers

from search.ctranslate2_beams import CTranslate2Beams

SETTINGS = ("max_length", "min_length", "no_repeat_ngram_size")


def main():
    answer({"name": f"CTranslate2 {ctranslate2.__version__}"})
    searches = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = tuple(request[name] for name in ("model", "compute_type", "threads", "num_cands", *SETTINGS))
        if key not in searches:
            searches[key] = load(request)
        answer(translate(searches[key], request["batches"]))


def answer(value):
    print(json.dumps(value), flush=True)


def load(request):
    """The CTranslate2Beams for a request."""
    torch.set_num_threads(request["threads"])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(request["model"]).eval()
    settings = {name: request[name] for name in SETTINGS} | {"length_penalty": 1.0}
    return CTranslate2Beams(model, num_beams=request["num_cands"], compute_type=request["compute_type"], **settings)


def translate(search, batches):
    """Run the search. Only the search is timed, not the conversion of token ids before and after it."""
    batches = [[list(map(str, ids)) for ids in batch] for batch in batches]
    started = time.perf_counter()
    found = [each for batch in batches for each in search.translator.translate_batch(batch, **search.settings)]
    seconds = time.perf_counter() - started
    tokens = [[[search.start_token, *map(int, some)] for some in each.hypotheses] for each in found]
    return {"seconds": seconds, "tokens": tokens, "scores": [each.scores for each in found]}


if __name__ == "__main__":
    main()
