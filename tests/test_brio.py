"""brio.py: the scores that a generator gives to summaries, and its fine-tuning on them."""

import json

import pytest
import torch

from search.generator import load_generator
from search.ranked_generator import RankedGenerator, RankedSamples
from texts.samples import read_sample, sample_files

pytestmark = pytest.mark.slow

SCRIPT = "SimCLS/brio.py"


@pytest.mark.parametrize("length_penalty", [0.0, 0.6])
def test_scores_are_log_probabilities_whatever_else_is_in_the_batch(encoders, sample_folder, length_penalty):
    model, tokenizer = load_generator(encoders["t5"])
    samples = [read_sample(path) for path in sample_files(sample_folder / "train")[:3]]
    samples[1]["candidates_untok"] = samples[1]["candidates_untok"][:2]
    batch = RankedSamples(samples, tokenizer, 4, 60, 20).batch(range(3))
    with torch.no_grad():
        scores, references, entropy = RankedGenerator(model, tokenizer, length_penalty)(batch)
    assert batch.present.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    of_references = []
    for sample, row, reference in zip(samples, scores, references, strict=True):
        document = tokenizer(" ".join(sample["article_untok"]), return_tensors="pt")["input_ids"]
        texts = [sample["abstract_untok"], *(text for text, _ in sample["candidates_untok"][:4])]
        for place, text in enumerate(texts):
            labels = tokenizer(" ".join(text), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                mean = -model(input_ids=document, labels=labels).loss
            got = row[place - 1] if place else reference
            assert float(got) == pytest.approx(float(mean) * labels.shape[1] ** (1 - length_penalty), rel=1e-4)
            of_references += [] if place else [-float(mean)]
    assert float(entropy) == pytest.approx(sum(of_references) / 3, rel=1e-4)


def test_a_run_learns_the_order_and_leaves_a_generator(run_script, encoders, sample_folder, tmp_path):
    arguments = ["--generator_name", encoders["t5"], "--dataset", sample_folder, "--save_dir", "brio", "--num_epoch", 3,
                 "--num_cands", 6, "--num_workers", 0, "--lr", 0.003, "--mle_weight", 0]  # fmt: skip
    run_script(SCRIPT, *arguments, cwd=tmp_path)
    record = json.loads((tmp_path / "brio" / "brio.json").read_text())
    losses = [epoch["ranking_loss"] for epoch in record["epochs"]]
    assert losses[2] < 0.9 * losses[0]
    assert {"val_rouge1", "val_rouge2", "val_rougeL", "cross_entropy", "timing"} <= record["epochs"][0].keys()
    before, after = (load_generator(str(folder))[0].state_dict() for folder in (encoders["t5"], tmp_path / "brio"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "nothing to resume" in run_script(SCRIPT, *arguments, "--resume", cwd=tmp_path).stdout
