"""Activation checkpointing tensor by tensor: forward forgets some tensors, and backward redoes them.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", redo whole segments of a network. Here a model
names the steps of its forward, and for each step its output is either kept or redone from its inputs, which may in
turn be redone. So a BatchNorm and its ReLU, which cost one pass over memory, are redone without the convolution
before them, and so is the sum that ends a residual block.

Redoing is exact: it runs the same operations on the same numbers, and leaves BatchNorm's running statistics alone.
"""

import torch
import torch.nn.functional as F

from harness.memory import count_saved, overlook_weight


class Tape:
    """One forward pass whose backward redoes the steps that `redo(name)` chooses.

    with Tape(redo) as tape:
        hidden = tape.run("conv", conv, x)
        out = tape.run("relu", lambda hidden: F.relu(tape.batch_norm(bn, hidden)), hidden)

    A step takes tensors and returns one new tensor; it depends on its arguments and on parameters alone, and changes
    neither in place. What autograd saves outside `run` is kept.
    """

    def __init__(self, redo):
        self._redo = redo
        self._saved = []  # What autograd has saved during the step that is running.
        self.redoing = False

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Saved.unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        # The hooks hold this tape: without them it goes as soon as backward is done, and not when the collector runs.
        del self._hooks
        self._settle([])

    def run(self, name, function, *inputs):
        """Call `function(*inputs)` as the step `name`, and return its output."""
        self._settle([])  # What was saved since the last step stays.
        output = function(*inputs)
        redone = [(tensor, tensor._step) for tensor in inputs if hasattr(tensor, "_step")]
        if self._redo(name):
            # Detached, since a step outlives forward and must not hold its graph.
            output._step = _Step(self, function, [getattr(tensor, "_step", tensor.detach()) for tensor in inputs])
            redone.append((output, output._step))
        self._settle(redone)
        return output

    def _settle(self, redone):
        for saved in self._saved:
            saved.settle(redone)
        self._saved.clear()

    def batch_norm(self, layer, x):
        """`layer(x)` for a BatchNorm layer in training; when x is redone, its running statistics stay as they are."""
        if not self.redoing:
            return layer(x)
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

    def _pack(self, tensor):
        overlook_weight(tensor)
        # Detached: an operation that saves its own output would otherwise hold itself, out of the collector's sight.
        saved = _Saved(tensor.detach())
        self._saved.append(saved)
        return saved


class _Saved:
    """What autograd holds in place of a saved tensor: the tensor, or the step that gives it again."""

    __slots__ = ("tensor", "step")

    def __init__(self, tensor):
        self.tensor, self.step = tensor, None

    def settle(self, redone):
        """Let go of the tensor if it is one of `redone`, pairs of (tensor, step)."""
        for tensor, step in redone:
            if _same_memory(self.tensor, tensor):
                self.tensor, self.step = None, step
                step.uses += 1
                return
        count_saved(self.tensor)

    def unpack(self):
        return self.tensor if self.step is None else self.step.use()


class _Step:
    """How to get a forgotten tensor back. Its operands are tensors, or the steps of forgotten ones."""

    def __init__(self, tape, function, operands):
        self.uses = 0  # How often backward will ask for the result; after that it is forgotten again.
        self._tape, self._function, self._operands = tape, function, operands
        self._result = None
        self._autocast = {
            "device_type": (device := _device_type(operands)),
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": False,
        }
        for operand in operands:
            if isinstance(operand, torch.Tensor):
                count_saved(operand)

    def use(self):
        result = self.value()
        self.uses -= 1
        if self.uses <= 0:
            self._result = None
        return result

    def value(self):
        if self._result is None:
            inputs = [operand.value() if isinstance(operand, _Step) else operand for operand in self._operands]
            with torch.no_grad(), torch.autocast(**self._autocast):
                self._tape.redoing = True
                try:
                    self._result = self._function(*inputs)
                finally:
                    self._tape.redoing = False
        return self._result


def _device_type(operands):
    tensor = operands[0]
    while isinstance(tensor, _Step):
        tensor = tensor._operands[0]
    return tensor.device.type


def _same_memory(one, other):
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
