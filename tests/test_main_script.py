"""main.py, run as a user runs it."""

import functools
import json
import os
import re
import shutil
import subprocess
import time

import launch
import pytest
import tiny_inputs
import torch
from conftest import script_command
from transformers import AutoModel

MAIN = "SimCLS/main.py"
NAME = "simcls_0_worker"


@pytest.fixture(scope="module")
def tiny(sample_folder, encoders):
    """The arguments of a run of 11 steps, 4 updates and a validation in the middle an epoch, with dropout."""
    return ["--dataset", sample_folder, "--model_type", encoders["bert"], "--num_workers", 0, "--num_epoch", 2,
            "--batch_size", 4, "--accumulate_step", 3, "--lr", 0.002, "--eval_freq", 2,
            "--total_len", 60, "--max_len", 20, "--dropout", 0.1]  # fmt: skip


@pytest.fixture(scope="module")
def baseline(run_script, tiny, tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("baseline")
    return folder, run_script(MAIN, *tiny, "-l", cwd=folder).stdout


def record_of(folder, name=NAME):
    return json.loads((folder / "cache" / name / f"{name}.json").read_text())


def assert_same_results(one, other, other_name=NAME):
    for file in ("scorer.bin", "model.bin"):
        weights, others = (
            torch.load(each) for each in (one / f"cache/{NAME}/{file}", other / f"cache/{other_name}/{file}")
        )
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights), file
    history, other_history = ([epoch_results(epoch) for epoch in record_of(*each)["epochs"]]
                              for each in ((one,), (other, other_name)))  # fmt: skip
    assert history == other_history


def epoch_results(epoch):
    times = ("timing", "samples_per_second", "peak_memory", "elapsed_seconds", "evaluation_seconds")
    return {key: value for key, value in epoch.items() if key not in times}


def test_files_of_a_run(baseline):
    folder, printed = baseline
    files = {path.name.split(".tfevents")[0] for path in (folder / "cache" / NAME).iterdir()}
    assert files == {"scorer.bin", "model.bin", "scorer.json", "config.json", "log.txt", "events.out",
                     f"{NAME}.json", f"{NAME}.lock"}  # fmt: skip
    weights = torch.load(folder / "cache" / NAME / "scorer.bin", weights_only=True)
    assert all(key.startswith("encoder.") for key in weights)
    assert (folder / "cache" / NAME / "log.txt").read_text() in printed
    assert (
        "12 validation documents with up to 6 candidates; documents are cut to 60 tokens, candidates to 20" in printed
    )
    assert "bert, 32,064 parameters, fp32, on cpu (" in printed
    last = record_of(folder)["epochs"][-1]["validations"][-1]
    shown = [", ".join(f"{100 * last[f'{whose}_rouge{kind}']:.2f}" for kind in "12L") for whose in ("val", "first")]
    line = next(line for line in reversed(printed.splitlines()) if "first candidates" in line)
    assert re.sub(r"rouge. |rougeL ", "", line.partition(", ")[2]).startswith("; first candidates ".join(shown))
    assert printed.count("validation loss") == 4
    assert printed.count("(best)") >= 1


def test_record(baseline):
    record = record_of(baseline[0])
    assert record["experiment"] == "simcls"
    assert record["precision"] == "fp32"
    assert record["saved_activation_bytes"] > 0
    assert record["parameters"] > 0
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2]
    first = record["epochs"][0]
    assert [point[0] for point in first["losses"]] == [1, 2, 3, 4]
    assert [each["update"] for each in first["validations"]] == [2, 4]
    assert {"loss", "val_loss", "val_rouge1", "val_rouge2", "val_rougeL", "samples_per_second"} <= first.keys()
    assert first["loss"] == pytest.approx(
        sum(w * point[1] for w, point in zip((12, 12, 12, 8), first["losses"], strict=True)) / 44
    )
    phases = first["timing"]["phases"]
    assert {"data load", "data copy", "zero grad", "forward", "backward", "optimizer", "step", "validation"} == set(
        phases
    )
    # Of the second epoch, since no warm-up is left out of it.
    batches, updates = 11, len(record["epochs"][1]["losses"])
    phases = record["epochs"][1]["timing"]["phases"]
    assert [phases[name]["count"] for name in ("step", "forward", "backward")] == [batches] * 3
    assert [phases[name]["count"] for name in ("zero grad", "optimizer")] == [updates] * 2


