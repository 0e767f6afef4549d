"""resnext.py and resnext_checkpoint.py, run as a user runs them."""

import json
import re
import subprocess
import sys

import launch
import numpy as np
import pytest
import torch
from conftest import ROOT, script_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reporting.records import read_folders

pytestmark = pytest.mark.slow

BASELINE, CHECKPOINT = "resnext/resnext.py", "resnext/resnext_checkpoint.py"
NAME = "resnext_0_worker_8_resnext29_1x4d_folder"
ENDS = (".json", ".lock", ".npz", ".pt", ".state")


@pytest.fixture(scope="module")
def tiny(pictures):
    """The arguments of a run of 6 steps an epoch, the last of 4 pictures."""
    return ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 8,
            "--num_worker", 0, "--num_epoch", 2, "--lr", 0.002, "--save_every", 0]  # fmt: skip


@pytest.fixture(scope="module")
def baseline(run_script, tiny, tmp_path_factory):
    """The folder of a finished baseline run, and what it printed."""
    folder = tmp_path_factory.mktemp("baseline")
    return folder, run_script(BASELINE, *tiny, cwd=folder).stdout


def assert_same_results(one, other, name=NAME, other_name=None):
    other_name = other_name or name
    weights, others = (torch.load(folder / f"{each}.pt") for folder, each in ((one, name), (other, other_name)))
    assert weights.keys() == others.keys()
    for key in weights:
        assert torch.equal(weights[key], others[key]), key
    curves, other_curves = (np.load(folder / f"{each}.npz") for folder, each in ((one, name), (other, other_name)))
    for key in ("loss", "acc", "test_acc"):
        assert np.array_equal(curves[key], other_curves[key]), key


