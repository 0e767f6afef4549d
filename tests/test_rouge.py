"""fast_rouge.py against its oracle, the `rouge-score` package; and the benchmark that times it."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from texts import fast_rouge
from texts.documents import read_documents
from texts.fast_rouge import METRICS, RougeReference, score_corpus
from texts.sentences import SentenceSplitter

ROOT = Path(__file__).resolve().parents[1]
PUBMED = ROOT.parent / "shared" / "data" / "pubmed_abstracts.csv.gz"
TOLERANCE = 1e-12

oracle = RougeScorer(list(METRICS), use_stemmer=True)

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
    prepared = RougeReference(reference)
    for candidate in candidates:
        expected = oracle.score("\n".join(reference), "\n".join(candidate))
        scores = prepared.score(candidate)
        for metric in METRICS:
            np.testing.assert_allclose(getattr(scores, metric), expected[metric], rtol=0, atol=TOLERANCE)


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
    scores = RougeReference(["the cat sat", "it slept"]).score(["a cat sat", "he slept"])
    expected = oracle.score("the cat sat\nit slept", "a cat sat\nhe slept")
    mean = sum(expected[metric].fmeasure for metric in ("rouge1", "rouge2", "rougeLsum")) / 3
    assert scores.mean == pytest.approx(mean, abs=TOLERANCE)


def test_a_full_stem_cache_is_emptied_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(fast_rouge._Stems, "CAPACITY", 3)
    fast_rouge.forget_stems()
    assert_equal_to_oracle(["running dogs chased seven sleeping cats"], [["sleeping cats ran from running dogs"]] * 2)
    assert len(fast_rouge._STEMS) <= 3


def test_a_corpus_is_scored_alike_by_one_process_and_by_two():
    references = [[f"document number {index} is about cats"] for index in range(150)]
    candidates = [[[f"number {index} cats"], ["cats", "document"], []][: index % 4] for index in range(150)]
    alone = list(score_corpus(references, candidates))
    shared = list(score_corpus(iter(references), iter(candidates), workers=2))
    assert [scores.shape for scores in alone] == [(index % 4 if index % 4 < 3 else 3, 4, 3) for index in range(150)]
    for one, two, reference, texts in zip(alone, shared, references, candidates, strict=True):
        np.testing.assert_array_equal(one, two)
        expected = [oracle.score("\n".join(reference), "\n".join(text)) for text in texts]
        for row, score in zip(one, expected, strict=True):
            np.testing.assert_allclose(row, [score[metric] for metric in METRICS], rtol=0, atol=TOLERANCE)


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
    assert record["largest_difference"] <= TOLERANCE
    assert record["pairs_checked"] == 16 * 24
    for timed in record["results"].values():
        assert timed["ratio"]["low"] <= timed["ratio"]["median"] <= timed["ratio"]["high"]
        assert [len(seconds) for seconds in timed["seconds"].values()] == [2, 2]
