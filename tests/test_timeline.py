"""report.py --timeline: what it reads of hand-made traces of a GPU and of a CPU, and of one as --trace writes it, which
another program reads alike."""

import gzip
import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from run_records import read_table

from harness import epoch_times, timing, tracing
from reporting import timeline


def event(category, name, begin, end, **args):
    """A complete event as torch.profiler exports it; begin, end: milliseconds."""
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": args.pop("tid", 1), "ts": 1e3 * begin,
            "dur": 1e3 * (end - begin), "args": args}  # fmt: skip


def write(path, events, **more):
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events, **more}).encode()))
    return path


def step_ranges(number, begin):
    """A step of 10 ms on the host: 4 of loading, 2 of forward, 1 of backward, 1 of the optimizer, 2 of nothing."""
    ranges = {"data load": (0, 4), "forward": (4, 6), "backward": (6, 7), "optimizer": (7, 8)}
    events = [event("user_annotation", name, begin + first, begin + last) for name, (first, last) in ranges.items()]
    # The profiler's own range within ours counts once.
    events.append(event("user_annotation", "Optimizer.step#SGD.step", begin + 7.1, begin + 7.9))
    return [event("user_annotation", f"epoch 1 - step {number}", begin, begin + 10), *events]


@pytest.fixture
def gpu_trace(tmp_path):
    """Three steps whose GPU runs 1 ms behind the host: a copy and two kernels that overlap on two streams."""
    events = []
    for number in range(3):
        begin = 10.0 * number
        events += step_ranges(6 + number, begin)
        work = [("gpu_memcpy", 4.5, 5, 6), ("kernel", 5.5, 6, 8), ("kernel", 6.5, 7, 9), ("kernel", 7.5, 9.5, 10.5)]
        for index, (category, launch, first, last) in enumerate(work):
            key, stream = 10 * number + index, 7 + index % 2
            events.append(
                event("cuda_runtime", "launch", begin + launch, begin + launch + 0.01, correlation=key, tid=2)
            )
            events.append(event(category, "work", begin + first, begin + last, correlation=key, stream=stream))
        events.append(event("gpu_user_annotation", "forward", begin + 5, begin + 9))
    events.append({"ph": "M", "name": "process_name", "args": {"name": "python"}})
    return write(tmp_path / "before.json.gz", events, deviceProperties=[{"name": "NVIDIA H100"}])


def test_a_gpu_is_idle_where_no_stream_runs_anything(gpu_trace):
    trace = timeline.read_trace(gpu_trace)
    # From the first work of the first step to that of the last: two steps, each 4 ms of work, then 0.5 idle, 1 of
    # work, and 4.5 idle until the next copy, the host being in no phase, then loading, then launching in forward.
    assert (trace.windows.tolist(), trace.counted) == ([[5.0, 25.0]], 2)
    phases = timeline.summarise(trace)
    assert phases["step"] == pytest.approx({"host": 10, "device": 5, "idle": 5})
    assert phases["data load"] == pytest.approx({"host": 4, "device": 0, "idle": 3.5})
    assert phases["forward"] == pytest.approx({"host": 2, "device": 3, "idle": 1})
    assert phases["backward"] == pytest.approx({"host": 1, "device": 2, "idle": 0})
    assert phases["optimizer"] == pytest.approx({"host": 1, "device": 1, "idle": 0})
    assert phases["in no phase"] == pytest.approx({"host": 2, "device": 0, "idle": 0.5})
    assert (
        timeline.line("A", trace)
        == "A: before, NVIDIA H100, 2 steps of 10.0 ms; the device is idle for 50.0 % of the time"
    )


def test_a_cpu_is_idle_where_nothing_runs_but_loading(tmp_path):
    events = step_ranges(6, 0.0)
    events += [event("cpu_op", "aten::stack", 1, 3), event("cpu_op", "aten::conv2d", 4.5, 5.5)]
    events += [event("cpu_op", "aten::convolution", 4.6, 5.4), event("cpu_op", "aten::add", 7, 7.5, tid=2)]
    phases = timeline.summarise(timeline.read_trace(write(tmp_path / "a.json.gz", events)))
    assert {name: phase["idle"] for name, phase in phases.items()} == pytest.approx(
        {"data load": 4, "forward": 1, "backward": 1, "optimizer": 0.5, "in no phase": 2, "step": 8.5}
    )


