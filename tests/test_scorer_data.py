"""What the scorer reads: token ids of samples, and batches. And what it makes of them, however they are batched."""

import json
import os
import shutil
from pathlib import Path

import data_utils
import numpy as np
import pytest
import safetensors.numpy
import torch
from data_utils import LengthBatches, SampleSet, TextEncoding, load_samples, tokenize_samples
from model import Scorer, load_encoder, load_scorer, score_samples

from harness.endings import UserError
from harness.precision import choose_precision
from texts import provenance
from texts.samples import check_training, provenance_of, read_sample, sample_files

CPU = torch.device("cpu")
FP32 = choose_precision(None, CPU)


@pytest.fixture(scope="module")
def encoding(encoders):
    return TextEncoding(load_encoder(encoders["t5"])[1], 60, 20)


# -------------------------------------------------------------------------------------- scores and token ids


@pytest.mark.parametrize("kind", ["t5", "bert", "roberta"])
def test_batched_scores_equal_one_by_one(encoders, sample_folder, kind):
    scorer, encoding, _ = load_scorer(encoders[kind], total_len=60, max_len=20)
    samples = [read_sample(path) for path in sample_files(sample_folder / "val")]
    samples[1]["candidates"] = samples[1]["candidates"][:3]
    samples[1]["candidates_untok"] = samples[1]["candidates_untok"][:3]
    dataset = SampleSet(tokenize_samples(samples, encoding, 16), encoding, "cpu")
    batches = score_samples(scorer, dataset, np.arange(len(samples)), 5, CPU, FP32)
    for numbers, batch, scores, gold_scores in batches:
        for row, number in enumerate(numbers):
            sample = samples[number]
            document, reference, *candidates = [
                state_of(scorer, ids)
                for ids in (
                    *encoding.documents([" ".join(sample["article_untok"])]),
                    *encoding.summaries([" ".join(sample["abstract_untok"])]),
                    *encoding.summaries([" ".join(text) for text, _ in sample["candidates_untok"]]),
                )
            ]
            assert batch.present[row].sum() == len(candidates)
            for place, candidate in enumerate(candidates):
                assert abs(scores[row, place] - torch.cosine_similarity(candidate, document, dim=0)) < 1e-5
                assert batch.rouge[row, place] == pytest.approx(sample["candidates"][place][1])
            assert abs(gold_scores[row] - torch.cosine_similarity(reference, document, dim=0)) < 1e-5
    assert scorer.training


@torch.inference_mode()
def state_of(scorer, ids):
    return scorer.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0, 0]


def test_scorer_keeps_the_states_of_the_first_tokens(encoders):
    scorer = Scorer(load_encoder(encoders["bert"])[0]).eval()
    ids = torch.tensor([[5, 6, 7], [5, 8, 0]])
    states = scorer.encode_texts([ids], [torch.tensor([3, 2])])
    alone = scorer.encode_texts([ids[1:, :2]], [None])
    torch.testing.assert_close(states[1], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["t5", "bert", "roberta"])
def test_texts_begin_with_a_token_that_is_no_word_and_are_cut(encoders, kind):
    _, tokenizer = load_encoder(encoders[kind])
    encoding = TextEncoding(tokenizer, 9, 7)
    ids, other = encoding.documents(["returns the sum " * 9, "open a file"])
    first = {"t5": tokenizer.eos_token_id}.get(kind, tokenizer.cls_token_id)
    last = {"t5": tokenizer.eos_token_id}.get(kind, tokenizer.sep_token_id)
    assert ids[0] == other[0] == first
    assert ids[-1] == other[-1] == last
    assert len(ids) == 9
    assert len(encoding.summaries(["returns the sum " * 9])[0]) == 7


def test_equal_texts_of_a_sample_are_encoded_once(sample_folder, encoding):
    sample = read_sample(sample_files(sample_folder / "val")[0])
    sample["candidates_untok"][1] = sample["candidates_untok"][0]
    sample["candidates_untok"][2] = [sample["abstract_untok"], 1.0]
    batch = SampleSet(tokenize_samples([sample], encoding, 16), encoding, "cpu").batch([0])
    rows = batch.candidates[0].tolist()
    assert rows[0] == rows[1]
    assert rows[2] == batch.references[0]
    assert sum(len(group) for group in batch.texts) == len({*rows, int(batch.documents[0])})


def test_groups_are_larger_where_tokens_cost_less(sample_folder, encoding, monkeypatch):
    samples = map(read_sample, sample_files(sample_folder / "train")[:12])
    arrays = tokenize_samples(samples, encoding, 16)
    groups = {}
    for fast in (True, False):
        monkeypatch.setattr(data_utils, "multiplies_bfloat16", lambda fast=fast: fast)
        for dtype in (torch.bfloat16, None):
            groups[fast, dtype] = len(SampleSet(arrays, encoding, "cpu", dtype).batch(range(12)).texts)
    assert groups[True, torch.bfloat16] < groups[True, None] == groups[False, torch.bfloat16] == groups[False, None]


