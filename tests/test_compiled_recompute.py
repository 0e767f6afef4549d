"""What backward redoes under torch.compile: the plan's steps, to the bit, from the bytes and FLOPs that it predicts.

The backend aot_eager makes the same choice of what to keep as the default one, and runs it by operators: no compiler is
needed, and the numbers can be compared bit for bit.
"""

import functools
import json
import sys

import pytest
import resnext_fast
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from harness.memory import SavedBytes
from harness.planning import convolution_flops, describe, plan_recomputation
from models.resnext_checkpoint import CheckpointResNeXt

pytestmark = pytest.mark.slow
BATCH = 4


def step(model, half):
    """(gradients and buffers of one training step, bytes held, FLOPs of the convolutions that backward redoes)"""
    torch.manual_seed(1)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    with SavedBytes(model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = F.cross_entropy(model(images).float(), labels)
    with FlopCounterMode(display=False) as counter:  # Not in forward: under it torch.compile does nothing.
        loss.backward()
    tensors = {name: weight.grad for name, weight in model.named_parameters()} | dict(model.named_buffers())
    return tensors, saved.bytes, convolution_flops(counter)


def make():
    torch.manual_seed(0)
    return CheckpointResNeXt(2, 4, policy=()).train()


@pytest.mark.parametrize(
    ("choice", "half"), [((), False), ("block", True), ({"peak": 0.6}, True), ({"held": 0.2}, False)]
)
def test_a_compiled_plan_is_exact_and_holds_what_it_says(choice, half):
    torch.compiler.reset()
    model = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        timeline = model.rehearse(BATCH, timed=False)
    model.policy = choice
    if isinstance(choice, dict):
        model.policy = plan_recomputation(timeline, **choice, cost="flops").redo
    plan = describe(timeline, frozenset(filter(model.redo, timeline.steps)))
    assert bool(plan.redo) == bool(choice)
    expected, _, _ = step(make(), half)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.prepare_to_compile()
    model.compile(backend="aot_eager", dynamic=False)
    tensors, held, redone = step(model, half)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    weights = 2 * sum(weight.numel() for weight in model.parameters())  # Autocast's copies count, see SavedBytes.
    assert 0.99 * plan.held_bytes <= held <= 1.01 * plan.held_bytes + half * weights
    assert redone == plan.extra_flops


def test_everything_on_takes_a_budget_when_it_is_compiled(pictures, tmp_path, monkeypatch, capsys):
    without_code = functools.partial(torch.compile, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda model, **options: without_code(model))
    arguments = ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_2x4d", "--batch_size", 8,
                 "--num_epoch", 1, "--compile", "--memory_budget", 0.7, "--output_dir", tmp_path,
                 "--channels_last", "--grouped_convolution", "groups"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["resnext_fast.py", *map(str, arguments)])
    resnext_fast.main()
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert record["plan"]["held_bytes"] < 0.7 * record["plan"]["plain_bytes"]
    assert record["measured"]["held_bytes"] == pytest.approx(record["plan"]["held_bytes"], rel=0.03)
    assert "measured: held" in capsys.readouterr().out
