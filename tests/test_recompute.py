"""Activation checkpointing: exact, frugal, and planned optimally."""

import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from harness import planning
from harness.memory import SavedBytes
from harness.planning import Step, StepCost, _options, _undominated
from harness.recompute import Tape
from models.resnext import Block, ResNeXt, parse_name
from models.resnext_checkpoint import POLICIES, CheckpointResNeXt

SMALL = parse_name("resnext29_2x4d")


def batches(count, size=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


def train(model, steps=5, autocast=None):
    """Train for some steps; returns the losses and everything that training leaves behind."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    losses = []
    for images, labels in batches(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {f"{name}.grad": weight.grad for name, weight in model.named_parameters()}
    return {"losses": torch.stack(losses), **model.state_dict(), **gradients}


def models(policy):
    torch.manual_seed(0)
    plain = ResNeXt(*SMALL)
    checkpointed = CheckpointResNeXt(*SMALL, policy=policy)
    checkpointed.load_state_dict(plain.state_dict())
    return plain, checkpointed


def planned(model, budget):
    return model.plan(budget, 4).redo


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [*POLICIES, "nested", 0.6, 0.3])
def test_every_policy_is_bit_equal_with_the_plain_model(policy, autocast):
    plain, checkpointed = models(policy)
    if isinstance(policy, float):
        checkpointed.policy = planned(checkpointed, policy)
    assert_equal(train(plain, autocast=autocast), train(checkpointed, autocast=autocast))


def test_batch_norm_counts_each_batch_once():
    _, checkpointed = models("block")
    train(checkpointed, steps=3)
    assert {int(norm.num_batches_tracked) for norm in checkpointed.modules() if hasattr(norm, "momentum")} == {3}


def forward_convolutions(model):
    """FLOPs of forward convolutions that run in forward, and again in backward."""
    images, labels = next(batches(1))
    flops = []
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(images), labels)
    flops.append(counter.get_flop_counts()["Global"][torch.ops.aten.convolution])
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    flops.append(counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0))
    return flops


@pytest.mark.parametrize("policy", ["segments", "chain"])
def test_segments_and_chain_redo_no_convolution(policy):
    assert forward_convolutions(models(policy)[1])[1] == 0


def test_block_redoes_all_convolutions_but_the_stem():
    forward, again = forward_convolutions(models("block")[1])
    stem = 2 * 4 * 64 * 3 * 32 * 32
    assert again == forward - stem


def saved_bytes(model):
    images, labels = next(batches(1))
    with SavedBytes(model) as saved:
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return saved.bytes


def test_policies_save_what_they_say():
    plain = saved_bytes(models("segments")[0])
    held = {policy: saved_bytes(models(policy)[1]) / plain for policy in POLICIES}
    assert held["block"] < held["chain"] < held["segments"] < 0.8


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.5, 0.35])
def test_a_plan_keeps_its_budget_and_predicts_what_is_measured(budget):
    plain, checkpointed = models("chain")
    plan = checkpointed.plan(budget, 4)
    checkpointed.policy = plan.redo
    measured = saved_bytes(checkpointed)
    assert plan.plain_bytes == pytest.approx(saved_bytes(plain), rel=0.01)
    assert measured == pytest.approx(plan.held_bytes, rel=0.03)
    assert measured <= budget * saved_bytes(plain)
    assert forward_convolutions(checkpointed)[1] == plan.extra_flops
    assert plan.peak_bytes >= plan.held_bytes


@pytest.mark.parametrize("budget", [0.75, 0.35])
def test_a_steps_cost_is_measured_beside_its_plan_and_changes_nothing(budget):
    results, cpu = [], torch.device("cpu")
    for measured in (True, False):
        _, model = models("chain")
        plan = model.plan(budget, 4)
        model.policy = plan.redo
        cost = StepCost(model, cpu, enabled=measured)
        for images, labels in batches(2):  # Of which the first counts.
            with cost.first_forward():
                loss = F.cross_entropy(model(images), labels)
            with cost.first_backward():
                loss.backward()
        results.append({**model.state_dict(), **{name: weight.grad for name, weight in model.named_parameters()}})
        assert (cost.redone_flops, cost.peak_bytes is None) == ((plan.extra_flops, False) if measured else (None, True))
        if measured:
            assert cost.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.2)
            words = plan.compared_with(plan.held_bytes, cost.peak_bytes, cost.redone_flops)
            assert words.count("planned") == 3
    assert_equal(*results)


def test_a_plan_for_many_pictures_predicts_their_bytes():
    plain, checkpointed = models("chain")
    images, labels = (torch.cat([part] * 8) for part in next(batches(1)))
    with SavedBytes(plain) as saved:
        F.cross_entropy(plain(images), labels).backward()
    assert checkpointed.plan(0.9, len(images)).plain_bytes == pytest.approx(saved.bytes, rel=0.001)


def test_planning_leaves_the_model_as_it_was():
    _, checkpointed = models("chain")
    before = copy.deepcopy(checkpointed.state_dict())
    planned(checkpointed, 0.5)
    assert_equal(before, checkpointed.state_dict())


def test_half_precisions_copies_of_weights_are_no_saved_activations():
    """On a Tape no more than elsewhere: where nothing is redone, both save the same."""
    plain, checkpointed = models("segments")
    checkpointed.policy = ()
    sizes = []
    for model in (plain, checkpointed):
        with torch.autocast("cpu", torch.bfloat16):
            sizes.append(saved_bytes(model))
    assert sizes[0] == sizes[1]


def test_the_knapsack_is_exact():
    random = np.random.default_rng(0)
    for _ in range(20):
        groups = [
            [
                Step(f"g{group}.s{step}", *(int(value) for value in random.integers(1, 9, 3)),
                     (f"g{group}.s{step - 1}",) if step else ())
                for step in range(3)
            ]
            for group in range(3)
        ]  # fmt: skip
        plans = [(0, 0, frozenset())]
        for group in groups:
            options = list(_options(group))
            plans = _undominated((a + x, b + y, c | z) for a, b, c in plans for x, y, z in options)
        brute = [
            tuple(map(sum, zip(*((kept, cost) for kept, cost, _ in choice), strict=True)))
            for choice in itertools.product(*(list(_options(group)) for group in groups))
        ]
        for budget in range(5, 60, 5):
            fitting = [cost for kept, cost in brute if kept <= budget]
            ours = [cost for kept, cost, _ in plans if kept <= budget]
            assert (min(ours) if ours else None) == (min(fitting) if fitting else None)


def test_a_tape_frees_what_backward_has_used():
    held = []

    class Counting(Tape):
        def run(self, name, function, *inputs):
            output = super().run(name, function, *inputs)
            if hasattr(output, "_step"):
                held.append(output._step)
            return output

    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(16, 16, requires_grad=True)
    with Counting(redo=lambda name: name == "relu") as tape:
        hidden = tape.run("matmul", lambda x: x @ weight, x)
        out = tape.run("relu", F.relu, hidden)
        loss = tape.run("out", lambda out: (out @ weight).sum(), out)
    loss.backward()
    assert [step._result for step in held] == [None]
    assert [step.uses for step in held] == [0]


def test_names_and_parameter_counts():
    counts = {"2x64d": 9_128_778, "4x64d": 27_104_586, "8x64d": 89_598_282, "32x4d": 4_774_218}
    for name, count in counts.items():
        with torch.device("meta"):
            model = ResNeXt(*parse_name(f"resnext29_{name}"))
        assert sum(weight.numel() for weight in model.parameters()) == count
    for wrong in ("resnext29", "resnext29_0x4d", "resnext50_4x64d", "resnext29_4x64d ", "resnext29_-1x4d"):
        with pytest.raises(ValueError, match="resnext29"):
            parse_name(wrong)
    assert Block(64, 2, 4, 2)(torch.randn(2, 64, 32, 32)).shape == (2, 16, 16, 16)


@pytest.mark.parametrize("policy", ["chain", "block"])
def test_forward_without_backward_leaves_nothing_behind(policy):
    _, model = models(policy)
    alive = []
    with Tape(model.redo) as tape:
        out = model.run_steps(tape, next(batches(1))[0])
        alive += [weakref.ref(tape), weakref.ref(out)]
    del tape, out
    assert [reference() for reference in alive] == [None, None]


def test_counting_leaves_nothing_behind():
    saved_by_relu = []
    with SavedBytes(torch.nn.Linear(1, 1)):
        out = F.relu(torch.randn(9, requires_grad=True))
        saved_by_relu.append(weakref.ref(out))
    del out
    assert saved_by_relu[0]() is None


def test_planning_leaves_nothing_behind(monkeypatch):
    tapes = []
    init = planning.MeasuringTape.__init__
    monkeypatch.setattr(
        planning.MeasuringTape, "__init__", lambda self: (init(self), tapes.append(weakref.ref(self)))[0]
    )
    models("chain")[1].plan(0.5, 4)
    gc.collect()
    assert [tape() for tape in tapes] == [None]
