"""Record what transformers 4.56.2 generates, for tests/test_diverse_beam.py to compare with.

    python -m venv reference && reference/bin/pip install transformers==4.56.2 torch numpy
    reference/bin/python tests/record_diverse_beam.py

4.56.2 is the last version with diverse (group) beam search built in. The file says which versions wrote it.
"""

import json
from pathlib import Path

import torch
import transformers
from tiny_seq2seq import MODELS, build, documents, fingerprint

PATH = Path(__file__).resolve().parent / "fixtures" / "diverse_beam.json"

# The settings of generate() by which a case differs from these.
BASE = {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0, "max_length": 12}
EVERY_MODEL = [
    {},
    {"num_beams": 8, "num_beam_groups": 8, "max_length": 20},
    {"num_beams": 6, "num_beam_groups": 3, "max_length": 16},
    {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 0.3, "length_penalty": 2.0},
    {"num_beams": 9, "num_beam_groups": 3, "early_stopping": True, "no_repeat_ngram_size": 2},
    {"num_beams": 6, "num_beam_groups": 3, "early_stopping": "never", "max_length": 16},
    {"min_length": 9, "no_repeat_ngram_size": 3, "length_penalty": 0.6, "max_length": 16},
]
ONE_MODEL = [
    {"diversity_penalty": 0.1},
    {"diversity_penalty": 5.0, "max_length": 5},
    {"max_length": 2},
    {"num_beams": 2, "num_beam_groups": 2, "length_penalty": 0.0},
    {"length_penalty": -1.0, "early_stopping": "never"},
    {"early_stopping": True},
    {"early_stopping": "never", "length_penalty": 2.0, "max_length": 24},
    {"no_repeat_ngram_size": 1, "max_length": 16},
    {"no_repeat_ngram_size": 2, "max_length": 24},
    {"min_length": 12},
    {"num_beams": 4, "num_beam_groups": 2, "length_penalty": -0.5},
    {"num_beams": 4, "num_beam_groups": 2, "early_stopping": True, "diversity_penalty": 3.0},
    {"num_beams": 6, "num_beam_groups": 2, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 12, "num_beam_groups": 3, "max_length": 24, "length_penalty": 1.5},
    {"num_beams": 16, "num_beam_groups": 16, "max_length": 24},
    {"num_beams": 6, "num_beam_groups": 3, "min_length": 6, "no_repeat_ngram_size": 1},
    {"num_beams": 6, "num_beam_groups": 3, "eos_token_id": [1, 7, 9], "max_length": 16},
    {"num_beams": 5, "num_beam_groups": 5, "eos_token_id": [1, 7], "length_penalty": 0.5},
    {"suppress_tokens": [5, 6], "bad_words_ids": [[8], [11]], "max_length": 16},
]
CASES = [(model, case) for model in MODELS for case in EVERY_MODEL] + [("t5", case) for case in ONE_MODEL]
CASES += [("bart", case) for case in ONE_MODEL[:10]]


def main():
    if transformers.__version__ != "4.56.2":
        raise SystemExit(f"this is transformers {transformers.__version__}; the reference is 4.56.2")
    models = {name: build(name) for name in MODELS}
    cases = []
    for name, changes in CASES:
        settings = BASE | changes
        input_ids, attention_mask = documents(models[name])
        output = models[name].generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_return_sequences=settings["num_beams"],
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        scores = [round(score, 5) for score in output.sequences_scores.tolist()]
        cases.append({"model": name, "settings": settings, "sequences": output.sequences.tolist(), "scores": scores})
    record = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "models": {name: fingerprint(model) for name, model in models.items()},
        "cases": cases,
    }
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(record).replace('{"model"', '\n{"model"') + "\n")


if __name__ == "__main__":
    main()
