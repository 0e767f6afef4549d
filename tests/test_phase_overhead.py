"""The benchmark of what timing the phases costs: its record, and its interval."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("phase_overhead", ROOT / "benchmarks" / "phase_overhead.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_holds_the_median_in_95_of_100_cases(benchmark):
    random = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        low, high = benchmark.median_interval(random.lognormal(0.0, 0.3, 100), np.ones(100))
        held.append(low <= 1.0 <= high)
    assert np.mean(held) == pytest.approx(0.955, abs=0.02)


def test_a_short_run_writes_its_record(run_script, tmp_path):
    result = run_script(
        "benchmarks/phase_overhead.py", "--rounds", 3, "--batch_size", 2, "--output", tmp_path / "a.json"
    )
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"] == {"model": "resnext29_1x4d", "batch_size": 2, "steps": 1, "rounds": 3}
    found = record["results"]["on over off"]
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    assert 0 < found["bare_share"] < 0.2
    assert "3 rounds of 1 steps" in result.stdout


def test_a_model_that_is_none_is_one_line(run_script):
    errors = run_script("benchmarks/phase_overhead.py", "--model", "resnet", code=2).stderr
    assert errors.count("\n") == 1
    assert "resnext29_{cardinality}x{width}d" in errors
