"""evaluate_model.py: its statistics, and the script as a user runs it."""

import argparse
import csv
import functools
import itertools
import json
import shutil
import sys
from pathlib import Path

import evaluate_model
import gen_candidate
import numpy as np
import preprocess
import pytest
import torch
import transformers
from conftest import WORDS
from data_utils import SampleSet, tokenize_samples
from model import load_scorer, save_scorer
from rouge_score.rouge_scorer import RougeScorer

from harness.distributed import World
from harness.endings import UserError
from harness.precision import choose_precision
from scorer import choices, evaluation_record
from scorer.metrics import validate
from scorer.scorer_arguments import get_args_parser
from scorer.significance import bootstrap_interval, permutation_test, summarise
from search.generator import search_settings
from texts import provenance
from texts.rouge_scores import agreement, score
from texts.samples import as_sample, read_sample, sample_files
from texts.sentences import SentenceSplitter

pytestmark = pytest.mark.slow

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


def test_simcls_is_compared_with_the_strongest_rule_and_each_has_its_own_p_value():
    draws, chosen = np.random.default_rng(0), {"generator": 0.0, "most likely": 0.2, "longest": 0.1, "random": 0.0}
    systems = {name: draws.normal(0.3 + more, 0.05, (60, 3)) for name, more in chosen.items()}
    systems["SimCLS"] = systems["most likely"] + draws.normal(0, 1e-3, (60, 3))
    systems["SimCLS, scorer alone"] = systems["generator"] + 0.01
    result = summarise(systems)
    assert result["strongest"] == "most likely"
    alone = permutation_test(systems["SimCLS, scorer alone"] - systems["longest"])
    assert list(result["p_values_alone"]["longest"].values()) == pytest.approx(alone, abs=0.02)
    assert list(result["p_values"]) == ["generator", "most likely", "longest"]
    for name, p_values in result["p_values"].items():
        assert list(p_values.values()) == pytest.approx(permutation_test(systems["SimCLS"] - systems[name]), abs=0.02)
    assert max(result["p_values"]["longest"].values()) < 1e-3 < min(result["p_values"]["most likely"].values())


def test_rules_choose_what_they_say():
    texts = ["a cat sat", "the cat sat down", "a dog ran far off", "the cat sat"]
    candidates = [[[text], 0.0] for text in texts]
    likelihood = [[-3.0, 6], [-2.0, 2], [-5.0, 20], [-1.0, 1]]
    sample = {"candidates": candidates, "candidates_untok": candidates, "likelihood": likelihood}
    (sample,) = choices.with_agreement([sample])
    chosen = choices.by_rules([sample, sample])
    expected = {"generator": 0, "most likely": 2, "longest": 2, "Bayes risk": 3}
    assert {name: places.tolist() for name, places in chosen.items()} == {name: [n] * 2 for name, n in expected.items()}
    del sample["likelihood"]
    assert "most likely" not in choices.by_rules([sample])
    alike = agreement([["the cat sat"], ["the cat sat"], ["no dog"]])
    assert alike == pytest.approx([2 / 3, 2 / 3, 1 / 3])


def test_weights_are_used_only_with_what_they_weigh():
    warnings, both = [], {"likelihood": 0.04, "power": 1.0, "agreement": 0.1}
    assert evaluate_model.usable_weights(both, [{"likelihood": []}], warnings) == both
    assert evaluate_model.usable_weights(both | {"likelihood": 0.0, "agreement": 0.0}, [{}], warnings) is None
    assert evaluate_model.usable_weights(None, [{}], warnings) is None
    assert warnings == []
    without = both | {"likelihood": 0.0}
    assert evaluate_model.usable_weights(both, [{"likelihood": []}, {}], warnings) == without
    assert evaluate_model.usable_weights(both | {"agreement": 0.0}, [{}], warnings) is None
    assert len(warnings) == 2
    assert "choosing without" in warnings[0]


