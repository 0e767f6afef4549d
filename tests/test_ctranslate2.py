"""--engine ctranslate2: the candidates of our own beam search, by an optional package."""

import argparse
import sys

import pytest
import torch
from conftest import ROOT

from harness.endings import UserError
from search.generator import (
    CandidateGenerator,
    add_search_arguments,
    begins_with_beam_search,
    check_search,
    load_generator,
    search_settings,
)

DEMO = str(ROOT / "SimCLS/demo")
TEXTS = [
    "Return the mean of an array along an axis. The result is a float.",
    "Compute the sum of two matrices and write it to a file that is opened before; raise an error where it is none.",
    "Parse a date.",
]


def make_generator(engine, *words, early_stopping=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--half_precision", nargs="?", const="auto")
    add_search_arguments(parser)
    args = parser.parse_args(["--search", "beam", "--num_cands", "4", "--engine", engine, *words])
    check_search(args)
    model, tokenizer = load_generator(DEMO)
    settings = search_settings(args, model.generation_config, args.search)
    return CandidateGenerator(model, tokenizer, settings | ({"early_stopping": True} if early_stopping else {}))


@pytest.mark.parametrize("length_penalty", ["1", "0.4"])
def test_both_engines_find_the_same_candidates_where_nothing_is_forbidden(length_penalty):
    pytest.importorskip("ctranslate2")
    words = ["--no_repeat_ngram_size", "0", "--min_length", "0", "--length_penalty", length_penalty]
    ours = make_generator("pytorch", *words, early_stopping=True)
    theirs = make_generator("ctranslate2", *words)
    assert begins_with_beam_search(theirs.settings)
    assert theirs.settings["engine"] == "ctranslate2, float32"
    assert theirs.fingerprint == ours.fingerprint
    sources = ours.tokenize(TEXTS)
    for some, others in zip(ours.generate(sources), theirs.generate(sources), strict=True):
        assert [each.text for each in some] == [each.text for each in others]
        assert [each.tokens for each in some] == [each.tokens for each in others]
        assert [each.log_prob for each in some] == pytest.approx([each.log_prob for each in others], abs=1e-3)


def test_a_likelihood_is_the_models_own_where_tokens_are_forbidden():
    pytest.importorskip("ctranslate2")
    words = ["--no_repeat_ngram_size", "1", "--min_length", "9", "--decoder_max_len", "12"]
    generator = make_generator("ctranslate2", *words)
    source = generator.tokenize(TEXTS[:1])
    ids = torch.tensor([source[0].tolist()])
    (found,) = [search(ids, torch.ones_like(ids)) for search in generator.searches]
    for tokens, log_prob, length in zip(found.tokens[0], found.log_probs[0], found.lengths[0], strict=True):
        with torch.no_grad():
            output = generator.model(input_ids=ids, decoder_input_ids=tokens[None, :length]).logits.log_softmax(-1)
        own = output[0].gather(1, tokens[1 : 1 + length, None]).sum()
        assert own.item() == pytest.approx(float(log_prob), abs=1e-3)


def test_int8_finds_something_like_it():
    pytest.importorskip("ctranslate2")
    generator = make_generator("ctranslate2_int8")
    candidates = generator.generate(generator.tokenize(TEXTS))
    assert [len(each) for each in candidates] == [4, 4, 4]
    assert generator.settings["engine"] == "ctranslate2, int8"


def test_what_it_cannot_do_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="supports only --search beam"):
        make_generator("ctranslate2", "--search", "diverse")
    with pytest.raises(UserError, match="computes in int8; leave --half_precision out"):
        make_generator("ctranslate2_int8", "--half_precision")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match="needs the package ctranslate2; pip install ctranslate2=="):
        make_generator("ctranslate2")
