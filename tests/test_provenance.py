"""Where candidates, samples and scorers come from, and what does not belong together."""

import re

import pytest

from harness.endings import UserError
from texts import provenance


def test_what_does_not_belong_together_is_told():
    mine = {"digest": "a", "generator": "x", "search": {"num_beams": 8}, "text": "t", "text_name": "mine.csv"}

    def check(made, trained, **more):
        return provenance.check_belonging(made, {"samples": trained} | more, "standard")

    trained = {"split": "train", "candidates": mine}
    renamed = {"split": "test", "candidates": mine | {"text_name": "y"}}
    for ours in (None, {"candidates": None}, renamed):
        assert check(ours, trained) == check(renamed, None) == []
    (line,) = check(renamed, {"candidates": mine | {"search": {}, "generator": "y"}})
    assert "trained on candidates made with other settings (generator, search) than" in line
    (line,) = check(renamed | {"split": "train", "files": "x"}, trained | {"files": "y"})  # Of another search, say.
    assert "trained on the documents judged here" in line
    (line,) = check(renamed | {"split": "val"}, trained, validation=trained | {"split": "val"})
    assert "weights were chosen by the documents judged here" in line
    (line,) = check(renamed, trained, earlier_samples=[trained | {"split": "test"}])  # Of --model_pt.
    assert "trained on the documents judged here" in line
    for made, tokens in (({"rouge_tokens": "unicode"}, "standard"), ({}, "unicode")):
        (line,) = check(made, None, rouge_tokens=tokens)
        assert "made with --rouge_tokens unicode, not standard" in line
    assert check({"rouge_tokens": "standard"}, None, rouge_tokens="standard") == []
    assert [len(check({"digest": name}, {"digest": "x"})) for name in "xy"] == [1, 0]  # Without provenance.json.
    assert [len(check({"split": "val", "files": name}, {"split": "val", "files": "x"})) for name in "xy"] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"candidates": "x"}, "candidates is not an object"),
        ({"candidates": [1]}, "candidates is not an object"),
        ({"candidates": {"search": 5}}, "candidates.search is not an object"),
        ({"candidates": {"search": {"num_beams": "4"}}}, "candidates.search.num_beams is not a whole number above 0"),
        ({"search": {"searches": 5}}, "search.searches is not a list"),
        ({"cand_num": "3"}, "cand_num is not a whole number above 0"),
        ({"documents": 1.5}, "documents is not a whole number"),
        ({"rouge_tokens": ["x"]}, "rouge_tokens is not text"),
    ],
)
def test_a_damaged_file_is_refused(changes, wrong, tmp_path):
    made = provenance.describe(split="val", cand_num=3, candidates=None)
    provenance.write(tmp_path, made | changes)
    with pytest.raises(UserError, match=re.escape(f"provenance.json does not say what made these files ({wrong})")):
        provenance.read(tmp_path)
    provenance.write(tmp_path, made)  # Whoever makes the files anew replaces it.
    assert provenance.read(tmp_path) == made


def test_candidates_that_do_not_say_how_they_were_made_are_of_an_unknown_generator():
    whole = {"generator_name": "x", "generator": "y", "search": {"num_beams": 2}, "max_source_length": 9}
    assert provenance.origin({"candidates": whole}) == whole
    lacking = [{key: value for key, value in whole.items() if key != name} for name in whole]
    for candidates in (None, {}, *lacking, whole | {"search": {"searches": []}}):
        assert provenance.origin({"candidates": candidates}) is None
    assert provenance.origin(None) is None