@pytest.mark.parametrize("extra", [["--num_workers", 2], ["--use_checkpoint"], ["--memory_budget", 0.75]])
def test_workers_and_recomputation_change_no_result(run_script, tiny, baseline, tmp_path, extra):
    printed = run_script(MAIN, *tiny, *extra, "--run_name", "other", cwd=tmp_path).stdout
    assert_same_results(baseline[0], tmp_path, "other")
    plain, ours = record_of(baseline[0]), record_of(tmp_path, "other")
    if "--num_workers" not in extra:
        effect = re.search(r"\nkept from .*: (\S+) MiB, without recomputation about (\S+) ", printed)
        kept, without = (float(figure) * 2**20 for figure in effect.groups())
        assert kept == pytest.approx(ours["saved_activation_bytes"], abs=0.05 * 2**20)
        assert without == pytest.approx(plain["saved_activation_bytes"], rel=0.15)
    if "--memory_budget" in extra:
        assert ours["plan"]["peak_share"] <= 0.75
        assert ours["saved_activation_bytes"] < 0.8 * plain["saved_activation_bytes"]


def test_half_precision_and_profiling(run_script, tiny, tmp_path):
    result = run_script(MAIN, *tiny, "--half_precision", "True", "--max_steps", 4, cwd=tmp_path)
    name = f"{NAME}_fp16_4_steps"
    assert "half precision on a CPU is bfloat16" in result.stdout
    record = record_of(tmp_path, name)
    assert record["precision"] == "bf16"
    assert record["epochs"][0]["timing"]["steps"] == 4
    assert not (tmp_path / "cache" / name / "scorer.bin").exists()


def test_weights_go_on_and_are_evaluated(run_script, tiny, baseline, sample_folder):
    folder = baseline[0]
    command = ["-e", "--dataset", sample_folder, "--model_pt", f"{NAME}/scorer.bin"]
    result = run_script(MAIN, *command, "--num_epoch", 7, "--resume", cwd=folder)
    assert "warning: -e ignores arguments of training: --resume, --num_epoch\n" in result.stderr
    systems = json.loads((folder / f"cache/{NAME}/evaluation.json").read_text())["systems"]
    assert systems["best"]["rouge1"]["mean"] > systems["SimCLS"]["rouge1"]["mean"] > 0
    own = run_script("SimCLS/evaluate_model.py", "--samples", sample_folder / "test", "--scorer_path",
                     f"cache/{NAME}/scorer.bin", "--output", "own.json", cwd=folder)  # fmt: skip
    assert result.stdout == own.stdout
    again = run_script(MAIN, *tiny, "--model_pt", f"{NAME}/model.bin", "--run_name", NAME, "--max_steps", 1, cwd=folder)
    assert f"stopped after 1 steps: cache/{NAME}_1_steps/{NAME}_1_steps.json" in again.stdout
    assert len(record_of(folder)["epochs"]) == 2  # Profiling has not touched it.


def test_lengths_of_the_weights_are_those_of_what_follows(tiny, baseline, sample_folder, encoders):
    folder, weights = baseline[0], ["--model_pt", f"{NAME}/scorer.bin"]
    more = ["--dataset", sample_folder, "--num_workers", 0, "--max_steps", 1, "--run_name", "more"]
    assert launch.run(MAIN, *more, *weights, "--max_len", 30, cwd=folder).code == 0
    arguments = record_of(folder, "more_1_steps")["arguments"]
    assert (arguments["total_len"], arguments["max_len"]) == (60, 30)
    own = ["SimCLS/evaluate_model.py", "--samples", sample_folder / "test", "--scorer_path", f"cache/{NAME}/scorer.bin"]
    scored = [MAIN, "-e", "--dataset", sample_folder, *weights]  # Which starts a new interpreter.
    tables = []
    for command in (own, [*own, "--total_len", 60, "--max_len", 20], [*scored, "--total_len", 10, "--max_len", 5]):
        (folder / f"cache/{NAME}/evaluation.json").unlink(missing_ok=True)  # No evaluation replaces another one.
        ended = launch.run(*command, cwd=folder)
        assert ended.code == 0, ended.err
        tables.append(ended.out.splitlines()[-7:])
    assert tables[0] == tables[1] != tables[2]
    description = json.loads((folder / f"cache/{NAME}/scorer.json").read_text())
    assert description["candidates"] == 6
    assert json.loads((folder / f"cache/{NAME}/evaluation.json").read_text())["training"] == description["training"]


def test_scorers_that_differ_only_in_the_seed_are_told_from_others(tiny, tmp_path):
    learnt = []
    for name, more in (("a", []), ("b", ["--seed", 1, "--num_workers", 2]), ("c", ["--lr", 0.001])):
        assert launch.run(MAIN, *tiny, "--num_epoch", 1, *more, "--run_name", name, cwd=tmp_path).code == 0
        learnt.append(json.loads((tmp_path / f"cache/{name}/scorer.json").read_text())["training"])
    assert learnt[0] == learnt[1] != learnt[2]


