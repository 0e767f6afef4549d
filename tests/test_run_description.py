"""What a run tells of its techniques, and that a resumed one keeps its plan."""

import argparse
import contextlib
from types import SimpleNamespace

import pytest
import run_description
import torch

import memory_plan
from harness.planning import Plan

DATA = SimpleNamespace(size=32, train_labels=range(100))
PLAN = Plan(frozenset({"stem.relu1"}), 100, 80, 200, 150, 5, 1000, 0.1)


def run_with(facts, **arguments):
    known = {"channels_last": None, "grouped_convolution": None, "compile": True, "optimizer": "sgd"}
    known |= {"label_smoothing": 0.1, "keep_memory": True, "memory_budget": 0.8, "budget_of": "peak", "batch_size": 8}
    world = SimpleNamespace(device=torch.device("cpu"), size=1, say=lambda line: None)
    return SimpleNamespace(args=argparse.Namespace(**known | arguments), facts=facts, world=world, saved_facts=dict)


def test_compiling_is_named_among_what_changed_the_memory(monkeypatch):
    monkeypatch.setattr(run_description, "plan_of", lambda run: PLAN)
    run = run_with({"saved_activation_bytes": 50, "precision": "bf16"})
    assert "without compiling and half precision 0.0 (0.50 x)" in run_description.describe_effect(run)
    run.args.compile = False
    assert "without half precision 0.0 (0.50 x)" in run_description.describe_effect(run)


@pytest.mark.parametrize(
    ("layout", "arguments", "told"),
    [
        ({"milliseconds_a_picture": {}}, {}, "layout the fastest here before compiling"),
        ({"milliseconds_a_picture": {}}, {"compile": False}, "layout the fastest here"),
        ({"form": "groups"}, {}, "layout not measured (--deterministic)"),
        ({"form": "dense"}, {"channels_last": False, "grouped_convolution": "dense"}, "layout as requested"),
    ],
)
def test_why_a_layout_was_taken_is_told(layout, arguments, told):
    assert run_description._fast(run_with({"layout": layout}, **arguments))[0] == told


def test_freed_memory_is_told_of_on_a_cpu_alone():
    run = run_with({"layout": {"form": "groups"}})
    assert run_description._fast(run)[-1] == "freed memory kept"
    run.world.device = torch.device("cuda")
    assert "freed memory" not in "; ".join(run_description._fast(run))


def test_a_resumed_run_keeps_its_plan(monkeypatch):
    """The plan follows measured seconds: it would differ from the one that the record's measured bytes are of."""
    plans = iter([PLAN, PLAN._replace(redo=frozenset({"stem.conv1"}))])
    monkeypatch.setattr(memory_plan, "plan_recomputation", lambda timeline, peak, cost: next(plans))
    model = SimpleNamespace(rehearse=lambda *args, **layout: None)
    precision = SimpleNamespace(autocast=contextlib.nullcontext)
    first, resumed = run_with({}), run_with({})
    for run, kept in ((first, {}), (resumed, first.facts)):
        run.saved_facts = lambda kept=kept: kept
        assert memory_plan.plan_memory(model, DATA, run.args, run.world, precision, run) == PLAN
        assert model.policy == PLAN.redo
    assert resumed.facts == first.facts


@pytest.mark.parametrize(("processes", "cost"), [(1, "seconds"), (2, "flops")])
def test_the_processes_of_a_job_plan_alike(monkeypatch, processes, cost):
    """Each would measure other seconds."""
    costs = []
    monkeypatch.setattr(memory_plan, "plan_recomputation", lambda timeline, peak, cost: costs.append(cost) or PLAN)
    model, run = SimpleNamespace(rehearse=lambda *args, **layout: None), run_with({})
    run.world.size = processes
    precision = SimpleNamespace(autocast=contextlib.nullcontext)
    memory_plan.plan_memory(model, DATA, run.args, run.world, precision, run)
    assert costs == [cost]


def test_a_measured_peak_is_told_as_a_share_of_that_without_recomputation(monkeypatch):
    monkeypatch.setattr(run_description, "plan_of", lambda run: PLAN)
    plan = {"redo": ["stem.relu1"], "held_bytes": 80, "peak_bytes": 150 * 2**20, "plain_peak_bytes": 200 * 2**20}
    facts = {"saved_activation_bytes": 80, "precision": "fp32", "policy": ["stem.relu1"], "plan": plan}
    told = run_description.describe_effect(run_with(facts | {"measured": {"peak_bytes": 160 * 2**20}}, compile=False))
    assert "peak 160.0 (planned 150.0), without recomputation 200.0 (0.80 x), by recomputing 1 operations" in told
    whole = run_description.describe_effect(run_with(facts | {"plan": None, "policy": "block"}, compile=False))
    assert "without recomputation 0.0 (0.80 x)" in whole
