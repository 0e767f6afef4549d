"""Measures the cost of each step of a training step on a Tape (harness.recompute), as input for harness.planning.

A small batch goes through forward and backward once, with every step recomputed. What happens is recorded as events: a
step's output is made, is left by forward, is needed by backward, is done with; each with the bytes of other tensors
(gradients and workspace) in memory at that time. Two small batches determine the bytes for any batch size. Then the
real batch goes through forward once, to time the recomputation of each step.
"""

import dataclasses
import functools
import time
import weakref
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.devices import synchronize
from harness.memory import LiveBytes, SavedBytes
from harness.recompute import Tape

FEW, MORE = 2, 4  # Batch sizes of the two rehearsals.
REPETITIONS, ENOUGH_SECONDS = 3, 0.2  # A step is recomputed this often for timing, or until this total time.


class Step(NamedTuple):
    """A step of forward. inputs: the names of the steps that its inputs come from. bytes: of its output. redo_bytes:
    the most that recomputing it needs, including its output. flops, seconds: of recomputing it. moved: bytes that it
    reads and writes."""

    name: str
    inputs: tuple
    bytes: int
    redo_bytes: int
    flops: int
    moved: int
    seconds: float = 0.0


EXTRAPOLATED = ("bytes", "redo_bytes", "flops", "moved")


class Event(NamedTuple):
    """kind: "made" (forward made a step's output), "left" (forward has left it; it is freed if it is recomputed),
    "need" (backward asks for it), "done" (backward no longer needs it), or "live" (of no step). other: the bytes of
    tensors that are no step's output; for "live", their maximum since the previous event."""

    kind: str
    step: str | None
    other: int