def test_what_lies_between_steps_counts_in_none(tmp_path):
    """A trace that goes on into the next epoch has the range of that epoch around its steps, and a validation."""
    events = [each for number in range(3) for each in step_ranges(7 + number, 11.0 * number)]
    events += [event("cpu_op", "aten::conv2d", 11 * number + 4, 11 * number + 8) for number in range(3)]
    events += [event("user_annotation", "validation", 32.5, 90), event("cpu_op", "aten::conv2d", 33, 80)]
    late = [event("user_annotation", "epoch 2 - step 1", 100, 150), event("user_annotation", "forward", 101, 150)]
    events += [event("user_annotation", "epoch 2", 95, 160), *late, event("cpu_op", "aten::conv2d", 101, 150)]
    trace = timeline.read_trace(write(tmp_path / "a.json.gz", events))
    assert "3 steps of 10.0 ms; the device is idle for 60.0 %" in timeline.line("A", trace)
    phases = timeline.summarise(trace)
    assert phases["step"] == pytest.approx({"host": 10, "device": 4, "idle": 6})
    assert phases["in no phase"] == pytest.approx({"host": 2, "device": 0, "idle": 2})
    assert phases["forward"] == pytest.approx({"host": 2, "device": 4, "idle": 0})
    assert not {"validation", "epoch 2"} & phases.keys()


def test_the_table_and_the_figure_show_traces_side_by_side(run_script, gpu_trace, tmp_path):
    other = write(tmp_path / "after.json.gz", [*step_ranges(6, 0.0), event("cpu_op", "aten::add", 4, 8)])
    result = run_script("report.py", "--timeline", gpu_trace, other)
    rows = {row["Phase"]: row for row in read_table(result.stdout)}
    assert [rows["data load"][f"{letter}: idle, % of step"] for letter in "AB"] == ["35.0", "40.0"]
    assert rows["whole step"]["A: GPU, ms"] == "5.00"
    assert "B: GPU, ms" not in rows["forward"]
    assert result.stderr == f"drawn: {tmp_path / 'image' / 'timeline.png'}\n"


