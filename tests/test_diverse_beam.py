"""Diverse beam search against what transformers 4.56.2 generated.

fixtures/diverse_beam.json was written by record_diverse_beam.py with transformers 4.56.2, the last version that has the
algorithm, on tiny models whose weights are drawn by name (tiny_seq2seq.py), over batches of padded documents.
"""

import json
from pathlib import Path
from unittest import mock

import pytest
import tiny_seq2seq
import torch
from transformers.activations import ACT2FN

from search import diverse_beam, products
from search.bart_decoder import BartDecoder
from search.direct_decoder import DOCUMENTS_TOGETHER
from search.diverse_beam import LOGITS_TOGETHER, DiverseBeamSearch, top_k
from search.encoder_attention import ENCODER_ATTENTION, PaddedAttention, SeparateAttention
from search.generator import make_searches
from search.hypotheses import Hypotheses
from search.library_decoder import LibraryDecoder
from search.products import product
from search.t5_decoder import T5Decoder
from search.token_rules import forbid_repeats, make_decoder

RECORD = json.loads((Path(__file__).parent / "fixtures" / "diverse_beam.json").read_text())
FROM_GENERATION_CONFIG = ("eos_token_id", "suppress_tokens", "bad_words_ids")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def search(case, model=None):
    model = model or tiny_seq2seq.build(case["model"])
    settings = dict(case["settings"])
    for key in FROM_GENERATION_CONFIG:
        if key in settings:
            setattr(model.generation_config, key, settings.pop(key))
    settings["num_groups"] = settings.pop("num_beam_groups")
    return DiverseBeamSearch(model, **settings)(*tiny_seq2seq.documents(model))


