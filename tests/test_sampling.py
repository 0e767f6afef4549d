"""Nucleus sampling: what is drawn, how often, and that a document's draws are its own."""

import pytest
import tiny_seq2seq
import torch

from harness.endings import UserError
from pretrained import model_folders
from search import generator
from search.sampling import NucleusSampling


def search(model, count=5, max_length=12, **settings):
    settings = {"num_samples": count, "top_p": 0.9, "seed": 0, "max_length": max_length} | settings
    return NucleusSampling(model, **settings)


def test_tokens_are_drawn_as_often_as_the_nucleus_says():
    model = tiny_seq2seq.build("t5")
    input_ids, mask = (each[:1] for each in tiny_seq2seq.documents(model))
    found = search(model, count=20_000, max_length=2, top_p=0.6)(input_ids, mask)
    drawn = torch.bincount(found.tokens[0, :, 1], minlength=model.config.vocab_size) / 20_000
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=start).logits[0, 0]
    best = logits.softmax(-1).sort(descending=True)
    inside = best.values.cumsum(0) - best.values < 0.6
    assert 1 < inside.sum() < 20
    expected = torch.zeros_like(logits)
    expected[best.indices[inside]] = best.values[inside] / best.values[inside].sum()
    assert not drawn[expected == 0].any()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_document_s_draws_are_its_own(name):
    """Whatever its batch, and whatever leaves it; their log-probabilities are those of the model alone."""
    model = tiny_seq2seq.build(name)
    input_ids, mask = tiny_seq2seq.documents(model)
    run = search(model, no_repeat_ngram_size=2, min_length=3)
    found = run(input_ids, mask)
    for row in range(len(input_ids)):
        length = int(mask[row].sum())
        alone = run(input_ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert found.tokens[row, :, : alone.tokens.shape[2]].tolist() == alone.tokens[0].tolist()
        assert found.lengths[row].tolist() == alone.lengths[0].tolist()
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    assert not torch.equal(search(model, seed=1, no_repeat_ngram_size=2)(input_ids, mask).scores, found.scores)
    tokens = found.tokens.flatten(0, 1)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    inputs = {key: each.repeat_interleave(5, dim=0) for key, each in inputs.items()}
    with torch.inference_mode():
        logits = model(**inputs, decoder_input_ids=tokens[:, :-1]).logits
    each = logits.double().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    counted = torch.arange(each.shape[1]) < found.lengths.flatten()[:, None]
    torch.testing.assert_close(found.log_probs.flatten(), (each * counted).sum(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scores, (found.log_probs / found.lengths).float())
    assert name == "bart" or len(set(found.lengths.flatten().tolist())) > 1


def test_forced_tokens_are_not_drawn():
    model = tiny_seq2seq.build("bart")  # It begins with token 0, and ends with 2 where it has not ended before.
    found = search(model, max_length=6)(*tiny_seq2seq.documents(model))
    whole = found.tokens[found.lengths == 5]
    assert len(whole)
    assert (found.tokens[:, :, 1] == 0).all()
    assert (whole[:, 5] == 2).all()


def test_a_nucleus_has_one_token_however_small_it_is():
    model = tiny_seq2seq.build("t5")
    found = search(model, top_p=1e-60)(*tiny_seq2seq.documents(model))
    likeliest = search(model, top_p=1e-6)(*tiny_seq2seq.documents(model))
    assert (found.tokens == found.tokens[:, :1]).all()
    assert torch.equal(found.tokens, likeliest.tokens)


def test_a_maximum_length_without_room_is_refused():
    with pytest.raises(ValueError, match="maximum length"):
        search(tiny_seq2seq.build("t5"), max_length=1)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.7), ("top_k", 10), ("typical_p", 0.5), ("repetition_penalty", 1.2)]
)
def test_settings_that_would_change_the_draws_are_refused(name, value):
    model = tiny_seq2seq.build("t5")
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"generation config sets {name}, which this search does not support"):
        search(model)


class Tokens(list):
    """A tokenizer that knows no token."""

    pad_token, model_max_length = "<pad>", 64

    def get_vocab(self):
        return {}


def test_dropout_is_all_of_the_generator_s(tmp_path, monkeypatch):
    tiny_seq2seq.build("bart").save_pretrained(tmp_path)
    monkeypatch.setattr(model_folders, "load_tokenizer", lambda *_, **__: Tokens())
    for check in ("check_start", "check_end", "check_target_vocabulary"):
        monkeypatch.setattr(generator, check, lambda *_: None)
    config = generator.load_generator(str(tmp_path), dropout=0.25)[0].config
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.25, 0.25, 0.25)
    monkeypatch.setattr(Tokens, "pad_token", None)
    with pytest.raises(UserError, match="its tokenizer has no pad token"):
        generator.load_generator(str(tmp_path))
