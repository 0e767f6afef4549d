"""Planning what backward redoes: what a plan takes is known before it runs, and there is no cheaper one."""

import copy
import gc
import itertools
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness import rehearsal
from harness.endings import UserError
from harness.memory import LiveBytes, SavedBytes
from harness.planning import StepCost, convolution_flops, describe, plan_recomputation, simulate
from harness.recompute import Tape
from models.resnext import parse_name
from models.resnext_checkpoint import POLICIES, CheckpointResNeXt

pytestmark = pytest.mark.slow

SMALL = parse_name("resnext29_2x4d")
CPU = torch.device("cpu")


class Chain(nn.Module):
    """A stem and three residual blocks of random widths, small enough to try every plan: 2 ** 11 of them."""

    def __init__(self, random):
        super().__init__()
        widths = [8, 8, *(int(width) for width in random.choice([4, 8, 24], 2))]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for inside, outside in itertools.pairwise(widths):
            middle = int(random.choice([4, 16, 32]))
            shortcut = [nn.Conv2d(inside, outside, 1)] if inside != outside else []
            parts = nn.Conv2d(inside, middle, 1), nn.BatchNorm2d(middle), nn.Conv2d(middle, outside, 3, padding=1)
            self.blocks.append(nn.ModuleList([*parts, *shortcut]))

    def forward(self, tape, x):
        x = tape.run("stem.out", lambda x: self.stem(x).relu_(), x)
        for index, (first, norm, second, *shortcut) in enumerate(self.blocks):
            out = tape.run(f"{index}.first", first, x)
            out = tape.run(f"{index}.relu", lambda out, norm=norm: tape.batch_norm(norm, out).relu_(), out)
            out = tape.run(f"{index}.second", second, out)
            x = tape.run(f"{index}.shortcut", shortcut[0], x) if shortcut else x
            x = tape.run(f"{index}.out", lambda out, x: F.relu(out.sin() + x.sin()), out, x)
        return x.mean((2, 3))


def chain(seed):
    """(a Chain, its Timeline, in which the steps take random times)"""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = Chain(random)
    timeline = rehearsal.rehearse(model, model, lambda count: torch.randn(count, 3, 16, 16), 4, timed=False)
    for group in timeline.groups:
        group.steps[:] = [step._replace(seconds=float(random.integers(1, 20))) for step in group.steps]
    return model, timeline


def measure(model, forward, images, **autocast):
    """(bytes held after forward, bytes at the peak, FLOPs of convolutions in backward) of a training step."""

    def loss():
        with torch.autocast("cpu", **(autocast or {"enabled": False})):
            return forward(images).float().sum()

    with SavedBytes(model) as saved:
        result = loss()
    with FlopCounterMode(display=False) as counter:
        result.backward()
    del result
    with LiveBytes(model) as live:
        loss().backward()
    return saved.bytes, live.peak, convolution_flops(counter)


def all_plans(timeline):
    names = list(timeline.steps)
    for choice in itertools.product((False, True), repeat=len(names)):
        yield frozenset(itertools.compress(names, choice))


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_is_cheaper_than_ours(seed):
    """Of all that there are, under limits of the peak, of what is held, and of both."""
    _, timeline = chain(seed)
    seconds = {name: step.seconds for name, step in timeline.steps.items()}
    plans = [(*simulate(timeline, redo), sum(map(seconds.get, redo))) for redo in all_plans(timeline)]
    plain_held, plain_peak, _ = plans[0]
    for peak, held in itertools.product((None, 0.95, 0.8, 0.7, 0.6, 0.5), (None, 0.8, 0.5, 0.3)):
        most = [size * (share or 9) for size, share in ((plain_peak, peak), (plain_held, held))]
        fitting = [cost for its_held, its_peak, cost in plans if its_peak <= most[0] and its_held <= most[1]]
        if not fitting:
            with pytest.raises(UserError, match="cannot be met"):
                plan_recomputation(timeline, peak, held)
            continue
        plan = plan_recomputation(timeline, peak, held)
        assert plan.extra_seconds == min(fitting)
        assert plan.held_bytes <= most[1]
        assert plan.peak_bytes <= most[0]
        assert (plan.held_bytes, plan.peak_bytes) == simulate(timeline, plan.redo)


@pytest.mark.parametrize("seed", range(3))
def test_what_any_plan_takes_is_known_before_it_runs(seed):
    """Of plans drawn at random, and so of redone outputs that need others redone, across blocks."""
    model, timeline = chain(seed)
    random = np.random.default_rng(seed)
    images = torch.randn(4, 3, 16, 16)

    def forward(images):
        with Tape(redo=redo.__contains__) as tape:
            return model(tape, images)

    for share in np.linspace(0, 1, 8):
        redo = frozenset(name for name in timeline.steps if random.random() < share)
        plan = describe(timeline, redo)
        held, peak, flops = measure(model, forward, images)
        assert plan.held_bytes == pytest.approx(held, rel=0.01)
        assert plan.peak_bytes == pytest.approx(peak, rel=0.01)
        assert plan.extra_flops == flops


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return CheckpointResNeXt(*SMALL).train()


@pytest.mark.parametrize("size", [4, 10])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("autocast", [{}, {"dtype": torch.bfloat16}], ids=["float32", "bfloat16"])
def test_a_resnexts_bytes_are_predicted(small, autocast, layout, size):
    layout = {"memory_format": getattr(torch, layout)}
    model = copy.deepcopy(small).to(**layout)
    images = torch.randn(size, 3, 32, 32).to(**layout)
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        timeline = model.rehearse(size, timed=False, **layout)
    plans = [plan_recomputation(timeline, cost="flops", **share) for share in ({"peak": 0.5}, {"held": 0.3})]
    for redo in ((), *POLICIES, *(plan.redo for plan in plans)):
        model.policy = redo
        plan = describe(timeline, frozenset(filter(model.redo, timeline.steps)))
        held, peak, flops = measure(model, model, images, **autocast)
        assert plan.held_bytes == pytest.approx(held, rel=0.01)
        assert plan.peak_bytes == pytest.approx(peak, rel=0.01)
        assert plan.extra_flops == flops


