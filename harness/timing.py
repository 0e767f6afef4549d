"""The one way this repository takes time.

`with phase("forward"):` pushes an NVTX range, takes host time and, on CUDA, records a pair of events on the current
stream. A host time on CUDA is the time to enqueue; the device time between the events is what the GPU spent. Events
are resolved once an epoch, so that no step waits for the device.
"""

import contextlib
import time
from collections import defaultdict

import numpy as np
import torch

from harness.devices import synchronize
from harness.memory import peak_memory, reset_peak_memory

try:
    from nvtx import pop_range, push_range
except ModuleNotFoundError:
    # PyTorch's own ranges show the same, but on a CPU build they raise: there the package is needed.
    if not torch.cuda.is_available():
        raise
    from torch.cuda.nvtx import range_pop as pop_range
    from torch.cuda.nvtx import range_push as push_range

watchers = []  # Callables, range name -> context manager, entered with every range; a profiler, say.
WARMUP_STEPS = 5  # Of each process: allocator growth, cuDNN's choice of algorithm and worker start-up fall here.


@contextlib.contextmanager
def nvtx_range(name):
    """An NVTX range alone, for what is looked at in a profiler but not timed: a run, an epoch, validation."""
    push_range(name)
    watched = _enter_watchers(name)
    try:
        yield
    finally:
        watched.close()
        pop_range()


def _enter_watchers(name):
    """An ExitStack of what the watchers enter with the range `name`."""
    stack = contextlib.ExitStack()
    for watch in watchers:
        stack.enter_context(watch(name))
    return stack


class PhaseTimer:
    """Times the phases of training steps, epoch by epoch.

    device: a torch.device; on "cuda" device times are taken besides host times.
    enabled: False makes every phase free, to measure what the timing itself costs.
    warmup_steps: how many first steps count in totals and shares alone.
    """

    def __init__(self, device, enabled=True):
        self.enabled = enabled
        self._device = device
        self._on_cuda = device.type == "cuda"
        self.warmup_steps = WARMUP_STEPS
        self._phases = {}
        self._host = defaultdict(list)  # name -> nanoseconds, one an occurrence
        self._events = defaultdict(list)  # name -> (start, end, milliseconds that it was paused)
        self.steps_done = 0  # In this process.
        self._epoch_warmup = 0
        self._warmup_samples = {}  # name -> how many of the epoch's first samples fell in warm-up steps
        self._epoch_start = None
        self._open_step = contextlib.ExitStack()

    def __call__(self, name):
        """The context manager that times one occurrence of the phase `name`."""
        phase = self._phases.get(name)
        if phase is None:
            phase = self._phases[name] = _Phase(self, name) if self.enabled else contextlib.nullcontext()
        return phase

    def start_epoch(self):
        self._host.clear()
        self._events.clear()  # Of an epoch that was not summarised.
        self._epoch_warmup = 0
        self._warmup_samples.clear()
        reset_peak_memory(self._device)
        synchronize(self._device)
        self._epoch_start = time.perf_counter()

    def steps(self, batches, label, first=0, limit=None):
        """Yield (number, batch) for the batches of an epoch, numbered from `first`; needs len(batches).

        No step begins once `steps_done` is `limit`.

        Each step is an NVTX range "<label> - step <number>" that closes at `end_step`, or else when the next batch is
        asked for; the wait for its batch is the phase "data load".
        """
        iterator = iter(batches)
        step = self("step")
        for number in range(first, first + len(batches)):
            if self.steps_done == limit:
                return
            step.range_name = f"{label} - step {number + 1}"
            try:
                with contextlib.ExitStack() as self._open_step:
                    self._open_step.enter_context(step)
                    with self("data load"):
                        batch = next(iterator)
                    yield number, batch
            finally:  # Also of the step after which the loop is left.
                self.steps_done += 1
                if self.steps_done <= self.warmup_steps:
                    self._epoch_warmup += 1
                    self._warmup_samples = {name: len(samples) for name, samples in self._host.items()}

    def end_step(self):
        """Close the step in hand: what follows, up to the next one, is in no step."""
        self._open_step.close()

    @contextlib.contextmanager
    def paused(self):
        """Within the block the clock of the epoch, and of a phase that is open, such as the step, stands still: what is
        done there is no training."""
        synchronize(self._device)  # What it still has to do is.
        started = time.perf_counter_ns()
        yield
        synchronize(self._device)  # Else what the block has asked for would be done within the phase.
        paused = time.perf_counter_ns() - started
        self._epoch_start += paused / 1e9
        for phase in self._phases.values() if self.enabled else ():
            phase.paused += paused  # A phase that is not open begins anew.

    def end_epoch(self):
        """Summarise the epoch and forget its samples.

        Returns a dict of plain values: "seconds" (those in `paused` left out), "steps", "warmup_steps",
        "unphased_seconds" (of them in no phase), "peak_memory" (of its steps, as `peak_memory` gives it) and "phases":
        name -> {"count", "share" (of the epoch), "host_ms", "device_ms" (None without CUDA)}, the last two {"median",
        "p95", "total"}. Warm-up steps count in totals and shares, and in nothing else. Shares and the time in no phase
        are of the device's time where it was taken: there the host may be many launches ahead of the work.
        """
        synchronize(self._device)
        seconds = time.perf_counter() - self._epoch_start
        device = self._resolve_events()
        samples = {
            name: (np.array(nanoseconds) / 1e6, device.get(name), self._warmup_samples.get(name, 0))
            for name, nanoseconds in self._host.items()
        }
        self._host.clear()
        return describe_epoch(seconds, samples, self._epoch_warmup) | {"peak_memory": peak_memory(self._device)}

    def _resolve_events(self):
        """Milliseconds of every phase by name. Call after a synchronize."""
        milliseconds = {
            name: np.array([start.elapsed_time(end) - paused for start, end, paused in occurrences])
            for name, occurrences in self._events.items()
        }
        self._events.clear()
        return milliseconds


