"""Activation checkpointing tensor by tensor: forward forgets some tensors, and backward redoes them.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", redo whole segments of a network. Here a model
names the steps of its forward, and for each step its output is either kept or redone from its inputs, which may in
turn be redone. So a BatchNorm and its ReLU, which cost one pass over memory, are redone without the convolution
before them, and so is the sum that ends a residual block.

Redoing computes the same numbers again, bit for bit on a CPU and to rounding on CUDA, where forward may take another
kernel; and it leaves BatchNorm's running statistics alone. A redone BatchNorm does not look for the mean and the
variance a second time, since autograd has them from forward.
"""

import torch

from harness.memory import count_saved, overlook_weight


class Tape:
    """One forward pass whose backward redoes the steps that `redo(name)` chooses.

    with Tape(redo) as tape:
        hidden = tape.run("conv", conv, x)
        out = tape.run("relu", lambda hidden: tape.batch_norm(bn, hidden).relu_(), hidden)

    A step takes tensors and returns one new tensor; it depends on its arguments and on parameters alone, and changes
    neither in place. What autograd saves outside `run` is kept, but for the output of the step before.
    """

    def __init__(self, redo):
        self._redo = redo
        self._saved = []  # What autograd has saved since the step before, or during the one that is running.
        self._last = []  # (output, _Step) of the step before, if it is redone.
        self._statistics = []  # (mean, inverse deviation) of each BatchNorm of the step that is running.
        self._known = None  # While a step is redone, an iterator over those of its forward.

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        # The hooks hold this tape: without them it goes as soon as backward is done, and not when the collector runs.
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
            # Detached, since a step outlives forward and must not hold its graph.
            operands = [getattr(tensor, "_step", tensor.detach()) for tensor in inputs]
            for tensor in inputs:
                # What needs no gradient is the model's own input, and there anyway.
                if tensor.requires_grad and not hasattr(tensor, "_step"):
                    count_saved(tensor)
            output._step = _Step(self, name, function, operands, self._statistics, output.device.type)
            self._last = [(output, output._step)]
        self._settle(redone + self._last)
        return output

    def redo(self, step, inputs):
        """The output of the _Step `step` once more, from its inputs, a list of tensors."""
        self._known = iter(step.statistics)
        try:
            with torch.no_grad(), torch.autocast(**step.autocast):
                return step.function(*inputs)
        finally:
            self._known = None

    def batch_norm(self, layer, x):
        """`layer(x)` for a BatchNorm layer in training, a new tensor that may be changed in place.

        When x is redone, running statistics stay as they are, and the batch's are those of forward.
        """
        if self._known is not None:
            mean, deviation = next(self._known)
            # The kernel of inference, told that the variance is 1: it forms the factors that the one of training does,
            # weight * deviation and bias - mean * factor, and so the same numbers.
            one = torch.ones_like(mean)
            return torch.native_batch_norm(x, layer.weight * deviation, layer.bias, mean, one, False, 0.0, 0.0)[0]
        layer.num_batches_tracked.add_(1)
        # What F.batch_norm itself calls; it returns the batch's statistics as well.
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
        # Detached: an operation that saves its own output would otherwise hold itself, out of the collector's sight.
        saved = _Saved(tensor.detach())
        self._saved.append(saved)
        return saved

    def _unpack(self, saved):
        return saved.tensor if saved.step is None else saved.step.use()


class _Saved:
    """What autograd holds in place of a saved tensor: the tensor, or the step that gives it again."""

    def __init__(self, tensor):
        self.tensor, self.step = tensor, None

    def settle(self, redone):
        """Let go of the tensor if it is one of `redone`, pairs of (tensor, step)."""
        for tensor, step in redone:
            if self.tensor.dtype == tensor.dtype and self.tensor.is_set_to(tensor):  # The same memory, read alike.
                self.tensor, self.step = None, step
                step.uses += 1
                return
        count_saved(self.tensor)


class _Step:
    """How to get a forgotten tensor back. Its operands are tensors, or the steps of forgotten ones."""

    def __init__(self, tape, name, function, operands, statistics, device):
        self.name, self.function, self.statistics = name, function, statistics
        self.uses = 0  # How often backward will ask for the result; after that it is forgotten again.
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