def test_samples_are_scored_as_in_training(run_script, sample_folder, encoders, scorer_path, tmp_path):
    output = tmp_path / "record.json"
    folder = sample_folder / "test"
    result = run_script(EVALUATE, "--samples", folder, "--scorer_path", scorer_path, "--output", output, cwd=tmp_path)
    record = json.loads(output.read_text())
    assert record["experiment"] == "simcls_evaluation"
    assert record["documents"] == 12
    assert list(record["systems"]) == ["generator", "longest", "Bayes risk", "random", "worst", "best", "SimCLS"]
    assert list(record["words"]) == list(record["systems"])
    assert record["rouge"].startswith("ROUGE-1, -2, -Lsum F1: rouge-score")
    assert result.stdout.splitlines()[-1] == record["rouge"]
    assert "no row for plain beam search" in result.stdout

    cpu = torch.device("cpu")
    scorer, encoding, _ = load_scorer(weights=scorer_path)
    assert (encoding.total_len, encoding.max_len) == (30, 10)
    samples = [read_sample(path) for path in sample_files(folder)]
    dataset = SampleSet(tokenize_samples(samples, encoding, 16, "standard"), encoding, "cpu")
    args = get_args_parser("").parse_args([])
    expected = validate(scorer, dataset, args, choose_precision(None, cpu), World(0, 1, cpu))
    first = np.mean([dataset.figures("rouge", number)[0] for number in range(12)], axis=0)
    for place, metric in enumerate(("rouge1", "rouge2", "rougeL")):
        means = {name: figures[metric]["mean"] for name, figures in record["systems"].items()}
        assert means["SimCLS"] == pytest.approx(expected[f"val_{metric}"], abs=1e-6)
        assert means["generator"] == pytest.approx(first[place], abs=1e-6)
        assert means["worst"] <= means["random"] <= means["best"]
        interval = record["systems"]["SimCLS"][metric]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert 0 < record["p_values"]["generator"][metric] <= 1
    assert result.stdout.count("chosen candidate:") == 3
    assert f"{100 * record['systems']['best']['rouge1']['mean']:.2f} (" in result.stdout


@pytest.mark.parametrize(
    ("fitted", "rule"),
    [
        ({"likelihood": 1e4, "power": 1.0, "agreement": 0.0}, "most likely"),
        ({"likelihood": 0.0, "power": 1.0, "agreement": 1e4}, "Bayes risk"),
    ],
)
def test_what_counts_beside_the_score_does_so_as_it_was_fitted(
    fitted, rule, run_script, sample_folder, scorer_path, tmp_path
):
    """So much, here, that nothing else does."""
    draws = np.random.default_rng(0)
    samples = shutil.copytree(sample_folder / "test", tmp_path / "samples")
    for path in samples.glob("[0-9]*.json"):
        sample = json.loads(path.read_text())
        pairs = [[draws.normal(-20, 5), int(draws.integers(5, 20))] for _ in sample["candidates"]]
        path.write_text(json.dumps(sample | {"likelihood": pairs}))
    for name in ("scorer.bin", "scorer.json"):
        shutil.copy(scorer_path.with_name(name), tmp_path)
    description = json.loads((tmp_path / "scorer.json").read_text())
    digest = provenance.digest_files([scorer_path])
    description["weights"] = fitted | {"scorer_digest": digest}
    (tmp_path / "scorer.json").write_text(json.dumps(description))
    run_script(EVALUATE, "--samples", samples, "--scorer_path", "scorer.bin", "--output", "record.json", cwd=tmp_path)
    systems = json.loads((tmp_path / "record.json").read_text())["systems"]
    assert systems["SimCLS"]["rouge1"]["mean"] == systems[rule]["rouge1"]["mean"]
    assert systems[evaluate_model.ALONE]["rouge1"]["mean"] != systems["SimCLS"]["rouge1"]["mean"]


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
    # Those samples are of diverse beam search: the generator makes the row of plain beam search.
    run_script(EVALUATE, "--samples", "test", *score, "--output", "two.json", *generation[:2], *generation[-2:],
               cwd=tmp_path)  # fmt: skip
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["documents"] == 6
    assert "plain beam" in one["systems"]
    assert "most likely" in one["systems"]
    for key in ("systems", "p_values", "words", "rouge", "provenance"):
        assert one[key] == two[key]
    assert one["warnings"] == []
    used = {name: one[name] for name in evaluation_record.USED}
    assert used["precision"] == "fp32"
    assert used["scorer_digest"] == provenance.digest_files([scorer_path])
    check = functools.partial(evaluate_model.refuse_to_replace, tmp_path / "one.json")
    with pytest.raises(
        UserError, match=r"is from an evaluation with --samples None \(now test\); choose another --output"
    ):
        check(one["arguments"] | {"samples": "test"}, used)
    for name, value, what in (("places", {"scorer_path": "another"}, "other folders with the same names"),
                              ("precision", "another", "another precision"),
                              ("scorer_digest", "another", "other scorer weights")):  # fmt: skip
        with pytest.raises(UserError, match=f"one.json already exists and is from an evaluation with {what};"):
            check(one["arguments"], used | {name: value})
    check(one["arguments"], used)


