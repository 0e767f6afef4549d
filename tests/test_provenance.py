"""Where candidates, samples and scorers come from, and what does not belong together."""

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