def test_files_of_a_run(baseline):
    folder, printed = baseline
    history = folder / "model_history"
    assert sorted(path.name for path in history.iterdir()) == [f"{NAME}{end}" for end in ENDS]
    weights = torch.load(history / f"{NAME}.pt", weights_only=True)
    assert "layer1.0.shortcut.0.weight" in weights
    assert not any(key.startswith("module.") for key in weights)
    curves = np.load(history / f"{NAME}.npz", allow_pickle=False)
    assert [curves[key].shape for key in ("loss", "acc", "test_acc")] == [(2,)] * 3
    assert curves["loss"][1] < curves["loss"][0]
    pictures, what, techniques, *epochs, files, kept = printed.splitlines()
    assert pictures == "44 training and 10 test images of 2 classes (dark, light), resized to 32x32"
    parameters = sum(weight.numel() for name, weight in weights.items() if not re.search("running|tracked", name))
    assert what.startswith(f"resnext29_1x4d, {parameters:,} parameters, fp32, contiguous (convolutions: groups), not ")
    assert what.endswith("; 6 steps of 8 images per epoch")
    assert "on cpu (" in what
    assert techniques.startswith("images loaded without workers; half precision off (")
    assert "; recomputation off (resnext_checkpoint.py); " in techniques
    record = json.loads((history / f"{NAME}.json").read_text())
    assert kept == f"kept from forward to backward: {record['saved_activation_bytes'] / 2**20:.1f} MiB"
    assert [line.split(":")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert epochs[0].startswith(f"epoch 1/2: loss {curves['loss'][0]:.4f}, acc {curves['acc'][0]:.2f} %")
    assert files.startswith(f"model_history/{NAME}.pt")


def test_record_describes_itself(baseline):
    record = json.loads((baseline[0] / "model_history" / f"{NAME}.json").read_text())
    assert record["arguments"]["lr"] == 0.002
    assert record["precision"] == "fp32"
    assert record["machine"]["device"] == "cpu"
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert record["saved_activation_bytes"] > 8 * 1024 * 64 * 4
    for epoch in record["epochs"]:
        timing = epoch["timing"]
        assert timing["steps"] == 6
        phases = timing["phases"]
        assert set(phases) == {"step", "data load", "data copy", "zero grad", "forward", "backward", "optimizer"}
        parts = sum(phase["host_ms"]["total"] for name, phase in phases.items() if name != "step")
        assert parts <= phases["step"]["host_ms"]["total"] <= 1e3 * timing["seconds"]
        assert phases["forward"]["device_ms"] is None
    assert record["epochs"][0]["timing"]["warmup_steps"] == 5
    assert record["epochs"][1]["timing"]["warmup_steps"] == 0


@pytest.mark.parametrize(
    "extra", [["--policy", "block"], ["--memory_budget", 0.8], []], ids=["block", "budget", "default"]
)
def test_checkpointing_gives_the_same_run(run_script, tiny, baseline, tmp_path, extra):
    result = run_script(CHECKPOINT, *tiny, *extra, "--output_dir", tmp_path)
    ends = {"--policy": "_block", "--memory_budget": "_budget0.8"}
    suffix = "_checkpoint" + (ends[extra[0]] if extra else "")
    assert_same_results(baseline[0] / "model_history", tmp_path, NAME, NAME + suffix)
    plain, ours = (json.loads(path.read_text()) for path in
                   (baseline[0] / "model_history" / f"{NAME}.json", tmp_path / f"{NAME}{suffix}.json"))  # fmt: skip
    saved, plainly = ours["saved_activation_bytes"], plain["saved_activation_bytes"]
    assert saved < 0.8 * plainly
    effect = result.stdout.splitlines()[-1]
    planned = f" (planned {saved / 2**20:.1f})" * ("--memory_budget" in extra)
    assert effect.partition(";")[0] == (
        f"kept from forward to backward: {saved / 2**20:.1f} MiB{planned}, without recomputation "
        f"{plainly / 2**20:.1f} ({saved / plainly:.2f} x)"
    )
    if "--memory_budget" in extra:
        assert saved == pytest.approx(ours["plan"]["held_bytes"], rel=0.01)
        assert "plan: peak" in result.stdout
        assert effect.endswith(f"by recomputing {len(ours['plan']['redo'])} operations")
        (line,) = (line for line in result.stdout.splitlines() if line.startswith("measured: peak"))
        measured = ours["measured"]
        assert measured["held_bytes"] == saved
        assert measured["extra_flops"] == ours["plan"]["extra_flops"]
        assert measured["peak_bytes"] == pytest.approx(ours["plan"]["peak_bytes"], rel=0.01)
        assert measured["peak_bytes"] <= 0.81 * ours["plan"]["plain_peak_bytes"]
        assert line.count("(planned ") == 3


def test_workers_and_device_loading_change_no_result(run_script, tiny, baseline, tmp_path):
    run_script(BASELINE, *tiny, "--num_worker", 2, "--output_dir", tmp_path)
    run_script(BASELINE, *tiny, "--loader", "device", "--output_dir", tmp_path)
    for loading in ("2_worker", "device"):
        other = NAME.replace("0_worker", loading)
        assert_same_results(baseline[0] / "model_history", tmp_path, NAME, other)


def test_half_precision_on_a_cpu_is_bfloat16_and_says_so(run_script, tiny, tmp_path):
    result = run_script(BASELINE, *tiny, "--num_epoch", 1, "--half_precision", "--output_dir", tmp_path)
    assert "half precision on a CPU is bfloat16" in result.stdout
    record = json.loads((tmp_path / f"{NAME}_fp16.json").read_text())
    assert record["precision"] == "bf16"
    run_script(BASELINE, *tiny, "--num_epoch", 1, "--half_precision", "False", "--output_dir", tmp_path)
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["precision"] == "fp32"


def test_max_steps_writes_the_timings_alone(run_script, tiny, tmp_path):
    run_script(BASELINE, *tiny, "--max_steps", 8, "--output_dir", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{NAME}_8_steps.json", f"{NAME}_8_steps.lock"}
    record = json.loads((tmp_path / f"{NAME}_8_steps.json").read_text())
    assert [epoch["timing"]["steps"] for epoch in record["epochs"]] == [6, 2]


NVTX_SPY = """
import nvtx
nvtx.push_range = lambda name: print("push", name)
nvtx.pop_range = lambda: print("pop")
"""


def test_nvtx_ranges(tiny, tmp_path):
    ended = launch.run(BASELINE, *tiny, "--num_epoch", 1, "--output_dir", ".", cwd=tmp_path, before=NVTX_SPY)
    assert ended.code == 0, ended.err
    stack, seen = [], []
    for line in ended.out.splitlines():
        if line.startswith("push "):
            stack.append(line[5:])
            seen.append(tuple(stack))
        elif line == "pop":
            stack.pop()
    assert stack == []
    step = ("training resnext", "epoch 1", "epoch 1 - step 3")
    inside = [path[3:] for path in seen if path[:3] == step and len(path) == 4]
    assert [name for (name,) in inside if name != "step"] == [
        "data load", "data copy", "zero grad", "forward", "backward", "optimizer"]  # fmt: skip
    assert ("training resnext", "validation") in seen


# ---------------------------------------------------------------------- stopping and going on


def start(tmp_path, *args):
    command = script_command(BASELINE, *args, "--output_dir", tmp_path)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


STOP_IN_STEP = """
from harness import loading
weight, sent = loading.EpochBatches.weight, []
def spy(self, number):
    if number == 3 and not sent: sent.append(os.kill(os.getpid(), signal.SIGTERM))
    return weight(self, number)
loading.EpochBatches.weight = spy
"""
KILL_IN_LAST_STEP = """
from harness import loading
weight = loading.EpochBatches.weight
def spy(self, number):
    if number == 5: os.kill(os.getpid(), signal.SIGKILL)
    return weight(self, number)
loading.EpochBatches.weight = spy
"""
STOP_IN_EVALUATION = """
import image_loaders
batches = image_loaders.evaluation_batches
def spy(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return batches(*args)
image_loaders.evaluation_batches = spy
"""
STOP_AFTER_LAST_SAVE = """
from harness import runs
runs.Run.write_record = lambda self: os.kill(os.getpid(), signal.SIGKILL)
"""
NAN_THEN_STOP = """
import experiment
add = experiment.Metrics.add
def spy(self, loss, *rest):
    spy.calls += 1
    if spy.calls == 9: os.kill(os.getpid(), signal.SIGTERM)
    return add(self, loss * float("nan") if spy.calls > 6 else loss, *rest)
spy.calls = 0
experiment.Metrics.add = lambda self, *args: spy(self, *args)
experiment.evaluate = lambda model, *rest: None if rest[-1] else 50.0
"""


def run_changed(change, script, *args):
    """The ended Script that ran after the Python code `change`."""
    before = f"import os, signal, sys; sys.path.insert(1, {str(ROOT)!r})\n{change}"
    return launch.run(script, *args, cwd=ROOT, before=before)


@pytest.mark.parametrize(
    ("change", "code", "position"),
    [
        (STOP_IN_STEP, 143, (0, 4)),
        (KILL_IN_LAST_STEP, -9, (0, 5)),
        (STOP_IN_EVALUATION, 143, (0, 6)),
        (STOP_AFTER_LAST_SAVE, -9, (2, 0)),
    ],
    ids=["in a step", "killed in a smaller step", "in evaluation", "between the files of the record"],
)
def test_stopped_and_resumed_is_bit_equal(run_script, tiny, baseline, tmp_path, change, code, position):
    args = [*tiny, "--memory_budget", 0.8, "--output_dir", tmp_path, "-l"]
    stopped = run_changed(change, CHECKPOINT, *args)
    assert stopped.code == code, stopped.err
    name = f"{NAME}_checkpoint_budget0.8"
    state = torch.load(tmp_path / f"{name}.state", weights_only=True)["parts"]
    assert (state["epoch"], state["step"]) == position
    (tmp_path / f".{name}.pt.abandoned.tmp").write_text("half a file")
    run_script(CHECKPOINT, *args, "--resume")
    assert_same_results(baseline[0] / "model_history", tmp_path, NAME, name)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    # Of a full batch, whatever step the resumed run began with.
    assert record["saved_activation_bytes"] == pytest.approx(record["plan"]["held_bytes"], rel=0.01)
    assert record["measured"]["held_bytes"] == record["saved_activation_bytes"]
    assert not list(tmp_path.glob(".*.tmp"))
    assert len(read_folders([tmp_path])[0]) == 1
    epochs = [line[:9] for line in (tmp_path / name / "log.txt").read_text().splitlines() if line.startswith("epoch")]
    assert epochs == ["epoch 1/2", "epoch 2/2"]
    events, curves = EventAccumulator(str(tmp_path / name)).Reload(), np.load(tmp_path / f"{name}.npz")
    for key in ("loss", "acc", "test_acc"):
        assert [event.step for event in events.Scalars(key)] == [1, 2]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(curves[key], rel=1e-6)
    others = {"samples_per_second", "rate", "memory/kept_MiB", "milliseconds/forward", "milliseconds/step"}
    assert others <= set(events.Tags()["scalars"])
    refused = run_script(CHECKPOINT, *args, "--resume", "--lr", 0.5, code=2)
    assert "--lr 0.002 (now 0.5)" in refused.stderr


def test_a_stop_after_the_loss_became_nan_keeps_the_last_good_state(tiny, tmp_path):
    stopped = run_changed(NAN_THEN_STOP, BASELINE, *tiny, "--output_dir", tmp_path)
    assert stopped.code == 143, stopped.err
    state = torch.load(tmp_path / f"{NAME}.state", weights_only=True)["parts"]
    assert (state["epoch"], state["step"]) == (1, 0)


def test_a_second_run_with_the_same_output_is_refused(run_script, tiny, tmp_path):
    process = start(tmp_path, *[*tiny, "--num_epoch", 200])
    while not process.stdout.readline().startswith("epoch 1/200"):
        assert process.poll() is None
    second = run_script(BASELINE, *tiny, "--output_dir", tmp_path, code=2)
    process.kill()
    process.wait()
    assert "another run is writing" in second.stderr


def test_non_finite_loss_stops_with_one_line_and_keeps_the_state(run_script, tiny, tmp_path):
    result = run_script(BASELINE, *tiny, "--lr", 1e30, "--output_dir", tmp_path, code=2)
    assert result.stderr.count("\n") == 1
    assert "the loss became" in result.stderr
    assert not list(tmp_path.glob("*.pt"))
    assert not list(tmp_path.glob("*.json"))


# ---------------------------------------------------------------------- many processes


def test_torchrun_ends_with_one_set_of_files(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               ROOT / BASELINE, *tiny, "--output_dir", tmp_path]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 2/2") == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"{NAME}{end}" for end in ENDS}
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert record["arguments"]["processes"] == 2
    assert not any(key.startswith("module.") for key in torch.load(tmp_path / f"{NAME}.pt"))


DDP_CHECK = """
import sys; sys.path[:0] = sys.argv[1:3]
import torch, torch.nn as nn, torch.distributed as dist
from harness import distributed
from harness.loading import EpochBatches
from models.resnext import ResNeXt

images, labels = torch.randn(21, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(21) % 10

def gradients(model, wrap, rank, size):
    batches = EpochBatches(21, 8, seed=0, rank=rank, world_size=size)
    parallel, found = wrap(model), []
    for number, index in enumerate(batches.batches()):
        model.zero_grad()
        (nn.functional.cross_entropy(parallel(images[index]), labels[index]) * batches.weight(number)).backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    return torch.stack(found)

with distributed.world(torch.device("cpu")) as world:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10))
    alone = gradients(plain, lambda model: model, 0, 1)
    shared = gradients(plain, world.wrap, world.rank, world.size)
    assert (alone - shared).abs().max() < 1e-6, (alone - shared).abs().max()
    model = ResNeXt(1, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    parallel = world.wrap(model)
    for _ in range(3):
        index = torch.arange(world.rank, 8, world.size)
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(images[index]), labels[index]).backward()
        optimizer.step()
    mine = torch.cat([weight.flatten() for weight in model.parameters()])
    main = mine.clone(); dist.broadcast(main, src=0)
    assert torch.equal(mine, main)
    total = world.sum(torch.tensor([1.0 + world.rank]))
    assert total == 3
"""


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(DDP_CHECK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script, ROOT,
               ROOT / "resnext"]  # fmt: skip
    for _ in range(2):  # Once in many times a thread of gloo's outlives a process that is done, and torch aborts it.
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        if "terminate called without an active exception" not in result.stderr:
            break
    assert result.returncode == 0, result.stderr