class Group(NamedTuple):
    """Consecutive steps, such as a block's. Their inputs come from these steps, or from `entry`: the last step of the
    previous group, the only one whose output leaves that group. forward, backward: lists of Event."""

    entry: str | None
    steps: list
    forward: list
    backward: list


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A training step: its groups in forward order; the last group holds what follows the last step. fixed: bytes that
    are held for backward whatever is recomputed."""

    groups: list
    fixed: int

    @functools.cached_property
    def steps(self):
        """{name: Step}"""
        return {step.name: step for group in self.groups for step in group.steps}


def rehearse(model, forward, make_batch, size, timed=True):
    """The Timeline of a training step of `model` on make_batch(size), a tensor whose first dimension is `size`.

    forward(tape, batch) runs the model's training forward on a Tape and returns its output. It is called several times,
    so `model` should be a copy of the one to train. timed: whether to measure the seconds of the steps.
    """
    few, more = (_rehearse_part(model, forward, make_batch(count)) for count in (FEW, MORE))
    watch = _Stopwatch()
    if timed:
        with torch.no_grad():
            forward(watch, make_batch(size))
    factor = (size - FEW) / (MORE - FEW)

    def line(a, b):
        return round(a + factor * (b - a))

    def steps(a, b):
        for one, other in zip(a, b, strict=True):
            figures = {name: line(getattr(one, name), getattr(other, name)) for name in EXTRAPOLATED}
            yield one._replace(**figures, seconds=watch.seconds.get(one.name, 0.0))

    def events(a, b):
        return [one._replace(other=line(one.other, other.other)) for one, other in zip(a, b, strict=True)]

    groups = [
        Group(a.entry, list(steps(a.steps, b.steps)), events(a.forward, b.forward), events(a.backward, b.backward))
        for a, b in zip(few.groups, more.groups, strict=True)
    ]
    return Timeline(groups, line(few.fixed, more.fixed))


def _rehearse_part(model, forward, batch):
    tape = _Rehearsal(model)
    with SavedBytes(model) as saved, tape.live, tape:
        output = forward(tape, batch)
    tape.begin_backward()
    with tape.live, torch.autocast(batch.device.type, enabled=False):
        output.sum().backward()
    model.zero_grad(set_to_none=True)
    needed = {event.step for group in tape.groups for event in group.backward if event.kind == "need"}
    unneeded = {step.name for group in tape.groups for step in group.steps} - needed
    if unneeded:  # Keeping it would take no memory, so there is nothing to plan.
        raise ValueError(f"backward does not need the outputs of {sorted(unneeded)}: they cannot be steps")
    return Timeline(tape.groups, saved.bytes)


class _Rehearsal(Tape):
    """A Tape that recomputes every step and records in `groups` what happens while `live` is entered.

    The first request of backward recomputes all steps, one from another, and the cost of each is stored in its Step.
    From then on, memory in backward is as if forward had kept everything.
    """

    def __init__(self, model):
        super().__init__(redo=lambda name: True)
        self.groups = [Group(None, [], [], [])]
        self.live = LiveBytes(model, self._notice)
        self._bytes_of_outputs = 0
        self._is_running = self._is_backward = False
        self._group = 0  # In backward: the group of the operation that saved the last unpacked tensor.
        self._redone_from = None  # Live bytes when the recomputation of a step began.

    def run(self, name, function, *inputs):
        group = name.rpartition(".")[0]
        last = self.groups[-1].steps
        if last and last[0].name.rpartition(".")[0] != group:
            self.groups.append(Group(last[-1].name, [], [], []))
        self._is_running = True
        with FlopCounterMode(display=False) as counter:
            output = super().run(name, function, *inputs)
        self._is_running = False
        sources = tuple(tensor._step.name for tensor in inputs if hasattr(tensor, "_step"))
        moved = sum(tensor.nbytes for tensor in (*inputs, output))
        step = Step(name, sources, output.untyped_storage().nbytes(), 0, counter.get_total_flops(), moved)
        self.groups[-1].steps.append(step)
        self._follow(name, output)
        self._note("made", name)
        return output

    def redo(self, step, inputs):
        self._redone_from, self.live.peak = self.live.now, self.live.now
        result = super().redo(step, inputs)
        self._set_redo_bytes(step.name, self.live.peak - self._redone_from)
        self._redone_from = None
        self._follow(step.name, result)
        return result

    def begin_backward(self):
        """Call between forward and backward; what follows the last step becomes a group of its own."""
        self._is_backward = True
        self._group = len(self.groups)
        self.groups.append(Group(self.groups[-1].steps[-1].name, [], [], []))

    def _set_redo_bytes(self, name, size):
        for group in self.groups:
            for index, step in enumerate(group.steps):
                if step.name == name:
                    group.steps[index] = step._replace(redo_bytes=size)

    def _follow(self, name, output):
        """From now on, attribute the storage of `output` to the step `name`, until it is freed."""
        storage = output.untyped_storage()
        self._bytes_of_outputs += storage.nbytes()
        weakref.finalize(storage, self._let_go, name, storage.nbytes())

    def _let_go(self, name, size):
        self._bytes_of_outputs -= size
        self._note("done" if self._is_backward else "left", name)

    def _notice(self):
        if self._redone_from is None:
            self._note("live", None)

    def _note(self, kind, name):
        group = self.groups[self._group if self._is_backward else -1]
        events = group.backward if self._is_backward else group.forward
        other = self.live.now - self._bytes_of_outputs
        if kind == "live" and events and events[-1].kind == "live":
            other = max(other, events.pop().other)
        events.append(Event(kind, name, other))

    def _pack(self, tensor):
        saved = super()._pack(tensor)
        # What is saved between two groups belongs to the later one; before the first step, to the first group.
        is_between = self.groups[-1].steps and not self._is_running
        saved.group = len(self.groups) - (0 if is_between else 1)
        return saved

    def _unpack(self, saved):
        self._group = saved.group
        tensor = super()._unpack(saved)
        if saved.step is not None:
            self._note("need", saved.step.name)
        return tensor


class _Stopwatch(Tape):
    """A Tape that times the recomputation of each step, {name: seconds}. Do not enter it: backward does not run."""

    def __init__(self):
        super().__init__(redo=lambda name: True)
        self.seconds = {}

    def run(self, name, function, *inputs):
        output = super().run(name, function, *inputs)
        times = []
        while len(times) < REPETITIONS and sum(times) < ENOUGH_SECONDS:  # Forward has warmed up.
            synchronize(output.device)
            start = time.perf_counter()
            again = self.redo(output._step, inputs)
            synchronize(output.device)
            times.append(time.perf_counter() - start)
            del again
        self.seconds[name] = min(times)
        return output
