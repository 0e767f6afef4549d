"""The one way this repository takes time and counts memory.

`with phase("forward"):` pushes an NVTX range, takes host time and, on CUDA, records a pair of events on the current
stream. A host time on CUDA is the time to enqueue; the device time between the events is what the GPU spent. Events
are resolved once an epoch, so that no step waits for the device.
"""

import contextlib
import time
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    from nvtx import pop_range, push_range
except ModuleNotFoundError:
    # PyTorch's own ranges show the same, but on a CPU build they raise: there the package is needed.
    if not torch.cuda.is_available():
        raise
    from torch.cuda.nvtx import range_pop as pop_range
    from torch.cuda.nvtx import range_push as push_range

WARMUP_STEPS = 5  # Of each process: allocator growth, cuDNN's choice of algorithm and worker start-up fall here.


@contextlib.contextmanager
def nvtx_range(name):
    """An NVTX range alone, for what is looked at in a profiler but not timed: a run, an epoch, validation."""
    push_range(name)
    try:
        yield
    finally:
        pop_range()


class PhaseTimer:
    """Times the phases of training steps, epoch by epoch.

    device: a torch.device; on "cuda" device times are taken besides host times.
    enabled: False makes every phase free, to measure what the timing itself costs.
    """

    def __init__(self, device, enabled=True):
        self.enabled = enabled
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._phases = {}
        self._host = defaultdict(list)  # name -> nanoseconds, one an occurrence
        self._events = defaultdict(list)  # name -> (start, end)
        self._spare_events = []
        self.steps_done = 0  # In this process.
        self._epoch_warmup = 0
        self._warmup_samples = {}  # name -> how many of the epoch's first samples fell in warm-up steps
        self._epoch_start = None

    def __call__(self, name):
        """The context manager that times one occurrence of the phase `name`."""
        phase = self._phases.get(name)
        if phase is None:
            phase = self._phases[name] = _Phase(self, name) if self.enabled else contextlib.nullcontext()
        return phase

    def start_epoch(self):
        self._host.clear()
        self._spare(self._events)  # Of an epoch that was not summarised.
        self._epoch_warmup = 0
        self._warmup_samples.clear()
        reset_peak_memory(self._device)
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
        self._epoch_start = time.perf_counter()

    def steps(self, batches, label, first=0, limit=None):
        """Yield (number, batch) for the batches of an epoch, numbered from `first`; needs len(batches).

        No step begins once `steps_done` is `limit`.

        Each step is an NVTX range "<label> - step <number>" that closes when the next batch is asked for; the wait
        for its batch is the phase "data load".
        """
        iterator = iter(batches)
        step = self("step")
        for number in range(first, first + len(batches)):
            if self.steps_done == limit:
                return
            step.range_name = f"{label} - step {number + 1}"
            with step:
                with self("data load"):
                    batch = next(iterator)
                yield number, batch
            self.steps_done += 1
            if self.steps_done <= WARMUP_STEPS:
                self._epoch_warmup += 1
                self._warmup_samples = {name: len(samples) for name, samples in self._host.items()}

    def end_epoch(self):
        """Summarise the epoch and forget its samples.

        Returns a dict of plain values: "seconds", "steps", "warmup_steps", "unphased_seconds" (time of the epoch in no
        phase), "peak_memory" (of its steps, as `peak_memory` gives it) and "phases": name -> {"count", "share" (of the
        epoch), "host_ms", "device_ms" (None without CUDA)}, the last two {"median", "p95", "total"}. Warm-up steps
        count in totals and shares, and in nothing else. Shares and the time in no phase are of the device's time where
        it was taken: there the host may be many launches ahead of the work.
        """
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._epoch_start
        device = self._resolve_events()
        phases = {}
        for name, nanoseconds in self._host.items():
            warmup = self._warmup_samples.get(name, 0)
            host_ms = summarise(np.array(nanoseconds) / 1e6, warmup)
            device_ms = summarise(device[name], warmup) if name in device else None
            phases[name] = {
                "count": len(nanoseconds) - warmup,
                "share": (device_ms or host_ms)["total"] / (1e3 * seconds),
                "host_ms": host_ms,
                "device_ms": device_ms,
            }
        steps = len(self._host.get("step", ()))
        self._host.clear()
        return {
            "seconds": seconds,
            "steps": steps,
            "warmup_steps": self._epoch_warmup,
            "unphased_seconds": seconds * (1 - sum(phases[name]["share"] for name in phases if name != "step")),
            "peak_memory": peak_memory(self._device),
            "phases": phases,
        }

    def _resolve_events(self):
        """Milliseconds of every phase by name. Call after a synchronize."""
        milliseconds = {}
        for name, pairs in self._events.items():
            milliseconds[name] = np.array([start.elapsed_time(end) for start, end in pairs])
        self._spare(self._events)
        return milliseconds

    def _spare(self, events):
        """Put the events of `events` back to be recorded again, and empty it."""
        self._spare_events.extend(event for pairs in events.values() for pair in pairs for event in pair)
        events.clear()

    def _record_event(self):
        event = self._spare_events.pop() if self._spare_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Phase:
    """One phase of a PhaseTimer, entered again and again but never inside itself."""

    def __init__(self, timer, name):
        self._timer, self._name = timer, name
        self.range_name = name  # In the profiler; steps have a number there.
        self._start = self._event = None

    def __enter__(self):
        push_range(self.range_name)
        if self._timer._on_cuda:
            self._event = self._timer._record_event()
        self._start = time.perf_counter_ns()

    def __exit__(self, error, *_):
        elapsed = time.perf_counter_ns() - self._start
        if error is None:
            self._timer._host[self._name].append(elapsed)
            if self._timer._on_cuda:
                self._timer._events[self._name].append((self._event, self._timer._record_event()))
        pop_range()


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


