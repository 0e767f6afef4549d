"""benchmarks/exactness.py finds what computes something else; benchmarks/scaling.py says what a doubling costs."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from run_records import read_table

sys.path.append(str(ROOT / "benchmarks"))

import exactness
import fast
import fast_steps
import scaling

from layouts import Layout
from models.resnext import Block
from reporting import benchmarks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class DroppedReLU(Block):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn3(self.conv3(self.bn2(out))) + self.shortcut(x))


def of_another_class(model):
    model.layer3[2].__class__ = DroppedReLU


def without_gradient_of_two_groups(model):
    model.layer3[2].conv3.weight.register_hook(
        lambda gradient: gradient * (torch.arange(gradient.shape[1]) % 4 > 0)[:, None, None]
    )


@pytest.fixture(scope="module")
def exact_digits():
    """(the digits, what the first 32 of them give in float64)"""
    data = fast.load_images("digits", "")
    return data, exactness.Exact("resnext29_2x4d", data, fast.LongEpochs(len(data.train_labels), 32, seed=0), CPU)


FAULTS = {
    "none": None,
    "noise for pictures": None,
    "a dropped ReLU": of_another_class,
    "a quarter of a gradient": without_gradient_of_two_groups,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("half", ["False", "bfloat16"])
def test_a_wrong_arm_is_found_in_the_precision_that_it_runs_in(half, fault, exact_digits, monkeypatch):
    data, exact = exact_digits
    flags = ["--dataset", "digits", "--model", "resnext29_2x4d", "--batch_size", "32", "--half_precision", half]
    args = fast.Row("any", [*flags, "--channels_last", "True", "--grouped_convolution", "groups"]).args
    if fault == "noise for pictures":
        data = dataclasses.replace(
            data, train_images=np.random.default_rng(0).integers(0, 256, data.train_images.shape, dtype=np.uint8)
        )
    apply = Layout.apply
    monkeypatch.setattr(
        Layout, "apply", lambda self, model: (FAULTS[fault] or (lambda model: None))(model) or apply(self, model)
    )
    found = fast_steps.TrainingSteps(args, data, CPU).first_pass
    precision = "fp32" if half == "False" else "bf16"
    if fault == "none":
        assert max(exact.check("arm", precision, found)) > 0
    else:
        with pytest.raises(AssertionError, match="^arm: its (logits|gradient) are"):
            exact.check("arm", precision, found)


def test_scaling(monkeypatch, tmp_path, capsys):
    path = tmp_path / "scaling.json"
    small = ["--batch_sizes", "4", "8", "--models", "resnext29_1x4d", "--sides", "16", "32", "--pictures", "8", "16"]
    usual = ["--model", "resnext29_1x4d", "--batch_size", "4", "--rounds", "1", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *usual, *small])
    scaling.main()
    record = json.loads(path.read_text())
    rows = {(row["changed"], row["to"]): row for row in record["rows"] if row["changed"] != "threads"}
    assert [row["flops_times"] for row in rows.values() if row["flops_times"]] == [2.0, 4.0, 2.0]
    assert [row["milliseconds"] > 0 for row in rows.values()] == [True] * 7
    batch, side, pictures = (
        rows[key] for key in (("batch", "8"), ("side of the pictures", "32 px"), ("pictures, an epoch", "16"))
    )
    # Weights do not grow, activations do: with the pictures, but not with their number, of which only bytes are kept.
    assert 1.3 < batch["memory_times"] < 2
    assert 2 < side["memory_times"] < 4
    more = 2**20 * (pictures["memory_mib"] - rows["pictures, an epoch", "8"]["memory_mib"])
    assert more == pytest.approx(8 * 2 * 3 * 40 * 40, rel=0.01)
    text = benchmarks.render_tables({"here": [record]}, "scaling")
    assert text.startswith("Time and memory as the work grows, × the row above: resnext29_1x4d, ")
    assert read_table(text)[1]["FLOPs, ×"] == "2.00"
    assert "Time and memory as the work grows" in capsys.readouterr().out


def test_allocator(run_script, tmp_path):
    path = tmp_path / "allocator.json"
    small = ["--model", "resnext29_1x4d", "--batch_size", 4, "--steps", 1, "--rounds", 1, "--output", path]
    printed = run_script("benchmarks/allocator.py", *small).stdout
    record = json.loads(path.read_text())
    assert list(record["results"]) == ["original", "resnext_fast.py"]
    for way, found in record["results"].items():
        assert all(peak > 100 for peak in found["peak_mib"].values())
        assert f"{way}: given back and kept: page faults per step" in printed
    table = read_table(benchmarks.render({"here": [record]}))
    assert [row["Case"] for row in table] == ["resnext29_1x4d, original", "resnext29_1x4d, resnext_fast.py"]