def _recorded_event():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _Phase:
    """One phase of a PhaseTimer, entered again and again but never inside itself."""

    def __init__(self, timer, name):
        self._timer, self._name = timer, name
        self.range_name = name  # In the profiler; steps have a number there.
        self._start = self._event = self._watched = None
        self.paused = 0  # Nanoseconds of this occurrence in which no clock runs.

    def __enter__(self):
        push_range(self.range_name)
        if watchers:
            started = time.perf_counter()
            self._watched = _enter_watchers(self.range_name)
            if self._timer._epoch_start is not None:  # One may write a trace, which takes seconds, and is no training.
                self._timer._epoch_start += time.perf_counter() - started
        if self._timer._on_cuda:
            self._event = _recorded_event()
        self.paused = 0
        self._start = time.perf_counter_ns()

    def __exit__(self, error, *_):
        elapsed = time.perf_counter_ns() - self._start - self.paused
        if error in (None, GeneratorExit):  # The second is of a `break` after the phase.
            self._timer._host[self._name].append(elapsed)
            if self._timer._on_cuda:
                self._timer._events[self._name].append((self._event, _recorded_event(), self.paused / 1e6))
        if self._watched:
            self._watched.close()
        pop_range()


def describe_epoch(seconds, samples, warmup_steps):
    """What PhaseTimer.end_epoch returns, but for the memory.

    samples: name of a phase -> (its milliseconds on the host, those on the device or None, float [n] each, and how many
    of the first were warm-up).
    """
    phases = {}
    for name, (host, device, warmup) in samples.items():
        host_ms, device_ms = summarise(host, warmup), None if device is None else summarise(device, warmup)
        share = (device_ms or host_ms)["total"] / (1e3 * seconds)
        phases[name] = {"count": len(host) - warmup, "share": share, "host_ms": host_ms, "device_ms": device_ms}
    return {
        "seconds": seconds,
        "steps": len(samples["step"][0]) if "step" in samples else 0,
        "warmup_steps": warmup_steps,
        "unphased_seconds": seconds * (1 - sum(phases[name]["share"] for name in phases if name != "step")),
        "phases": phases,
    }


def phase_times(phase):
    """A phase's "median", "p95" and "total" in ms: on the device where it was timed there, else on the host."""
    return phase["device_ms"] or phase["host_ms"]


def training_seconds(timing):
    """Seconds of an epoch's training steps, of its timing as from PhaseTimer.end_epoch: without the validations within
    it. A scorer's may come between its steps, which begin and end around them."""
    validation = timing["phases"].get("validation")
    return timing["seconds"] - (phase_times(validation)["total"] / 1e3 if validation else 0.0)


def typical_milliseconds(phase):
    """Of one occurrence of a phase, as PhaseTimer.end_epoch has it, on the device where it was timed: the median, or
    the total of the one occurrence where all was warm-up."""
    found = phase_times(phase)
    return found["total"] if found["median"] is None else found["median"]


def summarise(samples, warmup=0):
    """Median and 95th percentile of `samples` [n] after the first `warmup`, and the total of all, in their unit.

    Without a sample after the warm-up, median and percentile are None.
    """
    counted = np.asarray(samples)[warmup:]
    return {
        "median": float(np.median(counted)) if len(counted) else None,
        "p95": float(np.percentile(counted, 95)) if len(counted) else None,
        "total": float(np.sum(samples)),
    }