class SavedBytes:
    """Counts the bytes that autograd holds for backward, by saved-tensor hooks, each storage once.

    with SavedBytes(model) as saved:
        loss = criterion(model(images), labels)
    saved.bytes

    Parameters and buffers of `model` are held anyway and do not count, nor do autocast's copies of parameters: they are
    no activations. (A copy that compiled code saves cannot be told from an activation, and counts.) Works on any
    device. Code that sets hooks of its own inside the block (harness.recompute) hides its tensors from these hooks, and
    reports what it saves by `overlook_weight` and what it keeps by `count_saved`.
    """

    _active = []

    def __init__(self, model):
        self._model = model
        self._storages = []  # Kept alive while counting: a freed storage's address could be handed out again.
        self.bytes = None

    def first_time(self):
        """This counter when it has not counted yet, else a context that does nothing."""
        return self if self.bytes is None else contextlib.nullcontext()

    def __enter__(self):
        self.bytes = 0
        held = [*self._model.parameters(), *self._model.buffers()]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._parameters = {id(weight) for weight in self._model.parameters()}
        SavedBytes._active.append(self)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        SavedBytes._active.remove(self)
        self._storages.clear()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._see(storage)
            self.bytes += storage.nbytes()

    def overlook_weight(self, tensor):
        """Do not count the storage of `tensor` when it is a cast copy of a parameter, or a view of one."""
        node = tensor.grad_fn
        while node is not None and node.name() in _CAST_OR_VIEW:
            node = node.next_functions[0][0]
        if id(getattr(node, "variable", None)) in self._parameters:
            self._see(tensor.untyped_storage())

    def _see(self, storage):
        self._seen.add(storage.data_ptr())
        self._storages.append(storage)

    def _pack(self, tensor):
        self.overlook_weight(tensor)
        self.add(tensor)
        return tensor.detach()  # Not the tensor: its graph would hold itself when no backward follows.


# The nodes that autograd makes of `weight.to(bfloat16)` and of the views that a matrix product takes of it.
_CAST_OR_VIEW = {
    "ToCopyBackward0",
    "TBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ExpandBackward0",
    "UnsqueezeBackward0",
}


def count_saved(tensor):
    """Tell the active SavedBytes, if any, that `tensor` is held for backward."""
    for counter in SavedBytes._active:
        counter.add(tensor)


def overlook_weight(tensor):
    """Tell the active SavedBytes, if any, that `tensor` is saved, with its graph: a parameter's copy will not count."""
    for counter in SavedBytes._active:
        counter.overlook_weight(tensor)


class LiveBytes(TorchDispatchMode):
    """Follows the storages of the tensors that operators return while it is entered, again and again if need be: `now`
    bytes, and their `peak`. For a CPU, whose allocator keeps no account.

    Tensors of the shapes of the model's weights are left out: they are gradients of weights, not of activations.
    """

    def __init__(self, model):
        super().__init__()
        self._shapes = {tuple(weight.shape) for weight in model.parameters()}
        self._live = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        return result

    def follow(self, tensor):
        """Count the storage of `tensor` from here on until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tuple(tensor.shape) in self._shapes:
            return
        self._live[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key, size):
        del self._live[key]
        self.now -= size


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """{"allocated_bytes", "reserved_bytes"} at their highest since the last reset on CUDA; None elsewhere."""
    if device.type != "cuda":
        return None
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
