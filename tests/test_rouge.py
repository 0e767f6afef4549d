"""texts/rouge_scores.py against its oracle, the `rouge-score` package; and the benchmark that times it."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from harness.endings import UserError
from texts.documents import read_documents
from texts.rouge_scores import METRICS, check_references, mean_score, score
from texts.sentences import SentenceSplitter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PUBMED = ROOT.parent / "shared" / "data" / "pubmed_abstracts.csv.gz"
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "SimCLS")])

oracle = RougeScorer(METRICS, use_stemmer=True)

# Few different words: long and ambiguous common subsequences, where the choice among them shows in ROUGE-Lsum.
dense_sentences = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "running", "runs", "dying", "die", "x9"]), max_size=12).map(" ".join),
    max_size=5,
)
any_sentences = st.lists(st.text(max_size=40), max_size=4)
words = st.sampled_from(
    [
        "Relational",
        "skies",
        "İstanbul",
        "Kelvin",
        "naïve",
        "e.g.",
        "3.14",
        "don't",
        "--",
        "\x85",
        "\u2028",
        "ﬁne",
        "東京",
        "ß",
    ]
)
mixed_sentences = st.lists(st.lists(words, max_size=15).map(" ".join), max_size=4)


def assert_equal_to_oracle(reference, candidates):
    found = score(reference, candidates)
    for figures, candidate in zip(found, candidates, strict=True):
        expected = oracle.score("\n".join(reference), "\n".join(candidate))
        assert figures.tolist() == [expected[metric].fmeasure for metric in METRICS]


@settings(max_examples=300, deadline=None)
@given(dense_sentences, st.lists(dense_sentences, max_size=4))
@example([], [[], [""], ["a"]])
@example(["", "a"], [["a", "", "a"], ["a\na b", "b"]])
# Of the two longest common subsequences the one read off from the end counts, and a word that is in neither matters.
@example(["a b c"], [["b a x9 c", "c b"]])
def test_equal_to_rouge_score_where_subsequences_are_ambiguous(reference, candidates):
    assert_equal_to_oracle(reference, candidates)


@settings(max_examples=200, deadline=None)
@given(any_sentences, any_sentences)
def test_equal_to_rouge_score_on_any_text(reference, candidate):
    assert_equal_to_oracle(reference, [candidate, reference])


@settings(max_examples=100, deadline=None)
@given(mixed_sentences, mixed_sentences)
def test_equal_to_rouge_score_on_awkward_words(reference, candidate):
    assert_equal_to_oracle(reference, [candidate])


@pytest.mark.skipif(not PUBMED.exists(), reason="no PubMed abstracts here")
def test_equal_to_rouge_score_on_real_paragraphs():
    documents = read_documents(PUBMED)[:40]
    splitter = SentenceSplitter(document.text for document in documents)
    rng = random.Random(0)
    for document in documents:
        sentences = splitter.split(document.text)
        candidates = [rng.sample(sentences, min(3, len(sentences))) for _ in range(3)]
        assert_equal_to_oracle(sentences[:4], candidates)
        assert_equal_to_oracle([document.summary], candidates)


def test_mean_is_the_score_that_simcls_ranks_by():
    expected = oracle.score("the cat sat\nit slept", "a cat sat\nhe slept")
    mean = sum(expected[metric].fmeasure for metric in ("rouge1", "rouge2", "rougeLsum")) / 3
    assert mean_score(score(["the cat sat", "it slept"], [["a cat sat", "he slept"]])).tolist() == [mean]
    assert score(["the cat"], []).shape == (0, 3)


def test_where_no_wheel_exists_the_figures_are_the_same():
    code = """
import sys
sys.modules["rouge_score_rs"] = None
from texts import rouge_scores
assert rouge_scores.RougeScorer.__module__.startswith("rouge_score.")
print(rouge_scores.score(["The cats sat.", "It slept"], [["a cat sits", "it slept"], ["it"]]).tolist())
rouge_scores.score(["a"], [], "characters")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PATHS}
    )
    assert (
        json.loads(result.stdout) == score(["The cats sat.", "It slept"], [["a cat sits", "it slept"], ["it"]]).tolist()
    )
    assert "--rouge_tokens characters needs the package rouge-score-rs" in result.stderr


@pytest.mark.parametrize(
    ("reference", "standard", "unicode", "characters"),
    [
        ("猫坐在垫子上", 0.0, 1.0, 1.0),
        ("кошка спит", 0.0, 1.0, 1.0),
        ("แมวนอน", 0.0, 1.0, 1.0),
        ("Cats sleep.", 1.0, 1.0, 1.0),
    ],
)
def test_a_text_equals_itself_in_tokens_that_see_its_script(reference, standard, unicode, characters):
    found = [score([reference], [[reference]], tokens)[0, 0] for tokens in ("standard", "unicode", "characters")]
    assert found == [standard, unicode, characters]
    # Half of it: no figure is all or nothing.
    half = score([reference], [[reference[: len(reference) // 2]]], "characters")[0, 0]
    assert 0.4 < half < 0.8


def test_references_that_rouge_does_not_see_are_refused_and_a_few_are_told():
    said = []
    check_references(
        ["β-blockers after infarction of the heart", *40 * ["COVID-19 in Wuhan"]], "standard", "here", said.append
    )
    check_references(["кошка", "猫"], "characters", "here", said.append)
    assert not said
    check_references(["a cat", "猫", "a dog and a cat", "2020 12"], "standard", "here", said.append)
    assert said == ["here: 1 of 4 texts have no letter or digit that ROUGE counts; they score 0"]
    check_references(["Đường phố Hà Nội"], "standard", "here", said.append)
    assert said[1].startswith("here: the standard ROUGE tokens leave out 6 of 13 letters, ")
    for references in (["猫坐在垫子上", "DNA 与猫的关系"], ["кошка"], ["η γάτα", "a"], ["٢٠٢٠"]):
        with pytest.raises(UserError, match="add --rouge_tokens unicode"):
            check_references(references, "standard", "here", said.append)


@pytest.mark.parametrize("tokens", ["standard", "unicode", "characters"])
def test_references_without_a_letter_are_refused_whatever_is_counted(tokens):
    said = []
    with pytest.raises(UserError, match="^here: no text has a letter or digit"):
        check_references(["😀 🚀", "...", "?"], tokens, "here", said.append)
    check_references(["😀 🚀", "a", "b", "c"], tokens, "here", said.append)
    assert len(said) == 1
    assert said[0].startswith("here: 1 of 4 ")


def test_the_benchmark_proves_equality_and_records_a_ratio(tmp_path, run_script):
    rows = [
        (f"Cats of kind {index} sleep all day. Dogs do not. They run about.", f"Kind {index}") for index in range(12)
    ]
    with open(tmp_path / "cats.csv", "w", newline="") as file:
        csv.writer(file).writerows([("abstract", "title"), *rows])
    output = tmp_path / "rouge.json"
    result = run_script(
        "benchmarks/rouge.py", "--data", tmp_path / "cats.csv", "--rounds", 2, "--workers", 1, "--output", output
    )
    record = json.loads(output.read_text())
    assert "largest difference" in result.stdout
    assert record["largest_difference"] == 0
    assert record["pairs_checked"] == 16 * 24
    for timed in record["results"].values():
        assert timed["ratio"]["low"] <= timed["ratio"]["median"] <= timed["ratio"]["high"]
        assert [len(seconds) for seconds in timed["seconds"].values()] == [2, 2]
