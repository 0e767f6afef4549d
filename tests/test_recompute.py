"""Activation checkpointing: exact and frugal. What it is planned by is in test_planning.py."""

import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from harness.memory import SavedBytes
from harness.planning import convolution_flops, plan_recomputation
from harness.recompute import Tape
from models.grouped_convolution import set_form
from models.resnext import Block, ResNeXt, parse_name
from models.resnext_checkpoint import POLICIES, CheckpointResNeXt

SMALL = parse_name("resnext29_2x4d")
BUDGETS = [("peak", 0.9), ("peak", 0.7), ("peak", 0.5), ("held", 0.5), ("held", 0.1)]


def make(policy=None):
    """A small model whose weights are always the same: a ResNeXt, or with a policy a CheckpointResNeXt."""
    torch.manual_seed(0)
    return CheckpointResNeXt(*SMALL, policy=policy) if policy is not None else ResNeXt(*SMALL)


@functools.cache
def rehearsed():
    return make(()).rehearse(4, timed=False)


def train(model, precision="float32", layout=torch.contiguous_format, steps=3):
    """Train for some steps; returns the losses and everything that training leaves behind."""
    model.to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32, generator=generator).to(memory_format=layout)
        labels = torch.randint(10, (4,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {f"{name}.grad": weight.grad for name, weight in model.named_parameters()}
    return {"losses": torch.stack(losses), **model.state_dict(), **gradients}


@functools.cache
def trained_plain(*how):
    return train(make(), *how)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [*POLICIES, "nested", *BUDGETS], ids=str)
def test_every_policy_is_bit_equal_with_the_plain_model(policy, precision, layout):
    if isinstance(policy, tuple):
        policy = plan_recomputation(rehearsed(), **dict([policy]), cost="flops").redo
        assert policy
    plain, checkpointed = trained_plain(precision, layout), train(make(policy), precision, layout)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_view_of_what_is_recomputed_is_recomputed_too(layout):
    """Separate convolutions save chunks of their input, which belongs to the step before."""
    trained, held = {}, {}
    for policy in (None, "chain"):
        for form in ("groups", "separate"):
            model = make_in(form, policy)
            with SavedBytes(model) as saved:
                model(torch.ones(2, 3, 32, 32).to(memory_format=layout))
            held[policy, form] = saved.bytes
            trained[policy, form] = train(make_in(form, policy), "float32", layout, steps=1)
    assert held["chain", "separate"] == held["chain", "groups"] < 0.6 * held[None, "separate"]
    for name, plain in trained[None, "separate"].items():
        assert torch.equal(plain, trained["chain", "separate"][name]), name


def make_in(form, policy):
    model = make(policy)
    set_form(model, form)
    return model


class Operators(TorchDispatchMode):
    """Notes (operator, its arguments) while it is entered."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append((operator, args))
        return operator(*args, **(kwargs or {}))


def test_a_redone_batch_norm_takes_its_statistics_from_forward():
    loss = make("block")(torch.randn(4, 3, 32, 32)).sum()
    with Operators() as operators:
        loss.backward()
    norms = [args for operator, args in operators.seen if operator is torch.ops.aten.native_batch_norm.default]
    # The stem's, and the two before a block's convolutions; its last is in the output, which is kept.
    assert [trains for _, _, _, _, _, trains, *_ in norms] == [False] * (1 + 2 * 9)


def test_a_batch_norm_that_runs_twice_has_the_statistics_of_each_time():
    torch.manual_seed(0)
    first, norm, x = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), torch.randn(4, 3, 9, 9)

    def gradients(redo):
        norm.reset_running_stats()
        first.zero_grad()
        with Tape(redo=lambda name: redo) as tape:
            out = tape.run("a", lambda x: tape.batch_norm(norm, x).sigmoid_(), first(x))
            out = tape.run("b", lambda x: tape.batch_norm(norm, x).sigmoid_(), first(out))
            out = tape.run("c", lambda x: tape.batch_norm(norm, tape.batch_norm(norm, x.exp())).sigmoid_(), out)
        out.sum().backward()
        return [first.weight.grad, *norm.state_dict().values()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def redone_flops(model):
    """FLOPs of forward convolutions that run in forward, and again in backward."""
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.randn(4, 3, 32, 32)).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return convolution_flops(forward), convolution_flops(backward)


def test_what_policies_redo():
    assert redone_flops(make("chain"))[1] == 0
    forward, again = redone_flops(make("block"))
    assert again == forward


def saved_bytes(model, precision="float32"):
    with SavedBytes(model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        model(torch.randn(4, 3, 32, 32))
    return saved.bytes


def test_policies_save_what_they_say():
    plain, chain, block = (saved_bytes(make(policy)) for policy in (None, "chain", "block"))
    assert block < 0.35 * plain < chain < 0.6 * plain


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_tape_that_redoes_nothing_saves_what_the_plain_model_does(precision):
    """Half precision's copies of the weights, which are no activations, among them."""
    assert saved_bytes(make(()), precision) == saved_bytes(make(), precision)


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


@pytest.mark.parametrize("policy", POLICIES)
def test_forward_without_backward_leaves_nothing_behind(policy):
    model, alive = make(policy), []
    with Tape(model.redo) as tape:
        out = model.run_steps(tape, torch.randn(4, 3, 32, 32))
        alive += [weakref.ref(tape), weakref.ref(out)]
    del tape, out
    assert [reference() for reference in alive] == [None, None]


def test_counting_leaves_nothing_behind():
    saved_by_relu = []
    with SavedBytes(nn.Linear(1, 1)):
        out = F.relu(torch.randn(9, requires_grad=True))
        saved_by_relu.append(weakref.ref(out))
    del out
    assert saved_by_relu[0]() is None


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