def test_token_file_is_used_until_something_changes(sample_folder, encoding, tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for path in sample_files(sample_folder / "val")[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "notes.txt").write_text("stray")
    said = []

    def load(texts=encoding, max_num=16):
        said.clear()
        dataset = load_samples(folder, texts, max_num, "standard", "cpu", say=said.append)
        return dataset, bool(said)

    first, made = load()
    (path,) = tmp_path.glob("*.tokens")
    assert made
    again, made = load()
    assert not made
    fresh = SampleSet(
        tokenize_samples(map(read_sample, sample_files(folder)), encoding, 16, "standard"), encoding, "cpu"
    )
    assert fresh._arrays["ids"].dtype == np.uint16
    for one, other in ((first, again), (again, fresh)):
        assert all(array.dtype == other._arrays[name].dtype for name, array in one._arrays.items())
        for number in range(4):
            np.testing.assert_array_equal(one.figures("rouge", number), other.figures("rouge", number))
            assert one.figures("score", number).mean() == pytest.approx(one.figures("rouge", number).mean(), abs=1e-6)
        for ours, theirs in zip(one.batch([3, 1]), other.batch([3, 1]), strict=True):
            assert str(ours) == str(theirs)
    assert load(max_num=3)[1]
    assert load(texts=TextEncoding(encoding.tokenizer, 60, 21))[1]
    assert not load()[1]
    assert str(path) in Path("/proc/self/maps").read_text()  # Which is Linux's: it is mapped, not read.
    foreign = safetensors.numpy.save({"ids": np.zeros(3)})
    for damaged in (b"", b"\x08\0\0\0\0\0\0\0garbage", path.read_bytes()[:-50], foreign):
        for path in tmp_path.glob("*.tokens"):
            path.write_bytes(damaged)
        assert load()[1]
    os.utime(folder / "0.json", ns=(1, 1))
    assert load()[1]


def test_references_are_judged_together_and_not_by_the_chunk_they_are_read_in(sample_folder, encoding, monkeypatch):
    monkeypatch.setattr(data_utils, "CHUNK", 2)
    samples = [read_sample(path) for path in sample_files(sample_folder / "val")[:3]]
    samples[2]["abstract"] = ["剂 量 是 五"]
    assert "rouge" in tokenize_samples(samples, encoding, 16, "standard")
    with pytest.raises(UserError, match="the samples: the standard ROUGE tokens"):
        tokenize_samples(samples[2:], encoding, 16, "standard")


def test_published_samples_load(tmp_path, encoding):
    # As in the SimCLS release: sentences as lists, repeated candidates, escaped characters, any white space in JSON.
    candidate = [["juan arango bites jesus zavela .", "he could face a ban ."], 0.4139]
    untok = [["juan arango bites jesus zavela.", "he could face a ban."], 0.4139]
    sample = {
        "article": ["club tijuana star juan arango conjured memories .", "."],
        "abstract": ["juan arango escaped punishment ."],
        "candidates": [candidate, [["the venezuelan icon was not booked ."], 0.2], candidate],
        "article_untok": ["club tijuana star juan arango conjured memories.", "."],
        "abstract_untok": ["juan arango escaped punishment\u00a0."],
        "candidates_untok": [untok, [["the venezuelan icon was not booked."], 0.2], untok],
    }
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.json").write_text(json.dumps(sample, indent=3))
    dataset = load_samples(tmp_path / "test", encoding, 16, "standard", "cpu")
    assert dataset.figures("score", 0).tolist() == pytest.approx([0.4139, 0.2, 0.4139])
    assert dataset.figures("rouge", 0).shape == (3, 3)


BAD_SAMPLES = [
    (b"{", "is not JSON"),
    (b'{"article": "\xff"}', "is not JSON"),
    (b"[1]", "it is not an object"),
    (b'{"article": []}', "it has no abstract"),
    ({"candidates": [], "candidates_untok": []}, "it has no candidates"),
    ({"article": "one string"}, "article is not a list of sentences"),
    ({"abstract_untok": [1]}, "abstract_untok is not a list of sentences"),
    ({"candidates": 1}, "candidates is not a list"),
    *[
        ({"candidates": [each]}, "candidates.0 is not [sentences, score]")
        for each in (["a"], "ab", [[1], 0.5], [["a"], True], [["a"], 0.5, 1])
    ],
    ({"abstract": ["\ud800Number 7"]}, "abstract is not a list of sentences in UTF-8"),
    ({"candidates_untok": [[["\ud800"], 0.5]]}, "candidates_untok.0 is not [sentences, score], in UTF-8"),
    ({"candidates": [[["a"], 1], [["b"], 0.5]]}, "it has 2 candidates, 1 candidates_untok"),
    ({"candidates_untok": [[["a"], 0.25]]}, "the scores in candidates and candidates_untok differ"),
    ({"likelihood": []}, "it has 1 candidates, 1 candidates_untok, 0 likelihood"),
    ({"likelihood": None}, "it has 1 candidates, 1 candidates_untok, 0 likelihood"),
    ({"likelihood": [[-1.0, 0]]}, "likelihood.0 is not [log-probability, tokens]"),
]


@pytest.mark.parametrize(("change", "wanted"), BAD_SAMPLES)
def test_bad_sample_is_named(tmp_path, change, wanted):
    good = dict.fromkeys(["article", "abstract", "article_untok", "abstract_untok"], ["a"])
    good |= dict.fromkeys(["candidates", "candidates_untok"], [[["a"], 0.5]])
    path = tmp_path / "7.json"
    path.write_bytes(change if isinstance(change, bytes) else json.dumps(good | change).encode())
    with pytest.raises(UserError) as error:
        read_sample(path)
    assert wanted in str(error.value)
    assert str(path) in str(error.value)


def test_training_documents_are_not_those_that_validate(sample_folder, tmp_path, capsys):
    folder = tmp_path / "samples"
    shutil.copytree(sample_folder, folder)
    assert check_training(folder, "standard") == [provenance_of(folder / split) for split in ("train", "val")]

    def write(place, split, generator, **more):
        made = {"generator": generator, "text": "t"}
        provenance.write(folder / place, provenance.describe(split=split, files=place, candidates=made, **more))

    shutil.copytree(folder / "train", tmp_path / "same" / "train")
    shutil.copytree(folder / "train", tmp_path / "same" / "val")
    with pytest.raises(UserError, match=r"were made from the same documents; make each with its own --split"):
        check_training(tmp_path / "same", "standard")

    write("train", "train", "x")
    write("val", "val", "x")
    check_training(folder, "standard")
    assert capsys.readouterr().out == ""
    write("val", "val", "y")
    check_training(folder, "standard")
    assert "val have candidates made with other settings (generator)\n" in capsys.readouterr().out
    write("val", "val", "x", rouge_tokens="unicode")
    with pytest.raises(UserError, match=r"val was made with --rouge_tokens unicode; give the same here"):
        check_training(folder, "standard")
    write("val", "train", "y")
    with pytest.raises(UserError, match=r"were made from the same documents \(train\); make each with its own --split"):
        check_training(folder, "standard")


def test_two_samples_of_one_number_are_refused_and_long_numbers_are_read(tmp_path):
    for name in ("0.json", "3.json", "123456789012345678901234567890.json"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in sample_files(tmp_path)][-1] == "123456789012345678901234567890.json"
    (tmp_path / "003.json").write_text("{}")
    with pytest.raises(UserError, match="has 1 samples with the number of another in their file name; rename them"):
        sample_files(tmp_path)


def test_no_samples(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"preprocess\.py"):
            sample_files(folder)


# ------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(("size", "world_size"), [(50, 1), (50, 2), (41, 4), (7, 2)])
def test_batches_hold_each_sample_once_and_weights_make_the_mean_of_an_update(size, world_size):
    lengths = np.random.default_rng(0).integers(10, 500, size)
    ranks = [LengthBatches(lengths, 8, 3, 1, rank, world_size) for rank in range(world_size)]
    for batches in ranks:
        batches.start(epoch=2)
    seen, updates = [], []
    for number, shares in enumerate(zip(*(batches.batches() for batches in ranks), strict=True)):
        if ranks[0].starts_update(number):
            updates.append({})
        for batches, share in zip(ranks, shares, strict=True):
            weight = batches.weight(number) / world_size / len(share)
            for sample in share:
                updates[-1][sample] = updates[-1].get(sample, 0) + weight
            seen.extend(share if batches.weight(number) else [])
        assert ranks[0].ends_update(number) == ((number + 1) % 3 == 0 or number + 1 == -(-size // 8))
    assert sorted(seen) == list(range(size))
    assert len(updates) == ranks[0].updates
    for update in updates:
        weights = [weight for weight in update.values() if weight]
        assert weights == pytest.approx([1 / len(weights)] * len(weights))


def test_batches_are_of_like_length_and_new_each_epoch():
    lengths = np.random.default_rng(0).integers(10, 500, 4000)
    batches = LengthBatches(lengths, 8, 2, 0)
    orders = []
    for epoch in (0, 1, 0):
        batches.start(epoch)
        orders.append(batches.order())
        spread = [np.ptp(lengths[batch]) for batch in batches.batches()]
        assert np.mean(spread) < 25  # About 400 for batches at random.
    np.testing.assert_array_equal(orders[0], orders[2])
    assert (orders[0] != orders[1]).mean() > 0.9
