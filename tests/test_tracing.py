"""--trace: what is in the file, what is printed, and what happens where there is nothing to trace."""

import gzip
import json
import resource
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from harness import epoch_times, timing, tracing
from harness.endings import UserError

PHASES = {"data load", "data copy", "zero grad", "forward", "backward", "optimizer"}


@pytest.fixture
def train(run_script, pictures, tmp_path):
    options = ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 4]
    options += ["--num_worker", 0, "--num_epoch", 1, "--output_dir", tmp_path / "runs"]

    def run(*more, code=0):
        return run_script("resnext/resnext.py", *options, *more, cwd=tmp_path, code=code)

    return run


def test_a_trace_has_the_phases_of_some_steps_after_warm_up_and_their_operators(train, tmp_path):
    result = train("--trace", "traces/run.json.gz", "--max_steps", 12)
    events = json.loads(gzip.decompress((tmp_path / "traces" / "run.json.gz").read_bytes()))["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    counts = Counter(event["name"] for event in ranges if event["name"] in PHASES)
    assert counts == dict.fromkeys(PHASES, tracing.STEPS)
    steps = [event["name"] for event in ranges if " - step " in event["name"]]
    assert steps == [f"epoch 1 - step {epoch_times.WARMUP_STEPS + 1 + number}" for number in range(tracing.STEPS)]
    forward = next(event for event in ranges if event["name"] == "forward")
    inside = [event for event in events if event.get("name") == "aten::conv2d"
              and forward["ts"] <= event["ts"] <= forward["ts"] + forward["dur"]]  # fmt: skip
    assert len(inside) == 31  # The convolutions of one forward.
    lines = result.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("traced 5 steps: traces/run.json.gz"))
    table = lines[start + 2 : start + 2 + tracing.COSTLIEST]
    assert any(line.startswith("backward") and "convolution_backward" in line and "31.0" in line for line in table)
    assert not result.stderr
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["run.json.gz"]
    assert timing.watchers == []


def test_on_a_gpu_an_operator_has_the_time_of_its_kernels_once_and_the_phase_that_called_it():
    """The kernel of forward's convolution runs while the host is in backward, as the range over it tells."""

    def event(name, start, end, self_device=0.0, is_phase=False, on_gpu=False):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end), self_device_time_total=self_device,
            is_user_annotation=is_phase, device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
        )  # fmt: skip

    events = [
        event("epoch 2", -1, 50, is_phase=True), event("epoch 2 - step 7", 0, 21, is_phase=True),
        event("forward", 0, 10, is_phase=True), event("aten::conv2d", 2, 3, self_device=3000.0),
        event("backward", 10, 20, is_phase=True), event("forward", 11, 15, is_phase=True, on_gpu=True),
        event("conv_kernel", 12, 15, self_device=3000.0, on_gpu=True),
        event("aten::convolution_backward", 13, 14, self_device=1000.0),
        event("validation", 25, 40, is_phase=True), event("aten::conv2d", 30, 31, self_device=9000.0),  # In no step.
    ]  # fmt: skip
    # The order is that of their start; a GPU's phase may come first.
    for listed in (events, sorted(events, key=lambda each: each.device_type == DeviceType.CPU)):
        _, *rows = tracing.costliest(listed, torch.device("cuda"))
        assert [row.split() for row in rows] == [
            ["forward", "aten::conv2d", "3.000", "75.0%", "1.0"],
            ["backward", "aten::convolution_backward", "1.000", "25.0%", "1.0"],
        ]


def test_a_run_that_is_too_short_says_so(train, tmp_path):
    assert "no trace: the run has fewer than 6 steps" in train("--trace", "run.json", "--max_steps", 3).stdout
    assert not (tmp_path / "run.json").exists()


def test_a_run_that_ends_within_the_traced_steps_counts_those_that_it_has(train):
    lines = train("--trace", "run.json", "--max_steps", 7).stdout.splitlines()
    assert "traced 2 steps: run.json" in lines
    assert any(
        line.startswith("backward") and "convolution_backward" in line and line.endswith("31.0") for line in lines
    )


def test_a_name_that_no_viewer_opens_is_refused(train):
    assert "must end with .json" in train("--trace", "run.txt", code=2).stderr


@pytest.mark.parametrize("path", ["folder.json", "/proc/run.json"])
def test_a_trace_that_could_not_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=f"--trace {path}"), tracing.trace(path, torch.device("cpu"), print):
        pytest.fail("It has begun.")


@pytest.mark.parametrize(("name", "content"), [("mine.json", b'{"precious": 1}'), ("mine.json.gz", b"no gzip")])
def test_what_is_no_trace_is_not_replaced(name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="already exists and is not a trace"):
        trace_seven_steps(name)
    assert (tmp_path / name).read_bytes() == content


def test_a_snapshot_of_memory_that_no_trace_made_is_not_replaced(tmp_path):
    (tmp_path / "mine.memory.pickle").write_bytes(b"precious")
    for name in ("mine.json", "mine.json.gz"):
        with (
            pytest.raises(UserError, match="mine.memory.pickle, which is written next to it, already exists"),
            tracing.trace(tmp_path / name, torch.device("cuda"), print),
        ):
            pytest.fail("It has begun.")


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_a_trace_is_replaced_and_without_room_for_it_there_is_a_warning(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace_seven_steps(name)
    assert trace_seven_steps(name)[0] == f"traced 2 steps: {name}"
    before = (tmp_path / name).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # Stands in for a full disk.
    try:
        lines = trace_seven_steps(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert lines[0] == f"warning: no trace: cannot write {name}; its disk may be full"
    assert any("aten::ones" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


def trace_seven_steps(path):
    """Of a loop without a model: what is said of its trace."""
    said, phase = [], timing.PhaseTimer(torch.device("cpu"))
    with tracing.trace(path, torch.device("cpu"), said.append):
        phase.start_epoch()
        for _ in phase.steps(range(7), "epoch 1"):
            with phase("forward"):
                torch.ones(9)
            phase.end_step()
        phase.end_epoch()
    return said
