"""Whatever text a CSV holds, from there to the scorer's input nothing is lost, shifted or reordered; and no file that
is read can run code."""

import csv
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import preprocess
import pytest
import torch
from data_utils import TextEncoding, load_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from utils import read_lines

from harness.endings import UserError
from harness.resume import load_state
from search.generator import Candidate
from texts.candidate_files import CandidateFiles
from texts.documents import clean, read_documents, split_documents
from texts.samples import read_sample, sample_files
from texts.sentences import ptb_tokenize

pytestmark = pytest.mark.slow

ALONE = SimpleNamespace(rank=0, size=1, is_main=True, say=print)
# Lone surrogates are no text: no file in UTF-8 can hold them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
NASTY = st.sampled_from(
    ["", " ", "\x00", "\x85", "a\u2028b. C", "x\r\ny\rz", '"quoted", text', "One. Two! Three?\nFour", "long " * 30_000,
     "\ufeffmark", "\u202egnirts", "e\u0301 \U0001f468\u200d\U0001f469", "\x1b[31mred", "=1+1", "''``''", "<pad></s>"]
)  # fmt: skip
FIELD = TEXT | NASTY


@pytest.fixture(scope="module")
def encoding():
    """A TextEncoding of bytes: what is encoded can be read back without a loss."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "split_special_tokens": True}
    return TextEncoding(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), 10**6, 10**6)


def letters(text):
    """Everything but white space, of which the splitter drops some between sentences."""
    return "".join(text.split()) if isinstance(text, str) else "".join(map(letters, text))


def decode(encoding, ids):
    return encoding.tokenizer.decode([number for number in ids.tolist() if number > 2])


@st.composite
def tables(draw):
    """(rows of a CSV, candidates a document, a source of candidates)"""
    rows = draw(st.lists(st.tuples(FIELD, FIELD), max_size=5))
    rows += [(f"Text {number}. It is here.", f"Title {number}.") for number in range(10)]
    return draw(st.permutations(rows)), draw(st.integers(1, 3)), draw(st.lists(FIELD, min_size=40, max_size=40))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=tables())
def test_text_goes_from_the_csv_to_the_scorer_and_back(tmp_path_factory, encoding, table):
    rows, count, source = table
    folder = tmp_path_factory.mktemp("text")
    with open(folder / "x.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("abstract", "title"), *rows])
    documents = read_documents(folder / "x.csv")
    wanted = {clean(text): clean(summary) for text, summary in reversed(rows) if clean(text) and clean(summary)}
    assert dict(documents) == wanted
    assert [text for text, _ in documents] == list(dict.fromkeys(clean(text) for text, summary in rows
                                                                 if clean(text) and clean(summary)))  # fmt: skip
    for split, part in split_documents(documents).items():
        candidates = [[source[(3 * place + each) % len(source)] for each in range(count)] for place in range(len(part))]
        write_candidates(folder / "candidates", split, part, candidates)
        make_samples(folder, split, count)
        check_samples(folder / "samples" / split, part, candidates)
        check_scorer_input(folder / "samples" / split, part, candidates, encoding)


def write_candidates(folder, split, documents, candidates):
    """As gen_candidate.py does: in batches that are not in the documents' order."""
    folder.mkdir(exist_ok=True)
    files = CandidateFiles(folder, split, {"some": "settings"}, ALONE)
    order = sorted(range(len(documents)), key=lambda place: -len(documents[place].text))
    batches = [order[start : start + 2] for start in range(0, len(order), 2)]
    with files.open() as file:
        for places in batches:
            made = [[Candidate(clean(text), -1.5, 3) for text in candidates[place]] for place in places]
            files.add(file, places, [documents[place] for place in places], made)
    files.publish(documents)
    lines = {name: list(read_lines(folder / f"{split}.{name}")) for name in ("source", "target", "out")}
    assert lines["source"] == [document.text for document in documents]
    assert lines["target"] == [document.summary for document in documents]
    assert lines["out"] == [clean(text) for some in candidates for text in some]


def make_samples(folder, split, count):
    arguments = f"--src_dir {folder}/candidates --tgt_dir {folder}/samples/{split} --workers 1 --rouge_tokens unicode"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["preprocess.py", *arguments.split(), "--split", split, "--cand_num", str(count)])
        patch.setattr(os, "sync", lambda: None)
        preprocess.main()


def check_samples(folder, documents, candidates):
    samples = [read_sample(path) for path in sample_files(folder)]
    assert len(samples) == len(documents)
    for sample, (text, summary), some in zip(samples, documents, candidates, strict=True):
        assert letters(sample["article_untok"]) == letters(text)
        assert letters(sample["abstract_untok"]) == letters(summary)
        assert [letters(each) for each, _ in sample["candidates_untok"]] == [letters(clean(each)) for each in some]
        assert letters(sample["article"]) == letters(ptb_tokenize(text)).lower()
        tokenized = [letters(ptb_tokenize(clean(each))).lower() for each in some]
        assert [letters(each) for each, _ in sample["candidates"]] == tokenized
        assert [score for _, score in sample["candidates"]] == [score for _, score in sample["candidates_untok"]]


def check_scorer_input(folder, documents, candidates, encoding):
    """The rows of a batch, read back, are the texts that its numbers say they are."""
    dataset = load_samples(folder, encoding, 16, None, "cpu", say=lambda line: None)
    numbers = np.arange(len(documents))[::-1]
    batch = dataset.batch(numbers)
    rows = [letters(decode(encoding, row)) for group in batch.texts for row in group]
    for place, number in enumerate(numbers):
        text, summary = documents[number]
        assert rows[batch.documents[place]] == letters(text)
        assert rows[batch.references[place]] == letters(summary)
        wanted = [letters(clean(each)) for each in candidates[number]]
        assert [rows[row] for row in batch.candidates[place]] == wanted
        scores = [score for _, score in json.loads((folder / f"{number}.json").read_text())["candidates"]]
        assert batch.rouge[place].tolist() == pytest.approx(scores)
    assert batch.present.all()


# ----------------------------------------------------------------------------------------- files that would run code


class Mark:
    """Pickled, it makes a file when it is loaded by a loader that runs code."""

    def __reduce__(self):
        return (open, ("the-pickle-ran", "w"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200) | st.sampled_from([b"PK\x03\x04", b"\x80\x02}.", b"cos\nsystem\n(S'true'\ntR."]))
def test_no_bytes_are_taken_for_a_state(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("state") / "run.state"
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a "):
        load_state(path, {})


def test_hostile_files_do_not_run(tmp_path, monkeypatch, sample_folder, encoding):
    """A state, and the token ids beside samples; --scorer_path, --model_pt and models are in test_bad_input.py."""
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "arguments": {}, "random": Mark(), "parts": {}}, tmp_path / "run.state")
    with pytest.raises(UserError, match="not a complete training state"):
        load_state(tmp_path / "run.state", {})
    np.savez(tmp_path / "curves.npz", loss=np.array([Mark()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "curves.npz")["loss"]
    (tmp_path / "train").symlink_to(sample_folder / "train")
    load_samples(tmp_path / "train", encoding, 16, None, "cpu", say=lambda line: None)
    (tokens,) = tmp_path.glob("*.tokens")
    whole = tokens.read_bytes()
    with open(tokens, "wb") as file:
        np.lib.format.write_array(file, np.array([Mark()], dtype=object))
    load_samples(tmp_path / "train", encoding, 16, None, "cpu", say=lambda line: None)
    assert tokens.read_bytes() == whole
    assert not (tmp_path / "the-pickle-ran").exists()
