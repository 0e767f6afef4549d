"""The other side of beams.py: beam search by CTranslate2, in the interpreter that it was started with.

That interpreter needs ctranslate2, torch and transformers. One JSON request a line on stdin, {"model": folder of a T5,
"compute_type", "threads", "batches": list of batches of lists of token ids, "num_cands", "max_length", "min_length",
"no_repeat_ngram_size"}; one JSON answer a line on stdout, {"seconds", "tokens": for each document a list of candidates,
"scores": their scores}. The first line out is {"name"}.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import ctranslate2
import transformers
from ctranslate2.converters.transformers import T5Loader


def main():
    answer({"name": f"CTranslate2 {ctranslate2.__version__}"})
    translators = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["model"], request["compute_type"], request["threads"]
        if key not in translators:
            translators[key] = load(*key)
        answer(translate(*translators[key], request))


def answer(value):
    print(json.dumps(value), flush=True)


def load(folder, compute_type, threads):
    """(the Translator of the T5 in `folder`, its start token). A token is called by its number: "17"."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).float()
    spec = T5Loader().get_model_spec(model)
    vocabulary = [str(token) for token in range(model.config.vocab_size)]
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    start, end = model.generation_config.decoder_start_token_id, model.generation_config.eos_token_id
    spec.config.bos_token = spec.config.decoder_start_token = str(start)
    spec.config.eos_token, spec.config.unk_token = str(end), vocabulary[2]
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as converted:
        spec.save(converted)
        translator = ctranslate2.Translator(converted, compute_type=compute_type, intra_threads=threads)
    return translator, start


def translate(translator, start, request):
    settings = {
        "beam_size": request["num_cands"],
        "num_hypotheses": request["num_cands"],
        "max_input_length": 0,
        "max_decoding_length": request["max_length"] - 1,  # The start token does not count here.
        "min_decoding_length": max(0, request["min_length"] - 1),
        "no_repeat_ngram_size": request["no_repeat_ngram_size"],
        "return_end_token": True,
        "return_scores": True,
    }
    batches = [[list(map(str, ids)) for ids in batch] for batch in request["batches"]]
    started = time.perf_counter()
    found = [each for batch in batches for each in translator.translate_batch(batch, **settings)]
    seconds = time.perf_counter() - started
    tokens = [[[start, *map(int, some)] for some in each.hypotheses] for each in found]
    return {"seconds": seconds, "tokens": tokens, "scores": [each.scores for each in found]}


if __name__ == "__main__":
    main()
