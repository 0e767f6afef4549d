"""Where the time of a training step goes, from traces of `--trace FILE`: its phases on the host, and where the device
is idle.

The device is idle while it runs nothing of the training: on a GPU no kernel and no copy, on a CPU no operator outside
the phase "data load". What the host does meanwhile is what the device waits for.
"""

import dataclasses
import gzip
import json
import re
import zlib
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from harness.endings import UserError
from harness.epoch_times import STEP
from harness.shapes import is_number
from reporting.comparison import number
from reporting.figures import STYLE, WIDTH, distinct_colours, finish, save
from reporting.overview import PHASES
from reporting.tables import markdown

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # The categories of GPU work.
LAUNCHES = ("cuda_runtime", "cuda_driver")
LOAD, NO_PHASE = "data load", "in no phase"
IDLE = "#d9d9d9"
SUFFIX = re.compile(r"\.json(\.gz)?$")
SHORTEST = 1e-3  # As a share of a panel's width: shorter gaps are not drawn.


@dataclasses.dataclass(frozen=True)
class Trace:
    """Some training steps of one epoch; all times are in milliseconds of one clock.

    steps: float [n, 2], begin and end on the host. phases: [(name, begin, end), ...] on the host, in order. work: the
    same for what the device ran, with the phase that launched it. device: its name. windows: float [m, 2], begin and
    end of the first `counted` steps on the device: one window per step on a CPU; a single one on a GPU, where steps
    overlap.
    """

    name: str
    steps: np.ndarray
    phases: list
    work: list
    device: str
    on_gpu: bool
    windows: np.ndarray
    counted: int


def read_trace(path):
    """The Trace in the file `path`, .json or .json.gz; UserError if it was not written by `--trace`."""
    events, properties = _events(path)
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    steps = sorted((event for event in ranges if STEP.fullmatch(event["name"])), key=lambda event: event["ts"])
    if not steps:
        raise UserError(
            f"{path} has no ranges named '... - step N'; make it with a training script's --trace FILE.json.gz"
        )
    # An epoch's end, with its validation, belongs to no step, so only the epoch with most of the steps is used.
    epochs = [step["name"].rpartition(" - ")[0] for step in steps]
    longest = max(epochs, key=epochs.count)
    steps = [step for step, epoch in zip(steps, epochs, strict=True) if epoch == longest]
    lanes = {(str(step.get("pid")), str(step.get("tid"))) for step in steps}
    if len(lanes) > 1:
        raise UserError(
            f"{path} has steps of {len(lanes)} processes or threads at the same time; choose a trace of one"
        )
    spans = np.array([_span(step) for step in steps])
    if not (spans[:, 1] > spans[:, 0]).all():
        raise UserError(f"{path} has steps that take no time; make it with a training script's --trace FILE.json.gz")
    thread = [event for event in ranges if (str(event.get("pid")), str(event.get("tid"))) in lanes]
    inside = [event for event in thread if not STEP.fullmatch(event["name"]) and _within(spans, *_span(event))]
    phases = _outermost((event["name"], *_span(event)) for event in inside)
    on_gpu = any(event.get("cat") in ON_GPU for event in events)
    work = _gpu_work(path, events, phases) if on_gpu else _cpu_work(events, phases, spans)
    device = next(iter(properties), {}).get("name", "GPU") if on_gpu else "CPU"
    windows, counted = _gpu_windows(work, spans) if on_gpu else (spans, len(spans))
    work = [each[:3] for each in work]
    return Trace(SUFFIX.sub("", path.name), spans, phases, work, device, on_gpu, windows, counted)


def _within(spans, begin, end):
    """Whether a range lies in one of `spans`, float [n, 2]."""
    return bool(((spans[:, 0] <= begin) & (end <= spans[:, 1])).any())


def _events(path):
    """(the events of a trace that have a duration, a list of dicts; the properties of its GPUs)"""
    if not path.is_file():  # Nor a pipe: opening it would wait forever.
        raise UserError(f"{path} is not a file; make one with a training script's --trace FILE.json.gz")
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        events = [event for event in content["traceEvents"] if event.get("ph") == "X"]
        properties = content.get("deviceProperties", [])
        whole = isinstance(properties, list) and all(isinstance(each, dict) for each in properties)
        whole &= all(isinstance(event["name"], str) and is_number(event["ts"]) and is_number(event["dur"])
                     and isinstance(event.get("args") or {}, dict) for event in events)  # fmt: skip
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error):
        whole = False
    if not whole:
        raise UserError(f"{path} is not a complete trace; make one with a training script's --trace FILE.json.gz")
    return events, properties