def test_a_diverged_run_keeps_no_weights_that_are_not_finite(tiny, tmp_path):
    ended = launch.run(MAIN, *tiny, "--lr", 1e30, cwd=tmp_path)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "the loss became nan in epoch 1" in line
    assert "smaller --lr (the peak is 1.0e+30)" in line
    left = {path.name for path in (tmp_path / "cache" / NAME).iterdir()}
    assert left == {"config.json", f"{NAME}.lock"}


def test_an_encoder_that_keeps_all_activations(tiny, tmp_path):
    from transformers import AlbertConfig, AlbertModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    AlbertModel(AlbertConfig(vocab_size=400, embedding_size=16, **size)).save_pretrained(tmp_path / "albert")
    tiny_inputs.make_tokenizer("bert").save_pretrained(tmp_path / "albert")
    for flags, words in (
        (["--use_checkpoint"], "--use_checkpoint: transformers cannot recompute the activations of the encoder"),
        (["--memory_budget", 0.5], "--memory_budget supports encoders of the BERT family and T5, not albert"),
    ):
        ended = launch.run(MAIN, *tiny, "--model_type", "albert", *flags, cwd=tmp_path)
        assert ended.code == 2
        (line,) = ended.err.splitlines()
        assert words in line
        assert "tokenizing" not in ended.out


def test_frozen_layers_keep_their_weights_over_a_run_that_was_stopped(tiny, encoders, tmp_path):
    frozen = functools.partial(launch.run, MAIN, *tiny, "--frozen_layers", 1, cwd=tmp_path)
    assert frozen(before=STOP_IN_STEP.format(8)).code == 143
    ended = frozen("--resume")
    assert ended.code == 0, ended.err
    name = f"{NAME}_frozen1"
    old = AutoModel.from_pretrained(encoders["bert"]).state_dict()
    new = torch.load(tmp_path / "cache" / name / "model.bin")
    changed = {key for key, value in new.items() if not torch.equal(value, old[key.removeprefix("encoder.")])}
    assert changed == {key for key in new if ".layer.1." in key}
    learning = sum(new[key].numel() for key in changed)
    assert record_of(tmp_path, name)["learning_parameters"] == learning
    assert f"32,064 parameters ({learning:,} learn: --frozen_layers 1), fp32" in ended.out
    ended = launch.run(MAIN, *tiny, "--frozen_layers", 2, cwd=tmp_path)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "the encoder has 2 layers, and one must learn; give a smaller number" in ended.err


def test_each_batch_can_be_an_update(tiny, tmp_path):
    ended = launch.run(MAIN, *tiny, "--accumulate_step", 1, "--eval_freq", 7, cwd=tmp_path)
    assert ended.code == 0, ended.err
    first, second = record_of(tmp_path)["epochs"]
    assert [each["update"] for each in (*first["validations"], *second["validations"])] == [7, 11, 14, 21, 22]
    assert [update for update, _ in second["losses"]] == list(range(12, 23))


def test_a_finished_run_whose_scorer_is_gone_is_not_called_finished(tiny, baseline, tmp_path):
    shutil.copytree(baseline[0], tmp_path, dirs_exist_ok=True)
    assert "nothing to resume" in launch.run(MAIN, *tiny, "--resume", cwd=tmp_path).out
    (tmp_path / "cache" / NAME / "scorer.bin").unlink()
    ended = launch.run(MAIN, *tiny, "--resume", cwd=tmp_path)
    assert ended.code == 2
    assert "scorer.bin is gone, and no" in ended.err


def test_a_finished_run_on_samples_that_were_edited_since_is_not_called_finished(tiny, sample_folder, tmp_path):
    samples = shutil.copytree(sample_folder, tmp_path / "samples")
    run = functools.partial(launch.run, MAIN, *tiny, "--num_epoch", 1, "--dataset", samples, cwd=tmp_path)
    assert run().code == 0
    assert "nothing to resume" in run("--resume").out
    sample = json.loads((samples / "train/0.json").read_text())
    for name in ("candidates", "candidates_untok"):  # Of the same size: only their contents tell.
        sample[name][0][1], sample[name][-1][1] = sample[name][-1][1], sample[name][0][1]
    (samples / "train/0.json").write_text(json.dumps(sample))
    ended = run("--resume")
    assert (ended.code, "has other contents than when the run in" in ended.err) == (2, True), ended.err


