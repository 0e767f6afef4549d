"""The benchmarks of SimCLS: that of evaluation at its smallest, where both sides run and agree; and what they share."""

import json
import shutil
import sys
from types import SimpleNamespace

import tiny_inputs
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import candidate_sides

from search.generator import load_generator


def test_what_the_reference_answers_is_in_the_order_of_the_documents_without_their_padding():
    tokens = {7: [[2, 0, 5, 1, 1]], 8: [[2, 6, 1]]}
    reference = SimpleNamespace(ask=lambda request: {
        "seconds": 0.5, "tokens": [tokens[ids[0]] for batch in request["batches"] for ids in batch],
    })  # fmt: skip
    seconds, found = candidate_sides.run_reference(reference, [[7], [8]], [[1], [0]], {}, pad=1)
    assert (seconds, found) == (0.5, [[[2, 0, 5]], [[2, 6]]])


def test_the_share_of_candidates_that_another_precision_finds_counts_each_document_alike():
    ours = [[[1], [2], [3], [3]], [[7, 8], [9]]]
    assert candidate_sides.shared(ours, ours) == 1
    assert candidate_sides.shared([[[3], [1], [4], [5]], [[8, 7], [9]]], ours) == (2 / 3 + 1 / 2) / 2


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
