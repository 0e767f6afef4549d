"""The benchmark of evaluation at its smallest: both sides run, and agree."""

import json

import tiny_inputs


def test_evaluation_agrees_with_the_originals_restated(run_script, encoders, tmp_path):
    table, output = tiny_inputs.make_table(tmp_path / "data.csv"), tmp_path / "evaluation.json"
    result = run_script("benchmarks/evaluation.py", "--data", table, "--generator_name", encoders["t5"],
                        "--documents", 3, "--rounds", 1, "--output", output)  # fmt: skip
    assert "3 of 3 choices are the same; ROUGE differs by at most 0.0e+00" in result.stdout
    record = json.loads(output.read_text())
    assert record["reference"].endswith("a plain restatement")
    assert len(record["seconds"]["plain"]) == len(record["seconds"]["ours"]) == 1