def test_an_evaluation_by_relative_paths_can_be_repeated_and_replaces_nothing_else(
    run_script, sample_folder, scorer_path, tmp_path
):
    shutil.copytree(sample_folder / "test", tmp_path / "test")
    for name in ("scorer.bin", "scorer.json"):
        shutil.copy(scorer_path.with_name(name), tmp_path)
    words = ["--samples", "test", "--scorer_path", "scorer.bin"]
    run_script(EVALUATE, *words, cwd=tmp_path)
    output = tmp_path / "evaluation.json"
    assert json.loads(output.read_text())["places"] == {}
    run_script(EVALUATE, *words, cwd=tmp_path)
    shutil.copy(tmp_path / "test/1.json", tmp_path / "test/0.json")
    refused = run_script(EVALUATE, *words, cwd=tmp_path, code=2).stderr
    assert "already exists and is from an evaluation with other contents of the input files; choose" in refused
    output.write_text(json.dumps(json.loads(output.read_text()) | {"experiment": "another"}))
    refused = run_script(EVALUATE, *words, cwd=tmp_path, code=2).stderr
    assert "evaluation.json already exists and is not an evaluation; choose another --output" in refused


SENTENCES = [
    "The dose was 5 mg. per day.",
    "It worked.",
    "Dr. No took 9 mg. of it.",
    "They slept.",
    "We came at 5 p.m. sharp.",
]


def test_generated_samples_are_those_of_gen_candidate_and_preprocess(encoders, tmp_path, monkeypatch):
    """Sentence by sentence, with the abbreviations that Punkt learns from the documents."""
    monkeypatch.setenv("NLTK_DATA", "/nowhere")
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    with open("data.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["abstract", "title"])
        for number in range(80):
            rows.writerow(
                [f"Text {number}. {' '.join(random.choice(SENTENCES, 9))}", " ".join(random.choice(SENTENCES, 2))]
            )
    words = (
        f"--generator_name {encoders['t5']} --dataset_name data.csv --dataset_percent 75 --num_cands 4 --num_groups 2 "
    )
    words += "--decoder_max_len 12 --no_repeat_ngram_size 2 --min_length 5 --length_penalty 0.5 --cand_gen_batch 5"
    args = evaluate_model.get_args_parser().parse_args(words.split())
    cpu = torch.device("cpu")
    how = World(0, 1, cpu), choose_precision(None, cpu)
    made, plain, _, _ = evaluate_model.load_candidates(args, *how)

    monkeypatch.setattr(sys, "argv", ["gen_candidate.py", *words.split()])
    gen_candidate.main()
    (folder,) = (path for path in Path("candidates").iterdir() if path.is_dir())
    words = f"--src_dir {folder} --tgt_dir test --split test --cand_num 4 --workers 1"
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *words.split()])
    preprocess.main()
    read = [read_sample(path) for path in sample_files("test")]
    assert len(read) == 6
    assert any("5 mg. per day" in " ".join(sample["article_untok"]) for sample in read)
    for one, two in zip(made, read, strict=True):
        assert json.loads(json.dumps({key: value for key, value in one.items() if key != "rouge"})) == two
        again = score(two["abstract"], [sentences for sentences, _ in two["candidates"]])
        assert one["rouge"].tolist() == again.tolist()

    # Plain beam search beside them is by that generator with those settings, and no other.
    words = ["--samples", "test", "--generator_name", encoders["t5"], "--cand_gen_batch", "5"]
    args = evaluate_model.get_args_parser().parse_args(words)
    beside = evaluate_model.load_candidates(args, *how)
    assert [sample["likelihood"] for sample in beside.plain] == [sample["likelihood"] for sample in plain]
    args = evaluate_model.get_args_parser().parse_args([*words, "--num_cands", "4", "--min_length", "2"])
    with pytest.raises(UserError, match="--min_length 2: the samples were made with 5; leave it out"):
        evaluate_model.load_search(args, *how, "beam", beside.origin)
    args.min_length = None
    with pytest.raises(UserError, match=f"the samples were made with {Path(encoders['t5']).name}, with other weights"):
        evaluate_model.load_search(args, *how, "beam", beside.origin | {"generator": "another"})