# ------------------------------------------------------------------------------------------ stopping and going on


def start(folder, *args):
    command = script_command(MAIN, *args)
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_second_run_and_other_arguments_are_refused(run_script, tiny, tmp_path):
    process = start(tmp_path, *tiny, "--num_epoch", 200)
    while not process.stdout.readline().startswith("epoch 1/200"):
        time.sleep(0)
    second = run_script(MAIN, *tiny, cwd=tmp_path, code=2)
    process.kill()
    process.wait()
    assert "another run is writing" in second.stderr
    refused = run_script(MAIN, *tiny, "--resume", cwd=tmp_path, code=2)
    assert "--num_epoch 200 (now 2)" in refused.stderr


# SIGTERM during a step, of those that this process has made.
STOP_IN_STEP = f"""
import os, signal, sys
sys.path[:0] = [{str(launch.ROOT / "SimCLS")!r}, {str(launch.ROOT)!r}]
from data_utils import LengthBatches
weight, seen = LengthBatches.weight, []
def spy(self, number):
    seen.append(number)
    if len(seen) == {{}}: os.kill(os.getpid(), signal.SIGTERM)
    return weight(self, number)
LengthBatches.weight = spy
"""


def test_a_run_goes_on_with_other_workers_but_with_no_other_samples(tiny, baseline, sample_folder, tmp_path):
    samples = shutil.copytree(sample_folder, tmp_path / "samples")
    run = functools.partial(launch.run, MAIN, *tiny, "--dataset", samples, cwd=tmp_path)
    stopped = run("--num_workers", 2, before=STOP_IN_STEP.format(8))
    assert stopped.code == 143, stopped.err
    there = tmp_path / "cache/simcls_2_worker"
    (samples / "val/0.json").write_bytes((sample_folder / "val/0.json").read_bytes() + b"\n")
    for workers, line in ((2, "is from a run with --samples_digest"), (0, "starting from the beginning")):
        ended = run("--num_workers", workers, "--resume", before=STOP_IN_STEP.format(1))
        assert (ended.code, line in ended.err + ended.out) == ({2: 2, 0: 143}[workers], True), ended.err
    shutil.rmtree(tmp_path / "cache" / NAME)
    (samples / "val/0.json").write_bytes((sample_folder / "val/0.json").read_bytes())
    # Of the same size: only their contents tell.
    text = (sample_folder / "train/0.json").read_text()
    sample = json.loads(text)
    for name in ("candidates", "candidates_untok"):
        best, worst = (choice(sample[name], key=lambda each: each[1]) for choice in (max, min))
        best[1], worst[1] = worst[1], best[1]
    (samples / "train/0.json").write_text(json.dumps(sample))
    ended = run("--num_workers", 2, "--resume")
    assert (ended.code, "has other contents than when the run in" in ended.err) == (2, True), ended.err
    (samples / "train/0.json").write_text(text)
    # It has the other run's weights, of which no later ones may be better.
    assert f"resuming from {there.relative_to(tmp_path)}" in run("--resume", before=STOP_IN_STEP.format(1)).out
    assert (there / "scorer.bin").read_bytes() == (tmp_path / "cache" / NAME / "scorer.bin").read_bytes()
    assert run("--resume").code == 0
    assert_same_results(baseline[0], tmp_path)
    assert record_of(tmp_path)["continues"] == there.name


# ------------------------------------------------------------------------------------------------ many processes


def test_two_processes_learn_as_one(run_script, tiny, encoders, tmp_path):
    tiny = [*tiny, "--model_type", encoders["t5"], "--dropout", 0]  # Whose masks differ between processes.
    run_script(MAIN, *tiny, cwd=tmp_path)
    result = run_script(MAIN, *tiny, "--run_name", "two", "--gpuid", 0, 1, cwd=tmp_path)
    one, two = record_of(tmp_path), record_of(tmp_path, "two")
    assert two["arguments"]["processes"] == 2
    for epoch, other in zip(one["epochs"], two["epochs"], strict=True):
        for key in ("loss", "val_loss", "val_rouge1"):
            assert other[key] == pytest.approx(epoch[key], rel=2e-3)
        assert [update for update, _ in other["losses"]] == [update for update, _ in epoch["losses"]]
    assert result.stdout.count("epoch 2/2") == 1


def test_runs_from_any_folder_as_a_script_of_its_own(run_script, tmp_path):
    assert "--model_pt" in run_script(MAIN, "--help", cwd=tmp_path).stdout
    assert os.listdir(tmp_path) == []
