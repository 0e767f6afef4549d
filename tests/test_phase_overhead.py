"""The benchmark of what timing the phases costs: its record."""

import json


def test_a_short_run_writes_its_record(run_script, tmp_path):
    result = run_script(
        "benchmarks/phase_overhead.py", "--rounds", 3, "--batch_size", 2, "--output", tmp_path / "a.json"
    )
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"] == {"model": "resnext29_1x4d", "batch_size": 2, "steps": 1, "rounds": 3}
    found = record["results"]["on over off"]
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    assert 0 < found["bare_share"] < 0.2
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("phase_overhead")]
    assert row[1:7] == ["on", "over", "off", "(a", "cost)", "3"]
    assert "at most 1.01" in result.stdout


def test_a_model_that_is_none_is_one_line(run_script):
    errors = run_script("benchmarks/phase_overhead.py", "--model", "resnet", code=2).stderr
    assert errors.count("\n") == 1
    assert "resnext29_{cardinality}x{width}d" in errors
