"""`--trace FILE`: a trace of every operator in a few training steps, on any device, without another program.

Open FILE with https://ui.perfetto.dev or chrome://tracing; its ranges are the phases of timing.py. On CUDA, a memory
snapshot for https://docs.pytorch.org/memory_viz is written next to it.
"""

import argparse
import contextlib
import gzip
import os
import pickle
import re
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from harness import timing
from harness.devices import synchronize
from harness.endings import UserError
from harness.epoch_times import STEP, WARMUP_STEPS
from harness.files import atomic_write, make_folder

STEPS = 5  # Traced after WARMUP_STEPS.
COSTLIEST = 10
BEGINNING = re.compile(rb'\s*{\s*"schemaVersion"')  # Of what torch.profiler writes.
END = re.compile(rb'"traceName": [^\n]+}\s*$')
SUFFIXES = (".json", ".json.gz")


def add_argument(parser):
    parser.add_argument("--trace", type=_trace_file, metavar="FILE.json.gz",
        help=f"trace {STEPS} steps after warm-up, operator by operator, into this file, and print the most expensive "
             "operators; these steps are slower")  # fmt: skip


def _trace_file(text):
    if not text.endswith(SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text} must end with {' or '.join(SUFFIXES)}, which trace viewers can open")
    return text


@contextlib.contextmanager
def trace(path, device, say):
    """Within the block, trace the steps that PhaseTimers time, into the file `path`; do nothing if that is None.

    say: takes the lines to print. If the block ends before the warm-up does, or the file cannot be written, a message
    says so and no file is left. UserError before the block if it is already known that `path` cannot be written, or if
    it exists and is not a trace.
    """
    if path is None:
        yield
        return
    _check_writable(Path(path), device)
    tracer = _Tracer(Path(path), device, say)
    timing.watchers.append(tracer)
    try:
        yield
    finally:
        timing.watchers.remove(tracer)
        tracer.end()


def _check_writable(path, device):
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"--trace {path} is a folder; choose a file in it")
    if path.exists() and not _is_trace(path):
        raise UserError(f"--trace {path} already exists and is not a trace; choose another name or remove it")
    memory = _memory_file(path)
    if device.type == "cuda" and memory.exists() and not path.exists():
        raise UserError(
            f"--trace {path}: {memory.name}, which is written next to it, already exists; choose another name or "
            "remove it"
        )
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--trace {path}: cannot write into its folder ({error.strerror}); choose another") from None


def _memory_file(path):
    """The Path of the GPU memory snapshot that belongs to a trace."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".json") + ".memory.pickle")


def _is_trace(path):
    """Whether a file begins like those of torch.profiler."""
    if not path.is_file():  # Opening a pipe would wait forever.
        return False
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return BEGINNING.match(file.read(100)) is not None
    except (OSError, EOFError, zlib.error):
        return False


class _Tracer:
    """A watcher of ranges that profiles STEPS of the steps among them. Called with a range's name, it returns the
    context to enter with it."""

    def __init__(self, path, device, say):
        self._path, self._device, self._say = path, device, say
        self._steps = 0  # Begun so far.
        self._profile = self._is_done = None

    def __call__(self, name):
        if STEP.fullmatch(name):
            self._steps += 1
            if self._steps == WARMUP_STEPS + 1:
                self._start()
            elif self._steps == WARMUP_STEPS + STEPS + 1:
                self.end()
        return record_function(name) if self._profile else contextlib.nullcontext()

    def _start(self):
        on_cuda = self._device.type == "cuda"
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Kineto reports on stderr when it starts and stops.
        if on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda])
        self._profile.start()

    def end(self):
        """Stop, write the files, and print the most expensive operators; only the first call does anything."""
        if self._is_done:
            return
        self._is_done = True
        if self._profile is None:
            self._say(f"no trace: the run has fewer than {WARMUP_STEPS + 1} steps")
            return
        synchronize(self._device)
        self._profile.stop()
        steps = min(STEPS, self._steps - WARMUP_STEPS)  # Fewer if the run has ended.
        try:
            first = f"traced {steps} steps: {', '.join(self._write())}"
        except OSError:  # Training need not end for it.
            first = f"warning: no trace: cannot write {self._path}; its disk may be full"
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        rows = costliest(self._profile.events(), self._device)
        self._profile = None
        for line in [first, *rows]:
            self._say(line)

    def _write(self):
        """Write the files, each atomically, and return their names."""
        with tempfile.TemporaryDirectory(prefix=f".{self._path.name}.", dir=self._path.parent) as folder:
            made = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(made))  # A full disk raises nothing: the file is missing or partial.
            content = made.read_bytes()
        if not END.search(content, max(0, len(content) - 9999)):
            raise OSError("the trace was not written completely")
        with atomic_write(self._path) as file:
            file.write(gzip.compress(content) if self._path.suffix == ".gz" else content)
        if self._device.type != "cuda":
            return [str(self._path)]
        with atomic_write(_memory_file(self._path)) as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        return [str(self._path), str(_memory_file(self._path))]


def costliest(events, device):
    """The operators of the traced steps with the most time of their own, with the phase that they ran in, as lines of a
    table.

    events: of a torch.profiler.profile. On CUDA, backward runs in its own thread, so an operator is assigned to the
    step and phase during which it was called. What belongs to no step, such as a validation, does not count.
    """
    # An operator includes its kernels; a GPU's profile also lists them separately, and phases over them.
    events = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = [
        (event.name, event.time_range.start, event.time_range.end) for event in events if event.is_user_annotation
    ]
    steps = [each for each in ranges if STEP.fullmatch(each[0])]
    phases = [each for each in ranges if each not in steps and _range_at(steps, each[1])]
    costs = defaultdict(lambda: [0.0, 0])
    for event in events:
        start = event.time_range.start
        if event.is_user_annotation or not _range_at(steps, start):
            continue
        cost = costs[_range_at(phases, start) or "in no phase", event.name]
        cost[0] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        cost[1] += 1
    total = sum(microseconds for microseconds, _ in costs.values())
    most = sorted(costs.items(), key=lambda item: -item[1][0])[:COSTLIEST]
    lines = [f"{'phase':12} {'operator':45} {'ms/step':>10} {'share':>7} {'calls/step':>13}"]
    for (phase, name), (microseconds, calls) in most:
        share, milliseconds = microseconds / total if total else 0.0, microseconds / 1e3 / len(steps)
        lines.append(f"{phase:12} {name[:45]:45} {milliseconds:10.3f} {share:7.1%} {calls / len(steps):13.1f}")
    return lines


def _range_at(ranges, time):
    """The name of the first of the `ranges` (name, begin, end) that contains `time`; None if there is none."""
    return next((name for name, begin, end in ranges if begin <= time <= end), None)