def test_sources_make_sentences_those_of_the_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", "/nowhere")
    texts = [" ".join(SENTENCES)] * 50
    (tmp_path / "sources").write_text("\n".join(texts))
    (tmp_path / "references").write_text("It worked. The dose was 5 mg. per day.\n")
    (tmp_path / "summaries").write_text("The dose was 5 mg. per week. It did.\n")
    split = SentenceSplitter(texts).split
    sample = as_sample("", "It worked. The dose was 5 mg. per day.", ["The dose was 5 mg. per week. It did."], split)
    monkeypatch.chdir(tmp_path)
    files = ["--summaries", "summaries", "--references", "references"]
    for more, expected in (["--sources", "sources"], sample["rouge"].tolist()), ([], None):
        judged = evaluate_model.judge_files(evaluate_model.get_args_parser().parse_args([*files, *more]))
        found = judged.systems["summaries"].tolist()
        assert (found == expected) == bool(expected)
        assert judged.facts["words"] == {"summaries": 9}


def test_counts_of_candidates_that_differ_are_told(capsys):
    samples = [{"candidates": [0] * 6}, {"candidates": [0] * 6}]
    evaluate_model.compare_counts(samples, 6, 6)
    evaluate_model.compare_counts(samples, None, None)
    assert capsys.readouterr().out == ""
    evaluate_model.compare_counts(samples, None, 16)
    assert "trained on 16 candidates per document, but chooses among 6 here" in capsys.readouterr().out
    with pytest.raises(UserError, match="have 6 candidates per document, not --num_cands 4"):
        evaluate_model.compare_counts(samples, 4, None)
    evaluate_model.compare_counts([*samples, {"candidates": [0] * 5}], None, None)
    assert "the documents have 5-6 candidates" in capsys.readouterr().out


def test_lengths_of_a_scorer_without_a_description_can_be_named(encoders, scorer_path, tmp_path):
    (tmp_path / "scorer.bin").write_bytes(scorer_path.read_bytes())
    _, encoding, _ = load_scorer(encoders["bert"], tmp_path / "scorer.bin", total_len=40, max_len=12)
    assert (encoding.total_len, encoding.max_len) == (40, 12)
    with pytest.raises(UserError, match="--max_len 2 leaves no room for a text; this model needs 3 tokens"):
        load_scorer(encoders["bert"], max_len=2)


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


def test_the_plain_beam_beside_samples_of_several_searches_is_as_their_beams(tmp_path):
    def searches(names, **more):
        asked = argparse.Namespace(num_cands=4, num_groups=None, diversity_penalty=1.0, top_p=0.9, seed=0,
                                   decoder_max_len=9, **more)  # fmt: skip
        return search_settings(asked, transformers.GenerationConfig(), names)

    args = evaluate_model.get_args_parser().parse_args(["--samples", "test"])
    for names in ("diverse", "diverse+sample", "sample+diverse"):
        origin = {"search": searches(names, length_penalty=2.0, min_length=3), "max_source_length": 50}
        ours = evaluate_model.as_in_samples(searches("beam") | {"num_beams": 8}, origin, args)
        assert ours == searches("beam", length_penalty=2.0, min_length=3)
    args.length_penalty = 1.0
    with pytest.raises(UserError, match="--length_penalty 1.0: the samples were made with 2.0; leave it out"):
        evaluate_model.as_in_samples(searches("beam"), origin, args)


def test_every_rule_that_is_free_is_a_rival_and_the_best_is_so_in_the_mean_of_the_three():
    draws, free = (
        np.random.default_rng(0),
        ("generator", "plain beam", "most likely", "longest", "Bayes risk", "random"),
    )
    systems = {name: draws.normal(0.3, 0.01, (20, 3)) for name in (*free, "best", "SimCLS")}
    tested = ["generator", "plain beam", "longest", "Bayes risk"]
    for name in free:
        lead = np.array([-0.1, 0.3, 0.3])  # Not the best by the first figure.
        result = summarise(systems | {name: systems[name] + lead})
        assert result["strongest"] == name
        assert list(result["p_values"]) == [each for each in free if each in tested or each == name]
