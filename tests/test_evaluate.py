"""evaluate_model.py: its statistics, and the script as a user runs it."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import WORDS
from data_utils import SampleSet, read_sample, sample_files, tokenize_samples
from evaluate_model import bootstrap_interval, permutation_test, summarise
from model import load_scorer, save_scorer
from rouge_score.rouge_scorer import RougeScorer
from scorer_experiment import get_args_parser, validate

from harness.distributed import World
from harness.precision import choose_precision

EVALUATE = "SimCLS/evaluate_model.py"


@pytest.fixture(scope="module")
def scorer_path(encoders, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "scorer.bin"
    scorer, _, description = load_scorer(encoders["bert"], total_len=30, max_len=10)
    save_scorer(path, scorer, description)
    return path


def test_permutation_test_equals_all_exchanges():
    differences = np.random.default_rng(1).normal(0.3, 1, (11, 2))
    means = [
        np.abs((np.array(signs)[:, None] * differences).mean(0)) for signs in itertools.product((1, -1), repeat=11)
    ]
    exact = np.mean(np.array(means) >= np.abs(differences.mean(0)) - 1e-12, axis=0)
    assert permutation_test(differences) == pytest.approx(exact, abs=0.02)
    assert permutation_test(np.zeros((5, 1))) == 1
    assert permutation_test(np.ones((40, 1))) == pytest.approx(1 / 10_001)


def test_bootstrap_interval_is_that_of_the_mean():
    figures = np.random.default_rng(0).normal(0.4, 0.1, (400, 2))
    low, high = bootstrap_interval(figures)
    error = 1.96 * figures.std(0) / 20
    assert low == pytest.approx(figures.mean(0) - error, abs=error.max() / 10)
    assert high == pytest.approx(figures.mean(0) + error, abs=error.max() / 10)


def test_intervals_belong_to_their_systems():
    systems = {"generator": np.full((9, 3), 0.1), "SimCLS": np.full((9, 3), [0.2, 0.3, 0.4])}
    result = summarise(systems)
    assert result["documents"] == 9
    found = result["systems"]["SimCLS"]["rouge2"]
    assert (found["low"], found["mean"], found["high"]) == pytest.approx((0.3, 0.3, 0.3))


def test_samples_are_scored_as_in_training(run_script, sample_folder, encoders, scorer_path, tmp_path):
    output = tmp_path / "record.json"
    folder = sample_folder / "test"
    result = run_script(EVALUATE, "--samples", folder, "--scorer_path", scorer_path, "--output", output, cwd=tmp_path)
    record = json.loads(output.read_text())
    assert record["experiment"] == "simcls_evaluation"
    assert record["documents"] == 12
    assert list(record["systems"]) == ["generator", "SimCLS", "random", "worst", "best"]

    cpu = torch.device("cpu")
    scorer, encoding, _ = load_scorer(weights=scorer_path)
    assert (encoding.total_len, encoding.max_len) == (30, 10)
    samples = [read_sample(path) for path in sample_files(folder)]
    dataset = SampleSet(tokenize_samples(samples, encoding, 16, True), encoding, "cpu")
    args = get_args_parser("").parse_args([])
    expected = validate(scorer, dataset, args, choose_precision(None, cpu), World(0, 1, cpu))
    first = np.mean([dataset.rouge(number)[0] for number in range(12)], axis=0)
    for place, metric in enumerate(("rouge1", "rouge2", "rougeL")):
        means = {name: figures[metric]["mean"] for name, figures in record["systems"].items()}
        assert means["SimCLS"] == pytest.approx(expected[f"val_{metric}"], abs=1e-6)
        assert means["generator"] == pytest.approx(first[place], abs=1e-6)
        assert means["worst"] <= means["random"] <= means["best"]
        interval = record["systems"]["SimCLS"][metric]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert 0 < record["p_value"][metric] <= 1
    assert result.stdout.count("chosen candidate:") == 3
    assert f"{100 * record['systems']['best']['rouge1']['mean']:.2f} (" in result.stdout


def test_generated_candidates_are_those_of_the_chain(run_script, encoders, scorer_path, tmp_path):
    random = np.random.default_rng(0)
    with open(tmp_path / "data.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["abstract", "title"])
        rows.writerows([[" ".join(random.choice(WORDS, 20)), " ".join(random.choice(WORDS, 4))] for _ in range(60)])
    generation = ["--generator_name", encoders["t5"], "--dataset_name", "data.csv", "--num_cands", 4,
                  "--decoder_max_len", 8]  # fmt: skip
    score = ["--scorer_path", scorer_path]
    run_script(EVALUATE, *generation, *score, "--output", "one.json", cwd=tmp_path)
    run_script("SimCLS/gen_candidate.py", *generation, "--output_dir", "candidates", cwd=tmp_path)
    (folder,) = (path for path in (tmp_path / "candidates").iterdir() if path.is_dir())
    run_script("SimCLS/preprocess.py", "--src_dir", folder, "--tgt_dir", "test", "--split", "test", "--cand_num", 4,
               cwd=tmp_path)  # fmt: skip
    run_script(EVALUATE, "--samples", "test", *score, "--output", "two.json", cwd=tmp_path)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["documents"] == 6
    assert one["systems"] == two["systems"]
    assert one["p_value"] == two["p_value"]


def test_files_are_scored_as_rouge_score_does(run_script, tmp_path):
    references = ["Reads the file in one go", "A list of all names", "Sorted keys"]
    summaries = ["Reading a file", "names of a list", "nothing"]
    (tmp_path / "summaries.txt").write_text("\n".join(summaries) + "\n")
    (tmp_path / "references.txt").write_text("\n".join(references) + "\n")
    run_script(EVALUATE, "--summaries", "summaries.txt", "--references", "references.txt", cwd=tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    oracle = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    scores = [oracle.score(*pair) for pair in zip(references, summaries, strict=True)]
    for metric, name in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rougeL", "rougeLsum")):
        expected = np.mean([score[name].fmeasure for score in scores])
        assert record["systems"]["summaries"][metric]["mean"] == pytest.approx(expected, abs=1e-12)
