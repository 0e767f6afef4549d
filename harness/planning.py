"""Find the cheapest choice of tensors to keep for backward under a memory budget.

For every step of a Tape (harness.recompute), forward keeps the output or backward recomputes it. Two figures of a plan
are known before it runs: the bytes *held* for backward when forward ends, and the *peak*, the most bytes in memory at
once in forward and backward, including gradients and recomputed tensors. A process runs out of memory at the peak. A
plan that holds less may still peak higher, since what backward recomputes for one operation may be needed by many.

`simulate` follows a plan through the events of a rehearsed step (harness.rehearsal). `plan_recomputation` finds the
cheapest plan by dynamic programming over groups (a group is a block of the network). A group depends on earlier groups
only through the bytes that they hold, and the bytes that come back when their output is needed and recomputed. So the
search keeps every partial plan that no other matches or beats in all of these and in cost.
"""

import contextlib
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.endings import UserError
from harness.memory import LiveBytes, in_mib, reset_peak_memory

# Cost in FLOPs of moving a byte: almost nothing, so that it only decides between plans with equal FLOPs.
FLOPS_PER_BYTE = 1e-3
COSTS = {"seconds": lambda step: step.seconds, "flops": lambda step: step.flops + FLOPS_PER_BYTE * step.moved}
NO_PEAK = float("-inf")  # The maximum over nothing.


class Plan(NamedTuple):
    """redo: the names of the steps that backward recomputes. The figures are for one training step. plain: without
    recomputation; plain_flops covers forward and backward, with backward counted as twice forward."""

    redo: frozenset
    plain_bytes: int  # Held for backward when forward ends.
    held_bytes: int
    plain_peak_bytes: int
    peak_bytes: int
    extra_flops: int
    plain_flops: int
    extra_seconds: float

    def __str__(self):
        sizes = self.held_bytes, self.plain_bytes, self.peak_bytes, self.plain_peak_bytes
        held, plain, peak, plain_peak = map(in_mib, sizes)
        return (
            f"peak {peak} of {plain_peak} MiB ({self.peak_bytes / self.plain_peak_bytes:.3f}), held after "
            f"forward {held} of {plain} MiB ({self.held_bytes / self.plain_bytes:.3f}), recomputing {len(self.redo)} "
            f"operations: {100 * self.extra_flops / self.plain_flops:+.2f} % FLOPs, {1e3 * self.extra_seconds:+.0f} ms"
        )

    def compared_with(self, held_bytes, peak_bytes, extra_flops):
        """The measured bytes and FLOPs of a training step as text, each next to the planned value; None is left out."""
        parts = [
            f"{what} {in_mib(measured)} MiB (planned {in_mib(planned)})"
            for what, measured, planned in (
                ("peak", peak_bytes, self.peak_bytes),
                ("held", held_bytes, self.held_bytes),
            )
            if measured is not None
        ]
        if extra_flops is not None:
            extra, planned = (f"{100 * flops / self.plain_flops:+.2f}" for flops in (extra_flops, self.extra_flops))
            parts.append(f"{extra} % FLOPs (planned {planned})")
        return ", ".join(parts)


def describe(timeline, redo):
    """The Plan that recomputes the steps named in `redo`."""
    plain_bytes, plain_peak = simulate(timeline, frozenset())
    held, peak = simulate(timeline, redo)
    redone = [step for step in timeline.steps.values() if step.name in redo]
    return Plan(
        redo=frozenset(redo),
        plain_bytes=round(plain_bytes),
        held_bytes=round(held),
        plain_peak_bytes=round(plain_peak),
        peak_bytes=round(peak),
        extra_flops=round(sum(step.flops for step in redone)),
        plain_flops=round(3 * sum(step.flops for step in timeline.steps.values())),
        extra_seconds=sum(step.seconds for step in redone),
    )


def simulate(timeline, redo):
    """(bytes held when forward ends, bytes at the peak) of a training step whose backward recomputes `redo`."""
    steps = timeline.steps
    forward = _Walk(steps, redo)
    for event in itertools.chain.from_iterable(group.forward for group in timeline.groups):
        forward.follow(event)
    backward = _Walk(steps, redo, kept=[name for name in steps if name not in redo])
    held = timeline.fixed + backward.bytes
    for event in itertools.chain.from_iterable(group.backward for group in reversed(timeline.groups)):
        backward.follow(event)
    return held, max(*forward.peaks, *backward.peaks)


def plan_recomputation(timeline, peak=None, held=None, cost="seconds"):
    """The cheapest Plan that peaks at no more than `peak` times the plain step's peak and holds no more than `held`
    times what the plain step holds; None means no limit. cost: a key of COSTS, the cost of recomputation to minimise.

    UserError with the lowest feasible value if there is no such plan.
    """
    plain_held, plain_peak = simulate(timeline, frozenset())
    limits = [None if share is None else share * plain for share, plain in ((peak, plain_peak), (held, plain_held))]
    found = _cheapest(timeline, *limits, COSTS[cost])
    if found is None:
        raise UserError(_what_is_least(timeline, peak, held, plain_peak, plain_held))
    return describe(timeline, found)