def _span(event):
    """(begin, end) in milliseconds."""
    return event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3


def _outermost(ranges):
    """The (name, begin, end) ranges that lie in no other: the profiler adds its own ranges, for example for an
    optimizer."""
    found = []
    for each in sorted(ranges, key=lambda each: (each[1], -each[2])):
        if not found or each[1] >= found[-1][2]:
            found.append(each)
    return found


def _phase_at(phases, time):
    """The name of the one of `phases`, in order, that contains `time`."""
    index = np.searchsorted([begin for _, begin, _ in phases], time, side="right") - 1
    return phases[index][0] if index >= 0 and time < phases[index][2] else NO_PHASE


def _cpu_work(events, phases, spans):
    """[(phase, begin, end), ...]: operators of any thread that belong to training: within a step, but not loading."""
    found = [_span(event) for event in events if event.get("cat") == "cpu_op" and _within(spans, *_span(event))]
    work = [(_phase_at(phases, begin), begin, end) for begin, end in found]
    return [each for each in work if each[0] != LOAD]


def _gpu_work(path, events, phases):
    """[(phase that launched it, begin, end, time of the launch), ...] of what ran on the GPU's streams."""

    def key(event):
        return str((event.get("args") or {}).get("correlation"))  # A foreign trace may contain anything here.

    launched = {key(event): event["ts"] / 1e3 for event in events if event.get("cat") in LAUNCHES}
    found = [event for event in events if event.get("cat") in ON_GPU and key(event) in launched]
    if not found:
        raise UserError(f"{path} has GPU work but no launches of it: the trace is incomplete")
    times = [launched[key(event)] for event in found]
    return [(_phase_at(phases, time), *_span(event), time) for event, time in zip(found, times, strict=True)]


def _gpu_windows(work, steps):
    """(float [1, 2], number of steps) of whole steps on the GPU, which runs behind the host: from the first work that a
    step launched to the first work of the last step. For a single step, to the end of its work."""
    firsts = [
        min((begin for _, begin, _, launch in work if start <= launch < end), default=None) for start, end in steps
    ]
    firsts = [first for first in firsts if first is not None]
    if len(firsts) > 1 and firsts[-1] > firsts[0]:
        return np.array([[firsts[0], firsts[-1]]]), len(firsts) - 1
    last = max((end for _, _, end, launch in work if launch < steps[-1, 1]), default=steps[-1, 1])
    return np.array([[firsts[0] if firsts else steps[0, 0], last]]), 1


def covered(intervals, windows):
    """Milliseconds of the `windows` that the (begin, end) `intervals` cover."""
    return sum(np.ptp(merged(intervals, window), axis=1).sum() for window in windows)


def merged(intervals, window, gap=0.0):
    """float [m, 2]: the (begin, end) `intervals`, cut to `window`, merged where they are at most `gap` apart."""
    cut = [(max(begin, window[0]), min(end, window[1])) for begin, end in intervals]
    found = []
    for begin, end in sorted(each for each in cut if each[0] < each[1]):
        if found and begin <= found[-1][1] + gap:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([begin, end])
    return np.array(found, dtype=float).reshape(-1, 2)


def gaps(trace):
    """float [m, 2]: where in its windows the device of a Trace is idle."""
    found = []
    for window in trace.windows:
        busy = merged([each[1:] for each in trace.work], window)
        found.append(np.concatenate([[window[0]], busy.ravel(), [window[1]]]).reshape(-1, 2))
    edges = np.concatenate(found)
    return edges[edges[:, 0] < edges[:, 1]]


def summarise(trace):
    """{phase, NO_PHASE, "step": {"host", "device", "idle"}} in milliseconds per step: the host's time in it, the
    device's work that it launched, and the device's idle time meanwhile."""
    idle, found = gaps(trace), defaultdict(lambda: dict.fromkeys(("host", "device", "idle"), 0.0))
    for name, begin, end in trace.phases:
        if begin < trace.steps[trace.counted - 1, 1]:
            found[name]["host"] += end - begin
        found[name]["idle"] += covered(idle, [(begin, end)])
    for name in {name for name, *_ in trace.work}:
        busy = [(begin, end) for phase, begin, end in trace.work if phase == name]
        found[name]["device"] = covered(busy, trace.windows)
    whole = {
        "host": np.ptp(trace.steps[: trace.counted], axis=1).sum(),
        "device": covered([each[1:] for each in trace.work], trace.windows),
        "idle": np.ptp(idle, axis=1).sum(),
    }
    rest = {side: whole[side] - sum(phase[side] for phase in found.values()) for side in ("host", "idle")}
    rest["device"] = found.pop(NO_PHASE, {"device": 0.0})["device"]
    order = [*PHASES, *sorted(set(found) - set(PHASES)), NO_PHASE, "step"]
    found |= {NO_PHASE: rest, "step": whole}
    return {
        name: {side: float(ms) / trace.counted for side, ms in found[name].items()} for name in order if name in found
    }