def test_the_figure_has_a_lane_for_the_host_and_one_for_the_device(gpu_trace, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    longer = write(tmp_path / "longer.json.gz", [event("user_annotation", "epoch 1 - step 6", 0, 25)])
    timeline.draw([timeline.read_trace(path) for path in (gpu_trace, longer)], tmp_path / "timeline.png")
    panel, _ = plt.gcf().axes
    assert panel.get_xlim()[0] == 0
    assert panel.get_xlim()[1] > 25  # Both on one scale.
    assert [label.get_text() for label in panel.get_yticklabels()] == ["host", "GPU"]
    lanes = [np.array([path.vertices for path in each.get_paths()]) for each in panel.collections]
    background, *bars = lanes
    assert np.ptp(background[..., 0]) == pytest.approx(10)
    on_gpu = sum(np.ptp(bar[:, :, 0], axis=1).sum() for bar in bars if bar[..., 1].min() > 0.5)
    # Of the second step, in its own time on the host: 0.5 ms of the step before's work, and 5.5 of its own, of which 1
    # lies on top of another phase's.
    assert on_gpu == pytest.approx(6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a complete trace"),
        (b"[]", "not a complete trace"),
        (gzip.compress(b'{"traceEvents": []}')[:-4], "not a complete trace"),
        (b'{"traceEvents": [{"ph": "X", "name": "step", "ts": "now", "dur": 1}]}', "not a complete trace"),
        (b'{"traceEvents": [], "deviceProperties": ["H100"]}', "not a complete trace"),
        (b'{"traceEvents": [], "deviceProperties": {"name": "H100"}}', "not a complete trace"),
        (b'{"traceEvents": [{"ph": "X", "name": "x", "ts": 1, "dur": 1, "args": [1]}]}', "not a complete trace"),
        (b'{"traceEvents": []}', "has no ranges named"),
        (
            b'{"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": "epoch 1 - step 1", "ts": 1, "dur": 0}]}',
            "has steps that take no time",
        ),
        (
            json.dumps(
                {
                    "traceEvents": [
                        event("user_annotation", f"epoch 1 - step {number}", 1, 2, tid=number) for number in (1, 2)
                    ]
                }
            ).encode(),
            "has steps of 2 processes or threads",
        ),
    ],
    # What gzip writes tells the time.
    ids=["empty", "list", "cut", "no number", "GPU", "GPUs", "args", "no ranges", "no time", "two threads"],
)
def test_what_is_no_trace_of_ours_is_one_line(content, words, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(timeline.UserError, match=words):
        timeline.read_trace(tmp_path / "a.json")


def test_a_pipe_is_no_trace(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(timeline.UserError, match="a.json is not a file"):
        timeline.read_trace(tmp_path / "a.json")


@pytest.fixture(scope="module")
def own_trace(tmp_path_factory):
    """What --trace writes of a loop whose steps add, then multiply."""
    path, cpu = tmp_path_factory.mktemp("trace") / "own.json.gz", torch.device("cpu")
    phase, numbers = timing.PhaseTimer(cpu), torch.ones(300, 300)
    with tracing.trace(path, cpu, lambda line: None):
        phase.start_epoch()
        for _ in phase.steps([None] * (epoch_times.WARMUP_STEPS + tracing.STEPS), "epoch 1"):
            with phase("forward"):
                numbers + numbers
            with phase("backward"):
                numbers @ numbers
    return path


def test_a_trace_of_ours_has_its_phases(own_trace):
    trace = timeline.read_trace(own_trace)
    assert [name for name, *_ in trace.phases] == ["data load", "forward", "backward"] * tracing.STEPS
    assert {name for name, *_ in trace.work} == {"forward", "backward"}
    phases = timeline.summarise(trace)
    assert 0 < phases["forward"]["idle"] < phases["forward"]["host"]
    assert phases["data load"]["idle"] == phases["data load"]["host"]


def test_another_program_reads_the_same_phases_and_times(own_trace):
    """With `pip install HolisticTraceAnalysis`, in an environment of its own: pytest tests/test_timeline.py."""
    parser = pytest.importorskip("hta.common.trace", reason="HolisticTraceAnalysis is not installed")
    read = parser.Trace(trace_files={0: str(own_trace)})
    read.parse_traces(use_multiprocessing=False)
    read.decode_symbol_ids()
    events = read.get_trace(0)
    phases = timeline.summarise(timeline.read_trace(own_trace))
    for name in ("data load", "forward", "backward"):
        durations = events[(events["s_cat"] == "user_annotation") & (events["s_name"] == name)]["dur"]
        assert len(durations) == tracing.STEPS
        assert durations.mean() / 1e3 == pytest.approx(phases[name]["host"], abs=2e-3)  # It rounds to microseconds.


def test_a_single_step_of_a_gpu_ends_with_its_last_work(tmp_path):
    events = [*step_ranges(6, 0.0), event("user_annotation", "validation", 8.5, 9.5, tid=3)]  # Of another thread.
    work = (("cuda_driver", "gpu_memset", 4.5, 5, 6), ("cuda_runtime", "kernel", 7.5, 9, 12.5))
    for key, (api, category, launch, first, last) in enumerate(work):
        events.append(event(api, "launch", launch, launch + 0.01, correlation=key))
        events.append(event(category, "work", first, last, correlation=key, stream=7))
    trace = timeline.read_trace(write(tmp_path / "one.json.gz", events))
    assert (trace.windows.tolist(), trace.counted) == ([[5.0, 12.5]], 1)
    phases = timeline.summarise(trace)
    assert "validation" not in phases
    assert phases["step"] == pytest.approx({"host": 10, "device": 4.5, "idle": 3})
    assert [phases[name]["device"] for name in ("forward", "optimizer")] == pytest.approx([1, 3.5])


def test_the_step_that_is_drawn_is_of_median_length(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    spans = ((0, 25), (30, 40), (50, 62))
    events = [event("user_annotation", f"epoch 1 - step {number}", *span) for number, span in enumerate(spans, 6)]
    timeline.draw([timeline.read_trace(write(tmp_path / "steps.json.gz", events))], tmp_path / "timeline.png")
    (panel,) = plt.gcf().axes
    (background,) = panel.collections[0].get_paths()
    assert np.ptp(background.vertices[:, 0]) == pytest.approx(12)