def _what_is_least(timeline, peak, held, plain_peak, plain_held):
    if held is not None and (least := timeline.fixed / plain_held) > held:
        return f"a memory budget of {held:g} cannot be met; the smallest share that can be held is {least:.3f}"
    low, high = 0.0, 1.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        fits = _cheapest(timeline, middle * plain_peak, held and held * plain_held, lambda step: 0) is not None
        low, high = (low, middle) if fits else (middle, high)
    return f"a memory budget of {peak:g} cannot be met; the lowest peak that this model can have is {high:.3f}"


class StepCost:
    """Measures what a Plan predicts of a training step besides the bytes held, in a single step: the first one, or on
    CUDA the second, since in the first one cuDNN may try algorithms that need more memory than the one it selects.

    with cost.measured_forward():
        loss = criterion(model(images), labels)
    with cost.measured_backward():
        loss.backward()
    cost.peak_bytes, cost.redone_flops

    peak_bytes: the peak of forward and backward above the bytes allocated before. On CUDA it comes from the allocator,
    and includes the gradients of the weights and cuDNN's workspace; elsewhere it counts the tensors that operators
    return, without those gradients. redone_flops: of the forward convolutions that backward ran. Both are None until
    that step is done, and with enabled=False.
    """

    def __init__(self, model, device, enabled=True):
        self._device, self._on_cuda = device, device.type == "cuda"
        self._enabled = enabled
        self._steps = 0  # Begun so far.
        self._live = contextlib.nullcontext() if self._on_cuda else LiveBytes(model)
        self._before = 0
        self.peak_bytes = self.redone_flops = None

    @contextlib.contextmanager
    def measured_forward(self):
        self._steps += 1
        if not self._is_due():
            yield
            return
        if self._on_cuda:
            reset_peak_memory(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        with self._live:
            yield

    @contextlib.contextmanager
    def measured_backward(self):
        if not self._is_due():
            yield
            return
        with self._live, FlopCounterMode(display=False) as counter:
            yield
        peak = torch.cuda.max_memory_allocated(self._device) if self._on_cuda else self._live.peak
        self.peak_bytes = peak - self._before
        self.redone_flops = convolution_flops(counter)

    def _is_due(self):
        return not self.is_known and self._steps > self._on_cuda

    @property
    def is_known(self):
        """Whether there is nothing left to measure."""
        return not self._enabled or self.redone_flops is not None


def convolution_flops(counter):
    """The FLOPs of the forward convolutions that a FlopCounterMode has counted."""
    return counter.get_flop_counts().get("Global", {}).get(torch.ops.aten.convolution, 0)


# ---------------------------------------------------------------------- the search


class _Option(NamedTuple):
    """The effect of recomputing the steps `redo` of a group. Peaks are relative to what the earlier groups hold.

    held: bytes. forward: (peak, peak while the group's input is in memory anyway). backward: _Walk.peaks. returned:
    bytes of this group that come back when its output is needed and recomputed; None if the output is kept. reaches:
    whether the input has to come back, too. returning: _Walk.peaks meanwhile, relative to what this group holds as
    well.
    """

    redo: frozenset
    cost: float
    held: float
    forward: tuple
    backward: tuple
    returned: float | None
    reaches: bool
    returning: tuple

    @property
    def kind(self):
        """Options of different kinds cannot be compared."""
        return self.returned is None, self.reaches

    @property
    def figures(self):
        """Lower is better in each."""
        return (self.cost, self.held, *self.forward, *self.backward, self.returned or 0, *self.returning)


class _State(NamedTuple):
    """The effect of one choice for the groups so far: its cost, the bytes it holds, and the bytes that come back when
    the last group's output is needed and recomputed (`returned`), with their peak (`returning`)."""

    cost: float
    held: float
    returned: float
    returning: float
    redo: tuple  # (recomputed steps of the last group, `redo` before it)


def _cheapest(timeline, peak, held, cost):
    """The names of the steps to recompute, a frozenset with the lowest sum of cost(step); None if nothing fits the
    limits. peak, held: limits in bytes, or None."""
    peak = float("inf") if peak is None else peak
    room = float("inf") if held is None else held - timeline.fixed
    states = [_State(0, 0, 0, 0, ())]
    for index, group in enumerate(timeline.groups):
        options = _options(group, timeline.steps, cost, is_last=index == len(timeline.groups) - 1)
        following = (_follow(state, option, peak, room) for state in states for option in options)
        states = _unbeaten([state for state in following if state], lambda state: state[:4])
    if not states:
        return None
    parts, rest = [], min(states).redo
    while rest:
        part, rest = rest
        parts.append(part)
    return frozenset().union(*parts)


def _follow(state, option, peak, room):
    """The _State after `option`; None if it does not fit."""
    _, held, returned, returning, _ = state

    def highest(peaks):
        before, meanwhile, after = peaks
        return max(before, meanwhile + returning, after + returned)

    in_forward = option.forward[returned > 0]
    if held + option.held > room or held + max(in_forward, highest(option.backward)) > peak:
        return None
    back = reach = 0
    if option.returned is not None:
        back = option.returned + (returned if option.reaches else 0)
        reach = highest(option.returning)
    return _State(state.cost + option.cost, held + option.held, back, reach, (option.redo, state.redo))


def _options(group, steps, cost, is_last):
    """The _Options of a group, without those that another matches or beats in everything."""
    names = [step.name for step in group.steps]
    chosen = itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(len(names) + 1))
    options = [_option(group, steps, frozenset(redo), cost, is_last) for redo in chosen]
    kinds = {option.kind for option in options}
    of_kind = ([option for option in options if option.kind == kind] for kind in kinds)
    return [option for same in of_kind for option in _unbeaten(same, lambda option: option.figures)]