def length(trace):
    """Milliseconds of a step on the device."""
    return np.ptp(trace.windows, axis=1).sum() / trace.counted


def letters(traces):
    """{letter: Trace}"""
    return {chr(ord("A") + index): trace for index, trace in enumerate(traces)}


def line(letter, trace):
    """ "A: plain, GPU, 4 steps of 22.1 ms; the device is idle for 12.3 % of the time"."""
    idle = 100 * np.ptp(gaps(trace), axis=1).sum() / length(trace) / trace.counted
    steps = f"{trace.counted} step{'' if trace.counted == 1 else 's'} of {number(length(trace))} ms"
    return f"{letter}: {trace.name}, {trace.device}, {steps}; the device is idle for {idle:.1f} % of the time"


def render(traces):
    """Markdown: a line for each of the Traces, and a table of their phases side by side."""
    lettered = letters(traces)
    sides = {letter: summarise(trace) for letter, trace in lettered.items()}
    names = dict.fromkeys(name for side in sides.values() for name in side if name not in (NO_PHASE, "step"))
    rows = []
    for name in [*names, NO_PHASE, "step"]:
        cells = {"Phase": "whole step" if name == "step" else name}
        for letter, trace in lettered.items():
            of = sides[letter].get(name)
            cells[f"{letter}: host, ms"] = of and number(of["host"])
            cells[f"{letter}: GPU, ms"] = of and number(of["device"]) if trace.on_gpu else None
            cells[f"{letter}: idle, ms"] = of and number(of["idle"])
            cells[f"{letter}: idle, % of step"] = of and f"{100 * of['idle'] / length(trace):.1f}"
        rows.append(cells)
    return "\n\n".join(["  \n".join(line(*each) for each in lettered.items()), markdown(rows), EXPLANATION])


EXPLANATION = (
    "Means per step. Host: time in the phase. GPU: work that the phase launched. Idle: time in the phase during which "
    "the device runs nothing (on a CPU: no operator except those of loading), that is, what the device waits for. "
    "Tracing slows the run down: compare traces only with each other."
)


def draw(traces, path):
    """Write the figure: for each Trace its step of median length, with the host's lane above the device's, all on the
    same scale. Returns `path`."""
    lettered = letters(traces)
    names = dict.fromkeys([*PHASES, *(name for trace in traces for name, *_ in trace.phases + trace.work)])
    colours = distinct_colours(names)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(traces), 1, figsize=(WIDTH, 1.3 + 1.35 * len(traces)), layout="constrained", sharex=True, squeeze=False
        )
        for panel, (letter, trace) in zip(panels[:, 0], lettered.items(), strict=True):
            _draw_lanes(panel, trace, colours)
            panel.set_title(line(letter, trace), fontsize=10, loc="left")
        panels[-1, 0].set_xlabel("time since the start of the step, ms")
        panels[-1, 0].set_xlim(left=0)
        shown = {name for trace in traces for name, *_ in trace.phases + trace.work}
        handles = [Patch(color=colour, label=name) for name, colour in colours.items() if name in shown]
        handles.append(Patch(color=IDLE, label="the device is idle"))
        finish(figure, handles, "Where the time of a step goes (the step of median length)")
    return save(figure, path)


def _draw_lanes(panel, trace, colours):
    """The lanes of the host and the device, for the step of median length."""
    begin, end = trace.steps[np.argsort(np.ptp(trace.steps, axis=1))[len(trace.steps) // 2]]
    panel.broken_barh([(0, end - begin)], (0.6, 0.8), color=IDLE)
    for position, ranges in enumerate((trace.phases, trace.work)):
        for name in dict.fromkeys(name for name, *_ in ranges):
            spans = [(first, last) for each, first, last in ranges if each == name]
            spans = merged(spans, (begin, end), SHORTEST * (end - begin))
            bars = [(first - begin, last - first) for first, last in spans]
            panel.broken_barh(bars, (position - 0.4, 0.8), color=colours[name], linewidth=0)
    panel.set_yticks((0, 1), ("host", "GPU" if trace.on_gpu else "operators"))
    panel.set_ylim(1.5, -0.5)
    panel.grid(axis="y", visible=False)
