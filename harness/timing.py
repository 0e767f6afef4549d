"""How this repository measures time.

`with phase("forward"):` pushes an NVTX range, takes the host time and, on CUDA, records a pair of events on the current
stream. On CUDA, the host time is the time to enqueue the work; the device time between the events is what the GPU
spent. Events are resolved once per epoch, so that no step waits for the device.
"""

import contextlib
import time
from collections import defaultdict

import numpy as np
import torch

from harness.devices import synchronize
from harness.epoch_times import WARMUP_STEPS, describe_epoch
from harness.memory import peak_memory, reset_peak_memory

try:
    from nvtx import pop_range, push_range
except ModuleNotFoundError:
    # PyTorch's own NVTX ranges are equivalent, but raise on a CPU build, so there the package is required.
    if not torch.cuda.is_available():
        raise
    from torch.cuda.nvtx import range_pop as pop_range
    from torch.cuda.nvtx import range_push as push_range

watchers = []  # Callables (range name -> context manager), each entered with every range; for example a profiler.


@contextlib.contextmanager
def nvtx_range(name):
    """An NVTX range without timing, for profilers: a run, an epoch, validation."""
    push_range(name)
    watched = _enter_watchers(name)
    try:
        yield
    finally:
        watched.close()
        pop_range()


def _enter_watchers(name):
    """An ExitStack holding what the watchers enter for the range `name`."""
    stack = contextlib.ExitStack()
    for watch in watchers:
        stack.enter_context(watch(name))
    return stack


class PhaseTimer:
    """Times the phases of training steps, epoch by epoch.

    device: a torch.device; on "cuda" device times are taken in addition to host times.
    enabled: False makes every phase a no-op, to measure the cost of timing itself.
    warmup_steps: the number of first steps that count only in totals and shares.
    """

    def __init__(self, device, enabled=True):
        self.enabled = enabled
        self._device = device
        self._on_cuda = device.type == "cuda"
        self.warmup_steps = WARMUP_STEPS
        self._phases = {}
        self._host = defaultdict(list)  # name -> nanoseconds of each occurrence
        self._events = defaultdict(list)  # name -> (start, end, milliseconds of pauses)
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
        self._events.clear()  # Left over if an epoch was not summarised.
        self._epoch_warmup = 0
        self._warmup_samples.clear()
        reset_peak_memory(self._device)
        synchronize(self._device)
        self._epoch_start = time.perf_counter()

    def steps(self, batches, label, first=0, limit=None):
        """Yield (number, batch) for the batches of an epoch, numbered from `first`; needs len(batches).

        No step begins once `steps_done` reaches `limit`.

        Each step is an NVTX range "<label> - step <number>" that closes at `end_step`, or else when the next batch is
        requested; waiting for its batch is the phase "data load".
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
            finally:  # Also if the loop is left during this step.
                self.steps_done += 1
                if self.steps_done <= self.warmup_steps:
                    self._epoch_warmup += 1
                    self._warmup_samples = {name: len(samples) for name, samples in self._host.items()}

    def end_step(self):
        """Close the current step; what follows belongs to no step until the next one begins."""
        self._open_step.close()

    @contextlib.contextmanager
    def paused(self):
        """Stop the clocks of the epoch and of any open phase, such as the step, during the block: it does not count as
        training time."""
        synchronize(self._device)  # Work already queued counts as training.
        started = time.perf_counter_ns()
        yield
        synchronize(self._device)  # Otherwise the block's own work would be timed as part of the phase.
        paused = time.perf_counter_ns() - started
        self._epoch_start += paused / 1e9
        for phase in self._phases.values() if self.enabled else ():
            phase.paused += paused  # A phase that is not open resets this when it begins.

    def end_epoch(self):
        """Summarise the epoch and discard its samples.

        Returns a dict of plain values: "seconds" (without `paused` blocks), "steps", "warmup_steps", "unphased_seconds"
        (time outside all phases), "peak_memory" (of its steps, as from `peak_memory`) and "phases": name -> {"count",
        "share" (of the epoch), "host_ms", "device_ms" (None without CUDA)}; the last two are {"median", "p95",
        "total"}. Warm-up steps count only in totals and shares. Shares and the time outside phases use device times if
        there are any, since the host may run many launches ahead of the GPU.
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
    """One phase of a PhaseTimer, entered repeatedly but never inside itself."""

    def __init__(self, timer, name):
        self._timer, self._name = timer, name
        self.range_name = name  # Shown in the profiler; includes the number of a step.
        self._start = self._event = self._watched = None
        self.paused = 0  # Nanoseconds within this occurrence in which the clocks were stopped.

    def __enter__(self):
        push_range(self.range_name)
        if watchers:
            started = time.perf_counter()
            self._watched = _enter_watchers(self.range_name)
            if self._timer._epoch_start is not None:  # A watcher may write a trace for seconds, which is not training.
                self._timer._epoch_start += time.perf_counter() - started
        if self._timer._on_cuda:
            self._event = _recorded_event()
        self.paused = 0
        self._start = time.perf_counter_ns()

    def __exit__(self, error, *_):
        elapsed = time.perf_counter_ns() - self._start - self.paused
        if error in (None, GeneratorExit):  # GeneratorExit: a `break` after the phase.
            self._timer._host[self._name].append(elapsed)
            if self._timer._on_cuda:
                self._timer._events[self._name].append((self._event, _recorded_event(), self.paused / 1e6))
        if self._watched:
            self._watched.close()
        pop_range()