def _option(group, steps, redo, cost, is_last):
    kept = [step.name for step in group.steps if step.name not in redo]
    ahead = _Walk(steps, redo)
    alone = with_input = NO_PEAK
    input_bytes = steps[group.entry].bytes if group.entry else 0
    for event in group.forward:
        ahead.follow(event)
        if event.step == group.entry and event.kind == "left":
            input_bytes = 0
        if event.kind == "live":
            alone = max(alone, ahead.bytes + event.other)
            with_input = max(with_input, ahead.bytes + event.other + input_bytes)

    returning = _Walk(steps, redo, kept, group.entry)
    held, returning.bytes = returning.bytes, 0  # Groups that need the output already count what this one keeps as held.
    output = None if is_last else group.steps[-1].name
    if output in redo:
        returning.need(output, 0)
    back = _Walk(steps, redo, returning.there, group.entry)
    for event in group.backward:
        back.follow(event)
    return _Option(
        redo,
        cost=sum(cost(steps[name]) for name in redo),
        held=held,
        forward=(alone, with_input),
        backward=back.peaks,
        returned=returning.bytes if output in redo else None,
        reaches=group.entry in returning.there,
        returning=returning.peaks,
    )


class _Walk:
    """Tracks the bytes in memory from event to event, with `redo` recomputed and the outputs `kept` present at the
    start.

    entry: the entry of a Group that is followed on its own, a step whose bytes do not count. peaks: the most bytes
    before the entry is needed, while it comes back, and afterwards.
    """

    def __init__(self, steps, redo, kept=(), entry=None):
        self._steps, self._redo, self._entry = steps, redo, entry
        self.there = set(kept)
        self.bytes = sum(steps[name].bytes for name in self.there if name != entry)
        self.peaks = (NO_PEAK, NO_PEAK, NO_PEAK)

    def follow(self, event):
        if event.kind == "live":
            self._note(event.other)
        elif event.kind == "made":
            self._add(event.step)
        elif event.kind == "need":
            self.need(event.step, event.other)
        elif event.kind == "done" or event.step in self._redo:
            self._remove(event.step)

    def need(self, name, other):
        """Recompute the step `name` unless its output is in memory, after the steps that it is recomputed from, as a
        Tape does."""
        if name in self.there:
            return
        before, meanwhile, after = self.peaks
        if name == self._entry:
            self.there.add(name)
            self.peaks = before, max(meanwhile, self.bytes + other), after
            return
        for source in self._steps[name].inputs:
            self.need(source, other)
        self._note(other + self._steps[name].redo_bytes)
        self._add(name)

    def _note(self, other):
        before, meanwhile, after = self.peaks
        if self._entry in self.there:
            self.peaks = before, meanwhile, max(after, self.bytes + other)
        else:
            self.peaks = max(before, self.bytes + other), meanwhile, after

    def _add(self, name):
        self.there.add(name)
        self.bytes += self._steps[name].bytes

    def _remove(self, name):
        if name in self.there and name != self._entry:
            self.there.remove(name)
            self.bytes -= self._steps[name].bytes


def _unbeaten(items, figures):
    """The `items` that no other item matches or beats in every element of figures(item), a tuple; lower is better."""
    items = sorted(items, key=figures)
    table, numbers, found = np.array([figures(item) for item in items]), np.arange(len(items)), []
    while len(numbers):
        found.append(items[numbers[0]])
        is_better = (table < table[0]).any(1)
        table, numbers = table[is_better], numbers[is_better]
    return found
