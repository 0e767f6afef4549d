"""The benchmark of evaluation at its smallest: both sides run, and agree."""

import json
import shutil

import tiny_inputs

from search.generator import load_generator


def test_evaluation_agrees_with_the_originals_restated(run_script, encoders, tmp_path):
    table, output = tiny_inputs.make_table(tmp_path / "data.csv"), tmp_path / "evaluation.json"
    # As the demonstration's generator, which the search restated has to follow.
    generator = shutil.copytree(encoders["t5"], tmp_path / "generator")
    model = load_generator(generator)[0].half()  # The file's precision is not that of the search.
    model.save_pretrained(generator)
    path = generator / "generation_config.json"
    config = json.loads(path.read_text()) | {"no_repeat_ngram_size": 1, "min_length": 5, "max_length": 12}
    path.write_text(json.dumps(config))
    result = run_script("benchmarks/evaluation.py", "--data", table, "--generator_name", generator,
                        "--documents", 5, "--rounds", 1, "--output", output)  # fmt: skip
    assert result.stdout.count("5 of 5 choices are the same; ROUGE differs by at most 0.0e+00") == 2
    record = json.loads(output.read_text())
    assert record["reference"].endswith("a plain restatement")
    assert [len(record["seconds"][arm]) for arm in ("plain", "batched", "ours")] == [1, 1, 1]
