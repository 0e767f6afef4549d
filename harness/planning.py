"""Which tensors to keep for backward under a memory budget.

Every step of a Tape (harness.recompute) has an output that forward can keep or backward redo. A redone output is
redone once, whoever asks for it, so the cost of a plan is the sum over the steps it redoes, and what it holds is the
sum over the others. Choosing the cheapest plan within a budget is a 0/1 knapsack with one rule about which steps may
be redone together; it is solved exactly, group by group (a group is a block of the network), by keeping at each stage
every plan that no other beats in both bytes and cost.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.endings import UserError
from harness.memory import LiveBytes, SavedBytes
from harness.recompute import Tape

# What moving a byte costs, in floating-point operations: about the balance of a current CPU. It makes the cheapest
# plan in FLOPs also frugal with redone element-wise steps, which have next to none.
FLOPS_PER_BYTE = 10


class Step(NamedTuple):
    """A step of forward: bytes of its output, the FLOPs of running it, the bytes it reads and writes, and the names of
    the steps that its inputs come from."""

    name: str
    bytes: int
    flops: int
    moved: int
    inputs: tuple

    @property
    def group(self):
        return self.name.rpartition(".")[0]

    @property
    def cost(self):
        return self.flops + FLOPS_PER_BYTE * self.moved


class Plan(NamedTuple):
    """redo: the names of the steps that backward redoes. Bytes and FLOPs are for one step of training.

    held_bytes are saved for backward when forward ends. peak_bytes counts, at the worst moment of backward, what is
    still saved, what has been redone, and the gradients of both.
    """

    redo: frozenset
    plain_bytes: int
    held_bytes: int
    peak_bytes: int
    extra_flops: int
    plain_flops: int  # Of forward and backward, the latter counted as twice the former.

    def __str__(self):
        plain, held, peak = (size / 2**20 for size in (self.plain_bytes, self.held_bytes, self.peak_bytes))
        extra = 100 * self.extra_flops / self.plain_flops
        return (
            f"keeps {held:.1f} of {plain:.1f} MiB ({held / plain:.3f}), peak {peak:.1f} MiB with gradients, "
            f"{extra:+.2f} % FLOPs, redoes {len(self.redo)} steps"
        )

    def compared_with(self, held_bytes, peak_bytes, extra_flops):
        """The measured bytes and FLOPs of a training step in words, each beside what was planned."""
        held, peak, planned, planned_peak = (
            f"{size / 2**20:.1f}" for size in (held_bytes, peak_bytes, self.held_bytes, self.peak_bytes)
        )
        extra, planned_extra = (f"{100 * flops / self.plain_flops:+.2f}" for flops in (extra_flops, self.extra_flops))
        return (
            f"keeps {held} MiB (planned {planned}), peak {peak} MiB (planned {planned_peak}), "
            f"{extra} % FLOPs (planned {planned_extra})"
        )


class StepCost:
    """Measures what a Plan predicts of a training step besides what it holds, in the first step alone.

    with cost.first_forward():
        loss = criterion(model(images), labels)
    with cost.first_backward():
        loss.backward()
    cost.peak_bytes, cost.redone_flops

    peak_bytes: of forward and backward, above what was there before. On CUDA it is the allocator's (PhaseTimer has
    reset it when the epoch began), with the gradients of the weights and what cuDNN works in; elsewhere it is of the
    tensors that operators return, without those gradients. redone_flops: of the forward convolutions that backward ran.
    Both are None before the first step, and with enabled=False.
    """

    def __init__(self, model, device, enabled=True):
        self._device, self._on_cuda = device, device.type == "cuda"
        self._enabled = enabled
        self._live = contextlib.nullcontext() if self._on_cuda else LiveBytes(model)
        self._before = 0
        self.peak_bytes = self.redone_flops = None

    @contextlib.contextmanager
    def first_forward(self):
        if not self._is_due():
            yield
            return
        if self._on_cuda:
            self._before = torch.cuda.memory_allocated(self._device)
        with self._live:
            yield

    @contextlib.contextmanager
    def first_backward(self):
        if not self._is_due():
            yield
            return
        with self._live, FlopCounterMode(display=False) as counter:
            yield
        peak = torch.cuda.max_memory_allocated(self._device) if self._on_cuda else self._live.peak
        self.peak_bytes = peak - self._before
        self.redone_flops = convolution_flops(counter)

    def _is_due(self):
        return self._enabled and self.redone_flops is None


def convolution_flops(counter):
    """The FLOPs of the forward convolutions that a FlopCounterMode has seen."""
    return counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)


class MeasuringTape(Tape):
    """A Tape that redoes nothing and notes every step in `steps`."""

    def __init__(self):
        super().__init__(redo=lambda name: False)
        self.steps = []
        self._made_by = {}  # id of an output -> (the output, so that its id stays its own; the step's name)

    def run(self, name, function, *inputs):
        with FlopCounterMode(display=False) as counter:
            output = super().run(name, function, *inputs)
        sources = tuple(self._made_by[id(tensor)][1] for tensor in inputs if id(tensor) in self._made_by)
        moved = sum(tensor.nbytes for tensor in (*inputs, output))
        self.steps.append(Step(name, output.nbytes, counter.get_total_flops(), moved, sources))
        self._made_by[id(output)] = (output, name)
        return output

    def forget(self):
        """Let the outputs go; the steps stay."""
        self._made_by.clear()


def plan_recomputation(model, forward, images, budget, total):
    """The cheapest Plan that holds at most `budget` times the plain run's saved activations.

    model: whose parameters do not count as saved. forward(tape, images) runs the model's training forward on a Tape;
    it is called on slices of `images` [n >= 4, ...], and may change no state. total: pictures in a real batch.
    UserError when even the leanest plan is over the budget.
    """
    few, more = images[:2].clone(), images[:4].clone()  # Slices would share a storage, which counts whole.
    tape = MeasuringTape()
    bytes_few, bytes_more = (_saved_bytes(model, forward, tape, batch) for batch in (few, more))
    steps = tape.steps[len(tape.steps) // 2 :]
    # Saved bytes are linear in the pictures; the constant part is what does not depend on them (cast weights, say).
    per_picture = (bytes_more - bytes_few) / (len(more) - len(few))
    plain_bytes = round(bytes_few + per_picture * (total - len(few)))
    scale = total / len(more)
    fixed = plain_bytes - scale * sum(step.bytes for step in steps)

    plans = [(0, 0, frozenset())]  # (bytes kept, cost, redone), by bytes; no plan is beaten by another in both.
    for _, group in itertools.groupby(steps, key=lambda step: step.group):
        options = _undominated(_options(list(group)))
        plans = _undominated(
            (kept + more_kept, cost + more_cost, redo | more_redo)
            for kept, cost, redo in plans
            for more_kept, more_cost, more_redo in options
        )
    fitting = [plan for plan in plans if fixed + scale * plan[0] <= budget * plain_bytes]
    if not fitting:
        least = (fixed + scale * plans[0][0]) / plain_bytes
        raise UserError(f"a memory budget of {budget} cannot be met; the least that this model can keep is {least:.3f}")
    kept, _, redo = min(fitting, key=lambda plan: plan[1])
    return Plan(
        redo=redo,
        plain_bytes=plain_bytes,
        held_bytes=round(fixed + scale * kept),
        peak_bytes=round(fixed + scale * _peak_bytes(steps, redo)),
        extra_flops=round(scale * sum(step.flops for step in steps if step.name in redo)),
        plain_flops=round(3 * scale * sum(step.flops for step in steps)),
    )


def _saved_bytes(model, forward, tape, images):
    with SavedBytes(model) as saved, tape:
        forward(tape, images)
    tape.forget()
    return saved.bytes


def _peak_bytes(steps, redo):
    """The most bytes of step outputs and of their gradients that are there at once in backward."""
    by_name = {step.name: step for step in steps}
    there = {step.name for step in steps if step.name not in redo}
    gradients = {steps[-1].name}
    peak = 0

    def bring_back(name):
        if name not in there:
            for source in by_name[name].inputs:
                bring_back(source)
            there.add(name)

    for step in reversed(steps):
        for name in (step.name, *step.inputs):
            bring_back(name)
        gradients.update(step.inputs)
        peak = max(peak, sum(by_name[name].bytes for names in (there, gradients) for name in names))
        there.discard(step.name)
        gradients.discard(step.name)
    return peak


def _options(group):
    """Yield (bytes kept, cost, redone) for every choice in a group of steps, the last of which leaves it.

    The last step's output is redone only from inputs that are kept, or that leave other groups: redoing a block never
    reaches into the convolutions of the block before it, and so the peak in backward stays near what is held.
    """
    names = {step.name for step in group}
    *inner, last = group
    for choice in itertools.product((False, True), repeat=len(group)):
        redone = frozenset(step.name for step, redo in zip(group, choice, strict=True) if redo)
        if last.name in redone and any(source in redone for source in last.inputs if source in names):
            continue
        kept = sum(step.bytes for step in group if step.name not in redone)
        yield kept, sum(step.cost for step in group if step.name in redone), redone


def _undominated(plans):
    """The plans, fewest bytes first, that no other beats in bytes without costing more."""
    best = []
    for plan in sorted(plans, key=lambda plan: plan[:2]):
        if not best or plan[1] < best[-1][1]:
            best.append(plan)
    return best
