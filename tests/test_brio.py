"""brio.py: the scores that a generator gives to summaries, and its fine-tuning on them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_seq2seq
import torch
from data_utils import ROUGE

from harness.distributed import World
from harness.endings import UserError
from harness.files import output_lock
from pretrained.model_folders import GENERATOR_LOCK
from search.generator import fingerprint, is_of, load_generator, own_length, own_source_length
from texts import provenance
from texts.samples import read_sample, sample_files
from training import ranked_generator
from training.ranked_generator import BrioRun, Means, RankedGenerator, RankedSamples

pytestmark = pytest.mark.slow

SCRIPT = "SimCLS/brio.py"
CPU = torch.device("cpu")
EPOCH = SimpleNamespace(number=0, samples=1, timing={"seconds": 1.0, "phases": {}, "peak_memory": None})


@pytest.mark.parametrize(("length_penalty", "kind"), [(0.0, "t5"), (0.6, "t5"), (0.6, "switch")])
def test_scores_are_log_probabilities_whatever_else_is_in_the_batch(encoders, sample_folder, length_penalty, kind):
    model, tokenizer = load_generator(encoders["t5"])
    if kind == "switch":  # A mixture of experts, whose encoder returns more than states.
        model = tiny_seq2seq.build_switch(model.config.vocab_size)
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
    samples = shutil.copytree(sample_folder, tmp_path / "samples")
    arguments = ["--generator_name", encoders["t5"], "--dataset", samples, "--save_dir", "brio", "--num_epoch", 3,
                 "--num_cands", 6, "--num_workers", 0, "--lr", 0.003, "--mle_weight", 0,
                 "--length_penalty", 0.7]  # fmt: skip
    printed = run_script(SCRIPT, *arguments, cwd=tmp_path).stdout
    record = json.loads((tmp_path / "brio" / "brio.json").read_text())
    assert "warning" not in printed
    before = [100 * record["before"][f"val_{name}"] for name in ("rouge1", "rouge2", "rougeL")]
    assert "before the first epoch: rouge1 {:.2f}, rouge2 {:.2f}, rougeL {:.2f}\n".format(*before) in printed
    config = json.loads((tmp_path / "brio" / "generation_config.json").read_text())
    assert config["length_penalty"] == 0.7  # Which later searches rank by, then.
    lengths = [record["arguments"][f"max_{which}_length"] for which in ("source", "target")]
    model, tokenizer = load_generator(encoders["t5"])
    assert lengths == [own_source_length(model, tokenizer), own_length(model.generation_config) - 1]
    losses = [epoch["ranking_loss"] for epoch in record["epochs"]]
    assert losses[2] < 0.9 * losses[0]
    assert {"val_rouge1", "val_rouge2", "val_rougeL", "cross_entropy", "timing"} <= record["epochs"][0].keys()
    before, after = (load_generator(str(folder))[0].state_dict() for folder in (encoders["t5"], tmp_path / "brio"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "nothing to resume" in run_script(SCRIPT, *arguments, "--resume", cwd=tmp_path).stdout
    first = samples / "val" / "0.json"
    text = first.read_text()
    sample = json.loads(text)
    for name in ("candidates", "candidates_untok"):  # Of the same size: only their contents tell.
        sample[name][0][1], sample[name][-1][1] = sample[name][-1][1], sample[name][0][1]
    first.write_text(json.dumps(sample))
    ended = run_script(SCRIPT, *arguments, "--resume", cwd=tmp_path, code=2)
    assert "has other contents than when the run in" in ended.stderr
    first.write_text(text)
    (tmp_path / "brio" / "model.safetensors").unlink()
    assert "model.safetensors is gone" in run_script(SCRIPT, *arguments, "--resume", cwd=tmp_path, code=2).stderr


def test_what_makes_it_worse_and_samples_of_another_generator_are_said(run_script, encoders, sample_folder, tmp_path):
    samples = shutil.copytree(sample_folder, tmp_path / "samples")
    for split in ("train", "val"):
        provenance.write(samples / split, provenance.describe(split=split, candidates={"generator": "another"}))
    arguments = ["--generator_name", encoders["t5"], "--dataset", samples, "--save_dir", "brio", "--num_epoch", 1,
                 "--num_workers", 0, "--lr", 1.0, "--rouge_tokens", "characters"]  # fmt: skip
    printed = run_script(SCRIPT, *arguments, cwd=tmp_path).stdout
    assert f"warning: the candidates in {samples} were made with another generator than {encoders['t5']}" in printed
    assert f"warning: no epoch is better than {encoders['t5']}" in printed
    record = json.loads((tmp_path / "brio" / "brio.json").read_text())
    assert record["before"]["val_rouge1"] >= record["epochs"][0]["val_rouge1"]


def test_sentences_of_a_validation_do_not_depend_on_how_many_processes_share_it(encoders, sample_folder, monkeypatch):
    learnt_from = []

    def splitter(texts):
        learnt_from.append(list(texts))
        return SimpleNamespace(split=lambda text: [text])

    monkeypatch.setattr(ranked_generator, "SentenceSplitter", splitter)
    ranked = RankedGenerator(*load_generator(encoders["t5"]), 1.0)
    samples = [read_sample(path) for path in sample_files(sample_folder / "val")[:3]]
    args = SimpleNamespace(num_cands=2, max_source_length=60, max_target_length=19, rouge_tokens="standard")
    second = SimpleNamespace(rank=1, size=2, device=CPU, sum=lambda sums: sums)
    ranked_generator.validate(ranked, samples, args, second, stop=False)
    assert learnt_from == [[" ".join(sample["article_untok"]) for sample in samples]]


def test_a_generators_samples_are_its_own_in_whatever_precision(encoders):
    model, tokenizer = load_generator(encoders["t5"])
    half = load_generator(encoders["t5"], torch.bfloat16)[0]
    origin = fingerprint(half, tokenizer)
    assert origin != fingerprint(model, tokenizer)
    assert is_of(model, tokenizer, {"candidates": {"generator": origin}})
    assert is_of(model, tokenizer, {"files": []})
    with torch.no_grad():
        next(model.parameters())[0] += 1
    assert not is_of(model, tokenizer, {"candidates": {"generator": origin}})


def test_the_generator_of_the_best_epoch_is_kept(tmp_path):
    """And one that is no better than the generator as it was, if no epoch is."""
    kept, losses = [], dict.fromkeys(Means.names, 1.0)
    run = BrioRun(SimpleNamespace(max_steps=None, save_dir=tmp_path), World(0, 1, CPU))
    for rouge in (0.3, 0.5, 0.4, 0.45, 0.6):
        ranked = SimpleNamespace(save=lambda folder, rouge=rouge: kept.append(rouge))
        run.state = {"means": SimpleNamespace(take=lambda world: losses), "ranked": ranked}
        run.add_epoch(EPOCH, {f"val_{name}": rouge for name in ROUGE}, 0.0)
    assert kept == [0.3, 0.5, 0.6]


def test_weights_that_became_nan_are_not_kept(tmp_path):
    """The last gradients may be infinite where every loss was finite."""
    run = BrioRun(SimpleNamespace(max_steps=None, save_dir=tmp_path), World(0, 1, CPU))
    ranked, means = torch.nn.Linear(2, 1), Means(CPU)
    ranked.weight.data[0, 0] = float("nan")
    means.add(1.0, 2, *torch.ones(3))
    run.state = {"ranked": ranked, "means": means}
    assert not run.may_go_on()
    with pytest.raises(UserError, match=r"^weights became NaN or infinite in epoch 1\. Use a smaller --lr"):
        run.add_epoch(EPOCH, dict.fromkeys([f"val_{name}" for name in ROUGE], 0.3), 0.0)
    assert run.history == list(tmp_path.iterdir()) == []


def test_a_generator_that_another_script_trains_is_left_alone(run_script, encoders, sample_folder, tmp_path):
    (tmp_path / "brio").mkdir()
    with output_lock(tmp_path / "brio" / GENERATOR_LOCK):  # As finetune_model.py holds it.
        arguments = ["--generator_name", encoders["t5"], "--dataset", sample_folder, "--save_dir", "brio"]
        refused = run_script(SCRIPT, *arguments, "--num_workers", 0, cwd=tmp_path, code=2)
    assert "another run is writing" in refused.stderr
    assert [path.name for path in (tmp_path / "brio").iterdir()] == [GENERATOR_LOCK]


def test_a_profile_replaces_neither_record_nor_generator(run_script, encoders, sample_folder, tmp_path):
    """Not even one of so many steps that the run ends before."""
    folder = tmp_path / "brio"
    shutil.copytree(encoders["t5"], folder)
    (folder / "brio.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    common = ["--generator_name", encoders["t5"], "--dataset", sample_folder, "--save_dir", "brio"]
    for steps in (1, 1000):
        how = ["--num_epoch", 1, "--num_workers", 0, "--max_steps", steps]
        printed = run_script(SCRIPT, *common, *how, cwd=tmp_path).stdout
        (epoch,) = json.loads((folder / f"brio_{steps}_steps.json").read_text())["epochs"]
    mean = 100 * sum(epoch[f"val_{name}"] for name in ROUGE) / 3
    assert f"brio: best validation ROUGE {mean:.2f} (mean of the three)\n" in printed
    assert {path: path.read_bytes() for path in before} == before


def test_each_process_writes_its_share_and_the_best_candidate_counts(monkeypatch):
    asked = []

    def generate(generator, documents, *rest):
        asked.append([document.text for document in documents])
        return [{"rouge": np.array([[0.3, 0.2, 0.1], [0.9, 0.9, 0.9]])} for _ in documents]

    monkeypatch.setattr(ranked_generator, "generate_samples", generate)
    lengths = []
    monkeypatch.setattr(
        ranked_generator, "search_settings", lambda given, _: lengths.append(given.decoder_max_len) or {}
    )
    monkeypatch.setattr(ranked_generator, "CandidateGenerator", lambda *_: None)
    model = torch.nn.Linear(1, 1)
    model.generation_config = None
    samples = [{"article_untok": [str(number)], "abstract_untok": ["x"]} for number in range(5)]
    args = SimpleNamespace(num_cands=2, max_source_length=9, max_target_length=19, rouge_tokens="standard")
    others = torch.tensor([0.9, 0.6, 0.3])  # The sums of the other process, of three documents.
    world = SimpleNamespace(rank=1, size=2, device=CPU, sum=lambda sums: sums + others)
    found = ranked_generator.validate(RankedGenerator(model, None, 1.0), samples, args, world, stop=None)
    assert asked == [["1", "3"]]
    assert lengths == [20], "as long as in training, after the start token"
    assert found == pytest.approx({"val_rouge1": 0.3, "val_rouge2": 0.2, "val_rougeL": 0.1})


def test_means_are_over_documents_and_not_over_batches():
    means = Means(CPU)
    for weight, documents, loss in ((1.0, 3, 2.0), (1.0, 1, 6.0), (0.0, 3, 99.0)):
        means.add(weight, documents, *(torch.tensor(loss + place) for place in range(3)))
    world = World(0, 1, CPU)
    assert means.take(world) == {"loss": 3.0, "ranking_loss": 4.0, "cross_entropy": 5.0}
    means.add(1.0, 2, *torch.ones(3))
    assert means.take(world)["loss"] == 1.0  # The sums began anew.
