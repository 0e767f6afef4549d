"""How this repository counts memory: what autograd saves for backward, the live bytes, and the allocator's peak."""

import contextlib
import ctypes
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes:
    """Counts the bytes that autograd saves for backward, using saved-tensor hooks; each storage counts once.

    with SavedBytes(model) as saved:
        loss = criterion(model(images), labels)
    saved.bytes

    Parameters and buffers of `model` do not count, since they are in memory anyway; nor do autocast's copies of
    parameters, which are not activations. (A copy saved by compiled code cannot be told from an activation, and
    counts.) Works on any device. Code that sets its own hooks inside the block (harness.recompute) hides its tensors
    from these hooks; it reports what it saves with `overlook_weight` and what it keeps with `count_saved`.
    """

    _active = []

    def __init__(self, model):
        self._model = model
        self._storages = []  # Kept alive while counting: the address of a freed storage could be reused.
        self.bytes = None

    def first_time(self):
        """This counter if it has not counted yet, else a context that does nothing."""
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
        """Do not count the storage of `tensor` if it is a cast copy of a parameter, or a view of one."""
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
        return tensor.detach()  # Not the tensor itself: its graph would keep itself alive if no backward follows.


# The autograd nodes of `weight.to(bfloat16)` and of the views that a matrix product takes of it.
_CAST_OR_VIEW = {
    "ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0",
    "ExpandBackward0", "UnsqueezeBackward0",
}  # fmt: skip


def count_saved(tensor):
    """Tell the active SavedBytes, if any, that `tensor` is kept for backward."""
    for counter in SavedBytes._active:
        counter.add(tensor)


def overlook_weight(tensor):
    """Tell the active SavedBytes, if any, that `tensor` is saved with its graph, so that a parameter's copy is not
    counted."""
    for counter in SavedBytes._active:
        counter.overlook_weight(tensor)


class LiveBytes(TorchDispatchMode):
    """Tracks the storages of the tensors that operators return inside the context, which can be entered repeatedly: the
    bytes `now`, and their `peak`. For the CPU, whose allocator keeps no statistics.

    Tensors with the shape of one of the model's weights are ignored, as gradients of weights rather than of
    activations. noticed() is called after each new tensor that an operator returns.
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
        """Count the storage of `tensor` from now until it is freed."""
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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # Parameters of mallopt, from glibc's malloc.h.


def keep_freed_memory():
    """Let this process keep the memory of freed CPU tensors and reuse it for later ones.

    By default, glibc requests memory from the system for each tensor of more than 32 MiB, returns it when the tensor is
    freed, and trims its heap. The system clears each page again when it is first written, which may take more than half
    as long as all the computation (benchmarks/allocator.py). With other allocators (musl, macOS, Windows) nothing
    changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # The largest size: never trim.


def in_mib(size):
    """`size` bytes in MiB, as text: "12.3"."""
    return f"{size / 2**20:.1f}"


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """{"allocated_bytes", "reserved_bytes"}: peaks since the last reset on CUDA; None elsewhere."""
    if device.type != "cuda":
        return None
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