def assert_equal_to_record(case, result):
    tokens, scores, *_ = result
    assert tokens.dtype == torch.int64
    ends = case["settings"].get("eos_token_id", [])
    # Of several end tokens, 4.56.2 always writes the first.
    found = [[ends[0] if token in ends else token for token in row] for row in tokens.flatten(0, 1).tolist()]
    assert found == case["sequences"], case["settings"]
    torch.testing.assert_close(scores.flatten(), torch.tensor(case["scores"]), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", tiny_seq2seq.MODELS)
def test_tokens_and_scores_equal_those_of_transformers_4_56(name):
    assert tiny_seq2seq.fingerprint(tiny_seq2seq.build(name)) == RECORD["models"][name]
    cases = [case for case in RECORD["cases"] if case["model"] == name]
    assert len(cases) >= 7
    for case in cases:
        assert_equal_to_record(case, search(case))


def test_of_several_end_tokens_the_one_that_was_generated_is_kept():
    """One of them may be text, such as a full stop."""
    case = next(case for case in RECORD["cases"] if len(case["settings"].get("eos_token_id", [])) == 3)
    written = set(search(case).tokens[:, :, 1:].flatten().tolist())
    assert len(written & set(case["settings"]["eos_token_id"])) > 1


def test_an_end_token_among_bad_words_still_ends():
    case = next(case for case in RECORD["cases"] if case["settings"].get("bad_words_ids"))
    end = tiny_seq2seq.build(case["model"]).generation_config.eos_token_id
    words = [*case["settings"]["bad_words_ids"], [end]]
    assert_equal_to_record(case, search(case | {"settings": case["settings"] | {"bad_words_ids": words}}))


def test_the_record_has_candidates_that_end_early_and_some_that_do_not():
    lengths = {case["model"]: set() for case in RECORD["cases"]}
    for case in RECORD["cases"]:
        end = 2 if case["model"] in ("bart", "mbart") else 1
        for tokens in case["sequences"]:
            lengths[case["model"]].add(tokens.index(end, 1) if end in tokens[1:] else None)
    assert all(len(found) >= 10 for found in lengths.values()), lengths


@pytest.mark.parametrize(("kind", "names"), [(T5Decoder, ("t5_gated", "mt5")), (BartDecoder, ("bart", "pegasus"))])
def test_the_general_path_gives_the_same_tokens(kind, names, monkeypatch):
    monkeypatch.setattr(kind, "supports", staticmethod(lambda model: False))
    for case in RECORD["cases"]:
        if case["model"] in names:
            model = tiny_seq2seq.build(case["model"])
            assert isinstance(make_decoder(model), LibraryDecoder)
            assert_equal_to_record(case, search(case, model))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_document_s_candidates_do_not_depend_on_its_batch(name):
    model = tiny_seq2seq.build(name)
    input_ids, mask = tiny_seq2seq.documents(model)
    run = DiverseBeamSearch(model, num_beams=6, num_groups=3, diversity_penalty=0.7, max_length=18)
    tokens, scores, *_ = run(input_ids, mask)
    for row in range(len(input_ids)):
        length = int(mask[row].sum())
        alone, alone_scores, *_ = run(input_ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert tokens[row, :, : alone.shape[2]].tolist() == alone[0].tolist()
        assert (tokens[row, :, alone.shape[2] :] == model.config.pad_token_id).all()
        torch.testing.assert_close(alone_scores[0], scores[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_searches_that_share_an_encoder_pass_find_what_each_finds_alone(name, monkeypatch):
    model = tiny_seq2seq.build(name)
    documents = tiny_seq2seq.documents(model)
    beam = {"num_beams": 4, "num_groups": 1, "diversity_penalty": 0.0, "max_length": 12}
    settings = [beam, beam | {"num_groups": 4, "diversity_penalty": 1.0}]
    settings.append({"num_samples": 4, "top_p": 0.9, "seed": 0, "max_length": 12})
    alone = [make_searches(model, [each])[0](*documents).tokens.tolist() for each in settings]
    together = make_searches(model, settings)
    encoded = together[0].encode(*documents)
    monkeypatch.setattr(type(together[0].decoder), "encode", None)
    assert [search(*documents, encoded).tokens.tolist() for search in together] == alone


@pytest.mark.parametrize("build", [lambda: tiny_seq2seq.build("t5"), tiny_seq2seq.build_switch])
def test_one_group_is_plain_beam_search(build):
    model = build()
    input_ids, mask = tiny_seq2seq.documents(model)
    settings = {"num_beams": 5, "max_length": 14, "early_stopping": True}
    expected = model.generate(input_ids=input_ids, attention_mask=mask, num_return_sequences=5, **settings)
    tokens, *_ = DiverseBeamSearch(model, num_groups=1, diversity_penalty=0.0, **settings)(input_ids, mask)
    for ours, theirs in zip(tokens.flatten(0, 1).tolist(), expected.tolist(), strict=True):
        end = (theirs + [1]).index(1, 1) + 1  # What the library puts behind the end token is not always padding.
        assert ours[:end] == theirs[:end]


@pytest.mark.parametrize("name", tiny_seq2seq.MODELS)
@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 6, "num_groups": 3, "no_repeat_ngram_size": 1, "min_length": 5}, {"num_beams": 5, "num_groups": 1}],
)
def test_log_probabilities_are_those_of_the_model_alone(name, settings):
    """Whatever was penalised, forbidden or forced: those of a teacher-forced forward, over the counted tokens."""
    model = tiny_seq2seq.build(name)
    input_ids, mask = tiny_seq2seq.documents(model)
    found = DiverseBeamSearch(model, diversity_penalty=1.5, max_length=12, **settings)(input_ids, mask)
    tokens, inputs = found.tokens.flatten(0, 1), {"input_ids": input_ids, "attention_mask": mask}
    inputs = {key: each.repeat_interleave(settings["num_beams"], dim=0) for key, each in inputs.items()}
    with torch.inference_mode():
        logits = model(**inputs, decoder_input_ids=tokens[:, :-1]).logits
    each = logits.double().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    end = model.config.eos_token_id
    for log_probs, some, total, length in zip(
        each, tokens.tolist(), found.log_probs.flatten(), found.lengths.flatten(), strict=True
    ):
        assert length == ((some + [end]).index(end, 1) if end in some[1:] else len(some) - 1)
        torch.testing.assert_close(total, log_probs[:length].sum(), rtol=0, atol=1e-4)
    assert name in ("bart", "mbart", "marian") or len(set(found.lengths.flatten().tolist())) > 1


def test_ended_beams_leave_the_batch(monkeypatch):
    rows = []
    step = T5Decoder.step
    monkeypatch.setattr(T5Decoder, "step", lambda self, tokens: (rows.append(len(tokens)), step(self, tokens))[1])
    case = next(case for case in RECORD["cases"] if case["settings"]["num_beams"] == 16)
    search(case)
    assert rows[0] == 4, "the beams of a document are one row until the first token"
    assert rows[1] == 4 * 16
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 4 * 16 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_new", "swish"])
def test_products_are_the_same_with_and_without_private_operators(activation, biased, dtype, monkeypatch):
    first, second, x = (torch.randn(rows, 32).to(dtype) for rows in (24, 8, 5))
    biases = [torch.randn(24).to(dtype), torch.randn(8).to(dtype)] if biased else []
    expected = x.float() @ torch.cat([first, second]).float().T + (torch.cat(biases).float() if biased else 0)
    expected = (ACT2FN[activation](expected) if activation else expected).to(dtype)
    # Without fusion, bfloat16 is rounded before the activation, too.
    near = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(product(first, second, biases=biases, activation=activation)(x), expected, **near)
    for error in (AttributeError, RuntimeError("an operator of another form")):
        packed = mock.Mock(side_effect=error)
        monkeypatch.setattr(products, "_packed_product", packed)
        torch.testing.assert_close(product(first, second, biases=biases, activation=activation)(x), expected, **near)
        assert packed.call_count == (activation in products.FUSED_ACTIVATIONS)


@pytest.mark.parametrize(
    ("name", "together", "private"),
    [
        *[("t5", 1, True), ("t5", 3, False), ("t5_gated", 3, True), ("mt5", 3, True)],
        *[("bart", 1, True), ("bart", 3, False), ("pegasus", 3, True), ("mbart", 3, True), ("marian", 3, True)],
    ],
)
def test_steps_equal_the_models_own_logits(name, together, private, monkeypatch):
    """Rows spread, change places within their document and leave; the logits stay those of the whole prefix."""
    if not private:
        monkeypatch.setattr(products, "_packed_product", mock.Mock(side_effect=AttributeError))
    monkeypatch.setitem(DOCUMENTS_TOGETHER, "cpu", together)
    monkeypatch.setattr("search.direct_decoder.CACHE_BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    model = tiny_seq2seq.build(name)
    input_ids, mask = tiny_seq2seq.documents(model)
    decoder = make_decoder(model)
    assert not isinstance(decoder, LibraryDecoder)
    prefix, document = torch.zeros(4, 0, dtype=torch.long), torch.arange(4)
    with torch.inference_mode():
        decoder.start(decoder.encode(input_ids, mask), max_length=10)
        for step in range(9):
            tokens = torch.randint(0, model.config.vocab_size, (len(document),), generator=generator)
            prefix = torch.cat([prefix, tokens.unsqueeze(1)], dim=1)
            logits = decoder.step(tokens)
            expected = model(input_ids=input_ids[document], attention_mask=mask[document], decoder_input_ids=prefix)
            # Logits of 1 to 10, whose rounding differs from one processor to another.
            torch.testing.assert_close(logits, expected.logits[:, -1], rtol=1e-3, atol=1e-3)
            if step == 0:
                decoder.spread(3)
                rows = torch.arange(4).repeat_interleave(3)
            elif step in (2, 4, 6):
                rows = (torch.rand(len(document), generator=generator) < 0.7).nonzero().squeeze(1)
                decoder.keep(rows)
            else:
                rows = (document * 100 - torch.arange(len(document))).argsort()  # backwards within each document
                decoder.reorder(rows)
            prefix, document = prefix[rows], document[rows]
    assert len(document) < 8, "no rows have left"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_half_precision_gives_whole_candidates(name):
    model = tiny_seq2seq.build(name).to(torch.bfloat16)
    settings = {"num_beams": 4, "num_groups": 4, "diversity_penalty": 1.0, "max_length": 10}
    tokens, scores, *_ = DiverseBeamSearch(model, **settings)(*tiny_seq2seq.documents(model))
    assert tokens.shape[:2] == (4, 4)
    assert (tokens[:, :, 0] == model.config.decoder_start_token_id).all()
    assert scores.isfinite().all()
    assert (scores[:, :-1] >= scores[:, 1:]).all()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("lengths", [[5], [5, 5], [7, 1, 12, 3]])
def test_padded_attention_of_the_encoder_is_that_of_each_document(lengths, biased):
    draws = torch.Generator().manual_seed(0)
    heads = torch.randn(sum(lengths), 3, 4, 8, generator=draws)
    bias = torch.randn(1, 4, max(lengths), max(lengths), generator=draws) if biased else None
    padded, separate = (kind(lengths, bias, heads.device)(heads) for kind in (PaddedAttention, SeparateAttention))
    assert padded.shape == (sum(lengths), 32)
    torch.testing.assert_close(padded, separate, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "mt5", "bart", "mbart"])
def test_what_a_gpu_does_gives_the_recorded_candidates(name, monkeypatch):
    """All documents of a batch together, in padded attention."""
    monkeypatch.setitem(DOCUMENTS_TOGETHER, "cpu", 4)
    monkeypatch.setitem(ENCODER_ATTENTION, "cpu", PaddedAttention)
    for case in RECORD["cases"]:
        if case["model"] == name:
            assert_equal_to_record(case, search(case))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_that_choose_one_by_one_find_the_recorded_candidates(name, monkeypatch):
    """As with a vocabulary of which few rows fit into the processor's cache."""
    monkeypatch.setitem(LOGITS_TOGETHER, "cpu", 1)
    for case in RECORD["cases"]:
        if case["model"] == name:
            assert_equal_to_record(case, search(case))


def test_float16_t5_takes_the_general_path():
    assert isinstance(make_decoder(tiny_seq2seq.build("t5").half()), LibraryDecoder)


@pytest.mark.parametrize(
    ("name", "overflows"), [("bart", False), ("marian", False), ("pegasus", False), ("pegasus", True), ("mbart", True)]
)
def test_float16_is_limited_as_by_the_library(name, overflows):
    model = tiny_seq2seq.build(name)
    if overflows:
        with torch.no_grad():
            for layer in model.get_encoder().layers:
                layer.fc2.bias.fill_(6e4)  # Twice is more than float16 holds.
    model = model.half()
    input_ids, mask = tiny_seq2seq.documents(model)
    theirs, ours = LibraryDecoder(model), make_decoder(model)
    assert isinstance(ours, BartDecoder)
    logits = []
    with torch.inference_mode():
        for decoder in (theirs, ours):
            decoder.start(decoder.encode(input_ids, mask), 4)
            logits.append(decoder.step(torch.full((4,), 2)))
    assert logits[1].isfinite().all()
    torch.testing.assert_close(*logits, rtol=0.02, atol=0.02)


def test_top_k_over_wide_rows():
    scores = torch.randn(7, 3000, generator=torch.Generator().manual_seed(1))
    scores[0, 2990:] += 10  # in the columns behind the last whole block
    scores[1, 128:140] += 10  # all in one block
    values, columns = top_k(scores, 9)
    expected = scores.topk(9)
    assert 2 * 9 * diverse_beam.BLOCK <= 3000, "the rows are too narrow to test anything"
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_repeated_ngrams_are_forbidden(size):
    history = torch.randint(0, 5, (20, 12), generator=torch.Generator().manual_seed(size))
    for length in (1, 2, 3, 12):
        scores = torch.zeros(20, 5)
        forbid_repeats(scores, history[:, :length], size)
        for row, tokens in enumerate(history[:, :length].tolist()):
            seen = {tuple(tokens[i : i + size]) for i in range(length - size + 1)}
            end = tokens[length - size + 1 :] if length >= size - 1 else None
            for token in range(5):
                banned = end is not None and (*end, token) in seen
                assert (scores[row, token] == float("-inf")) == banned


def test_contradictory_settings_are_refused():
    model = tiny_seq2seq.build("t5")
    good = {"num_beams": 4, "num_groups": 2, "diversity_penalty": 1.0, "max_length": 10}
    overflowing = {"length_penalty": 100, "max_length": 1300}, {"diversity_penalty": 1e39}
    for bad in ({"num_groups": 3}, {"max_length": 1}, *overflowing):
        with pytest.raises(ValueError, match=r"beams|maximum length|is not between"):
            DiverseBeamSearch(model, **(good | bad))
    model.generation_config.suppress_tokens = list(range(41))
    with pytest.raises(ValueError, match="suppresses all tokens"):
        DiverseBeamSearch(model, **good)
    model.generation_config.suppress_tokens = None
    for name, value in (
        ("repetition_penalty", 1.2),
        ("watermarking_config", {"bias": 2.0}),
        ("force_words_ids", [[3]]),
        ("max_time", 0.5),
        ("forced_decoder_ids", [[1, 3]]),
    ):
        setattr(model.generation_config, name, value)
        with pytest.raises(ValueError, match=f"sets {name}, which this search does not support"):
            DiverseBeamSearch(model, **good)
        setattr(model.generation_config, name, None)


def test_of_equal_hypotheses_the_first_stays_and_the_last_comes_first():
    kept = Hypotheses(1, 1, 3, 2, torch.device("cpu"))

    def offer(number, score):
        score = torch.full((1, 1), score, dtype=torch.float64)
        kept.add(torch.ones(1, 1, dtype=torch.bool), score, score, torch.full((1, 1, 2), number), 2)
        return kept.ranked()[0][0, :, 0].tolist()

    for number, score in enumerate((1.0, 1.0, 2.0), 1):
        offer(number, score)
    assert offer(4, 1.0) == [3, 2, 1]  # No better than the worst.
    assert offer(5, 1.5) == [3, 5, 2]  # The older of the worst goes.


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "best", "stops"),
    [
        (True, 1.0, -2.0, True),
        (False, 1.0, -20.0, True),  # -10 a token, of two tokens.
        ("never", 1.0, -20.0, False),  # Of nine tokens it would be -2.2.
        ("never", -1.0, -2.0, False),  # Each further token makes it worse: now it is -4.
        ("never", -1.0, -4.0, True),
    ],
)
def test_a_group_stops_when_its_best_open_beam_can_replace_nothing(early_stopping, length_penalty, best, stops):
    settings = {"num_beams": 2, "num_groups": 1, "diversity_penalty": 0.0, "max_length": 10}
    settings |= {"early_stopping": early_stopping, "length_penalty": length_penalty}
    beams = diverse_beam.Beams(DiverseBeamSearch(tiny_seq2seq.build("t5"), **settings), 1)
    for _ in range(2):
        assert not beams._cannot_improve(torch.full((1, 1), best, dtype=torch.float64), 2)
        score = torch.full((1, 1), -6.0, dtype=torch.float64)
        beams.ended.add(torch.ones(1, 1, dtype=torch.bool), score, score, torch.zeros(1, 1, 10, dtype=torch.long), 3)
    assert bool(beams._cannot_improve(torch.full((1, 1), best, dtype=torch.float64), 2)) == stops
