"""Activation checkpointing tensor by tensor: forward drops some tensors, and backward recomputes them.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", recompute whole segments of a network. Here a model
names the steps of its forward; the output of each step is either kept or recomputed from its inputs, which may
themselves be recomputed. So a BatchNorm and its ReLU, which cost one pass over memory, are recomputed without the
convolution before them; so is the sum that ends a residual block.

Recomputation gives the same numbers, bit for bit on a CPU and up to rounding on CUDA, where it may use another kernel
than forward. It leaves BatchNorm's running statistics unchanged. A recomputed BatchNorm does not compute the mean and
variance again, since autograd has them from forward.
"""

import torch

from harness.memory import count_saved, overlook_weight


class Tape:
    """One forward pass whose backward recomputes the steps for which `redo(name)` is true.

    with Tape(redo) as tape:
        hidden = tape.run("conv", conv, x)
        out = tape.run("relu", lambda hidden: tape.batch_norm(bn, hidden).relu_(), hidden)

    A step takes tensors and returns one new tensor. It depends only on its arguments and on parameters, and changes
    neither in place. What autograd saves outside `run` is kept, except for the output of the step before.
    """

    def __init__(self, redo):
        self._redo = redo
        self._saved = []  # What autograd has saved since the last step, or during the current one.
        self._last = []  # (output, _Step) of the last step, if it is recomputed.
        self._statistics = []  # (mean, inverse deviation) of each BatchNorm in the current step.
        self._known = None  # While a step is recomputed, an iterator over its statistics from forward.

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        # The hooks refer to this tape; without them it is freed right after backward, not by the garbage collector.
        del self._hooks
        self._settle(self._last)
        self._last = []

    def run(self, name, function, *inputs):
        """Call `function(*inputs)` as the step `name`, and return its output."""
        self._settle(self._last)
        self._last, self._statistics = [], []
        output = function(*inputs)
        redone = [(tensor, tensor._step) for tensor in inputs if hasattr(tensor, "_step")]
        if self._redo(name):
            # Detached, since a step outlives forward and must not keep its graph alive.
            operands = [getattr(tensor, "_step", tensor.detach()) for tensor in inputs]
            for tensor in inputs:
                # A tensor that needs no gradient is the model's own input, which is in memory anyway.
                if tensor.requires_grad and not hasattr(tensor, "_step"):
                    count_saved(tensor)
            output._step = _Step(self, name, function, operands, self._statistics, output.device.type)
            self._last = [(output, output._step)]
        self._settle(redone + self._last)
        return output

    def redo(self, step, inputs):
        """Recompute the output of the _Step `step` from its inputs, a list of tensors."""
        self._known = iter(step.statistics)
        try:
            with torch.no_grad(), torch.autocast(**step.autocast):
                return step.function(*inputs)
        finally:
            self._known = None

    def batch_norm(self, layer, x):
        """`layer(x)` for a BatchNorm layer in training mode: a new tensor that may be changed in place.

        When x is recomputed, the running statistics do not change, and the batch statistics are those of forward.
        """
        if self._known is not None:
            mean, deviation = next(self._known)
            # The inference kernel, called with a variance of 1: it computes the same factors as the training kernel,
            # weight * deviation and bias - mean * factor, and so the same numbers.
            one = torch.ones_like(mean)
            return torch.native_batch_norm(x, layer.weight * deviation, layer.bias, mean, one, False, 0.0, 0.0)[0]
        layer.num_batches_tracked.add_(1)
        # F.batch_norm calls this too; it also returns the batch statistics.
        output, mean, deviation, *_ = torch._batch_norm_impl_index(
            x, layer.weight, layer.bias, layer.running_mean, layer.running_var, True, layer.momentum, layer.eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
        self._statistics.append((mean.detach(), deviation.detach()))
        return output

    def _settle(self, redone):
        for saved in self._saved:
            saved.settle(redone)
        self._saved.clear()

    def _pack(self, tensor):
        overlook_weight(tensor)
        # Detached: otherwise an operation that saves its own output would keep itself alive, unseen by the garbage
        # collector.
        saved = _Saved(tensor.detach())
        self._saved.append(saved)
        return saved

    def _unpack(self, saved):
        return saved.tensor if saved.step is None else saved.view(saved.step.use())


class _Saved:
    """What autograd holds in place of a saved tensor: the tensor, or the step that recomputes it."""

    def __init__(self, tensor):
        self.tensor, self.step = tensor, None
        self._layout = None  # Of a dropped tensor within the step's output: size, stride, offset.

    def settle(self, redone):
        """Drop the tensor if it is one of `redone`, pairs of (tensor, step), or a view of one, such as a chunk."""
        for tensor, step in redone:
            if self.tensor.dtype == tensor.dtype and _share_memory(self.tensor, tensor):
                offset = self.tensor.storage_offset() - tensor.storage_offset()
                self._layout = self.tensor.size(), self.tensor.stride(), offset
                self.tensor, self.step = None, step
                step.uses += 1
                return
        count_saved(self.tensor)

    def view(self, result):
        """The part of the step's `result` that autograd saved."""
        size, stride, offset = self._layout
        return result.as_strided(size, stride, result.storage_offset() + offset)


def _share_memory(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Step:
    """How to recompute a dropped tensor. Its operands are tensors, or the steps of dropped ones."""

    def __init__(self, tape, name, function, operands, statistics, device):
        self.name, self.function, self.statistics = name, function, statistics
        self.uses = 0  # How many more times backward will ask for the result; then it is dropped again.
        self._tape, self._operands = tape, operands
        self._result = None
        self.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": False,
        }

    def use(self):
        result = self.value()
        self.uses -= 1
        if self.uses <= 0:
            self._result = None
        return result

    def value(self):
        if self._result is None:
            inputs = [operand.value() if isinstance(operand, _Step) else operand for operand in self._operands]
            self._result = self._tape.redo(self, inputs)
        return self._result
