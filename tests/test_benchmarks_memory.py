"""The plans that benchmarks/memory.py compares: those that a search finds, and those like torch.compile's."""

import math
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import annealing
import memory

from harness.endings import UserError
from harness.planning import plan_recomputation
from models.resnext import ResNeXt
from models.resnext_checkpoint import CheckpointResNeXt

CPU = torch.device("cpu")


def test_the_search_finds_the_best_plan_of_a_small_model():
    timeline = CheckpointResNeXt(1, 4).train().rehearse(2, timed=False)
    ours = plan_recomputation(timeline, peak=0.85, held=0.6, cost="flops")
    assert ours.extra_flops > 0
    found = annealing.anneal(timeline, {"peak": 0.85, "held": 0.6}, 6000)
    assert ours.extra_flops / ours.plain_flops <= found <= 1.2 * ours.extra_flops / ours.plain_flops


def test_the_search_begins_with_the_plan_that_holds_least_and_may_find_none():
    timeline = CheckpointResNeXt(1, 4).train().rehearse(2, timed=False)
    assert annealing.anneal(timeline, {"held": 0.9}, 0) < 1
    assert annealing.anneal(timeline, {"peak": 0.001}, 3) == math.inf


def test_plans_like_torch_compiles_need_its_row_and_its_peak():
    args = memory.get_args_parser().parse_args(["--compile_backend", "inductor", "--steps", "0"])
    arms = memory.Bench(ResNeXt(1, 4), args, CPU).arms()
    assert "budget held as compile 0.5" in arms
    assert "budget peak as compile 0.5" not in arms  # Nobody knows it of Inductor's code on a CPU.
    with pytest.raises(UserError, match="it needs the row of compile 0.5"):
        arms["budget held as compile 0.5"](2, None)
