"""The one way this repository counts memory: what autograd holds for backward, what lives, and the allocator's peak."""

import contextlib
import ctypes
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    "ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0",
    "ExpandBackward0", "UnsqueezeBackward0",
}  # fmt: skip


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
    noticed() is called after each tensor that an operator has returned.
    """

    def __init__(self, model, noticed=lambda: None):
        super().__init__()
        self._noticed = noticed
        self._shapes = {tuple(weight.shape) for weight in model.parameters()}
        self._live = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in tree_leaves(result):
            if _is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:  # Else a view, or in place.
                self.follow(tensor)
                self._noticed()
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


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # Parameters of mallopt, in glibc's malloc.h.


def keep_freed_memory():
    """Let this process keep the memory of tensors that are freed on the CPU, and give it to those that come next.

    By itself glibc asks the system for each tensor of more than 32 MiB, gives it back when it is freed, and trims its
    heap. The system clears each page anew when it is first written, which may take more than half as long as all that
    is computed (benchmarks/allocator.py). Where another library allocates (musl, macOS, Windows) nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # The largest size: nothing is trimmed.


def in_mib(size):
    """`size` bytes in MiB, in words: "12.3"."""
    return f"{size / 2**20:.1f}"


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