def test_a_budget_that_is_too_small_names_one_that_can_be_met(small):
    timeline = small.rehearse(4, timed=False)
    for limit in ("peak", "held"):
        with pytest.raises(UserError, match=f"0.001 cannot be met; the (smallest|lowest) .*{limit}") as error:
            plan_recomputation(timeline, **{limit: 0.001})
        least = float(re.search(r"is (0\.\d+)", str(error.value))[1])
        assert plan_recomputation(timeline, **{limit: least + 0.0005}).redo
        with pytest.raises(UserError):
            plan_recomputation(timeline, **{limit: least - 0.001})


def test_steps_are_timed_in_the_true_batch(small, monkeypatch):
    sizes = []
    redo = Tape.redo

    def noted(self, step, inputs):
        if isinstance(self, rehearsal._Stopwatch):
            sizes.append(len(inputs[0]))
        return redo(self, step, inputs)

    monkeypatch.setattr(Tape, "redo", noted)
    timeline = small.rehearse(5)
    assert set(sizes) == {5}
    assert all(step.seconds > 0 for step in timeline.steps.values())
    plan = plan_recomputation(timeline, peak=0.7)
    assert plan.extra_seconds == pytest.approx(sum(timeline.steps[name].seconds for name in plan.redo))


def test_planning_changes_nothing_and_leaves_nothing_behind(small, monkeypatch):
    tapes = []
    init = rehearsal._Rehearsal.__init__
    monkeypatch.setattr(
        rehearsal._Rehearsal, "__init__", lambda self, *args: (init(self, *args), tapes.append(weakref.ref(self)))[0]
    )
    before = copy.deepcopy(small.state_dict())
    small.rehearse(4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    gc.collect()
    assert [tape() for tape in tapes] == [None, None]


def test_a_steps_cost_is_measured_beside_its_plan_and_changes_nothing(small):
    plan = plan_recomputation(small.rehearse(4, timed=False), peak=0.6)
    results = []
    for measured in (True, False):
        model = copy.deepcopy(small)
        model.policy = plan.redo
        cost = StepCost(model, CPU, enabled=measured)
        for seed in range(2):  # Of which the first counts.
            torch.manual_seed(seed)
            images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
            with cost.measured_forward():
                loss = F.cross_entropy(model(images), labels)
            with cost.measured_backward():
                loss.backward()
        results.append([*model.state_dict().values(), *(weight.grad for weight in model.parameters())])
        if measured:
            assert cost.redone_flops == plan.extra_flops
            assert cost.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.01)
            assert plan.compared_with(plan.held_bytes, cost.peak_bytes, cost.redone_flops).count("planned") == 3
        else:
            assert (cost.redone_flops, cost.peak_bytes) == (None, None)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_on_a_gpu_the_second_step_is_measured(monkeypatch):
    """In the first cuDNN tries algorithms, of which some need much memory."""
    peak = {"now": 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["now"])
    cost, known = StepCost(torch.nn.Linear(1, 1), torch.device("cuda")), []
    for most in (900, 400, 700):
        with cost.measured_forward():
            peak["now"] = max(peak["now"], most)
        with cost.measured_backward():
            pass
        known.append((cost.is_known, cost.peak_bytes))
    assert known == [(False, None), (True, 300), (True, 300)]
    assert StepCost(torch.nn.Linear(1, 1), CPU, enabled=False).is_known


def test_what_a_step_moves_is_what_it_reads_and_writes():
    timeline = chain(0)[1]
    pictures, out = 4 * 3 * 16 * 16 * 4, timeline.steps["stem.out"].bytes
    assert timeline.steps["stem.out"].moved == pictures + out
    first = timeline.steps["0.first"]
    assert first.moved == out + first.bytes


def test_the_least_of_a_steps_times_counts(monkeypatch):
    clock = iter([0.0, 0.05, 1.0, 1.01, 2.0, 2.02])  # Three times, of 50, 10 and 20 ms.
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = rehearsal._Stopwatch()
    with torch.no_grad():
        watch.run("a.step", torch.sin, torch.ones(2))
    assert watch.seconds == {"a.step": pytest.approx(0.01)}


def test_what_a_step_needs_only_while_it_is_redone_counts():
    layer = nn.Linear(100, 100)

    def forward(tape, batch):
        out = tape.run("a.layer", layer, batch)
        return tape.run("a.wide", lambda out: torch.cat([out.sin()] * 8, 1)[:, :100].clone(), out).square()

    timeline = rehearsal.rehearse(layer, forward, lambda count: torch.randn(count, 100), 10, timed=False)
    row = 10 * 100 * 4
    assert [(step.bytes, step.redo_bytes) for step in timeline.steps.values()] == [(row, row), (row, 9 * row)]


def test_a_step_whose_output_backward_does_not_need_is_none():
    layer = nn.Linear(3, 3)

    def useless(tape, batch):
        return tape.run("a.sum", lambda out: out + 1, tape.run("a.layer", layer, batch)) + 1

    with pytest.raises(ValueError, match=r"backward does not need the outputs of \['a.layer'"):
        rehearsal.rehearse(layer, useless, lambda count: torch.randn(count, 3), 4, timed=False)
