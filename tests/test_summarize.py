"""summarize.py as a user runs it: one's own text in, the best summaries out."""

import contextlib
import gzip
import io
import json
import socket
import sys

import numpy as np
import pytest
import summarize
import torch
from model import load_scorer, save_scorer

from harness.endings import UserError
from search.generator import Candidate, CandidateGenerator, load_generator, search_settings
from texts.rouge_scores import agreement

pytestmark = pytest.mark.slow

TEXTS = ["read the lines of a file", "", "close the socket and wait for the thread", "sort a list"]


@pytest.fixture
def run_here(monkeypatch, capsys, encoders):
    """Run the script in this process, which saves the seconds that imports take; returns the lines that it prints."""

    def run(*words):
        words = [*words, "--generator_name", encoders["t5"], "--num_cands", 4, "--decoder_max_len", 9]
        monkeypatch.setattr(sys, "argv", ["summarize.py", *map(str, words)])
        summarize.main()
        return capsys.readouterr().out.splitlines()

    return run


def candidates_of(folder, texts):
    model, tokenizer = load_generator(str(folder), torch.float32)
    settings = {"num_beams": 4, "num_groups": 4, "diversity_penalty": 1.0, "max_length": 9}
    generator = CandidateGenerator(model, tokenizer, settings)
    return [generator.generate(generator.tokenize([text]))[0] for text in texts]


def test_each_line_of_text_gets_a_line_however_it_comes(run_here, encoders, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "texts.csv").write_text("id,body\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS)))
    lines = run_here(tmp_path / "texts.txt")
    expected = candidates_of(encoders["t5"], TEXTS)
    alike = [agreement([[candidate.text.lower()] for candidate in some]) for some in expected]
    best = [some[each.argmax()].text for some, each in zip(expected, alike, strict=True)]
    assert lines == [text and summary for text, summary in zip(TEXTS, best, strict=True)]
    assert run_here(tmp_path / "texts.csv", "--doc_col_name", "body") == lines
    ours, theirs = socket.socketpair()
    theirs.sendall((tmp_path / "texts.txt").read_bytes())
    theirs.close()
    monkeypatch.setattr(sys, "stdin", ours.makefile("r"))
    assert run_here("-") == lines


def test_lines_that_end_with_cr_only_and_utf_16_are_refused(tmp_path):
    for text, wrong in (
        (b"one\rtwo\r", "line 1: a line end of CR only"),
        (b"\none\ntwo\rthree\r", "line 3: a line end of CR only"),
        ("one\ntwo\n".encode("utf-16le"), "line 1: a NUL byte, as in UTF-16; save the file as UTF-8"),
        ("\none".encode("utf-32be"), "line 1: a NUL byte"),
    ):
        (tmp_path / "x.txt").write_bytes(text)
        with pytest.raises(UserError, match=wrong):
            list(summarize.read_documents(str(tmp_path / "x.txt"), "abstract"))
    (tmp_path / "x.txt").write_bytes(b"one\r\ntwo\r\n")
    assert len(list(summarize.read_documents(str(tmp_path / "x.txt"), "abstract"))) == 2


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, header in (("x.txt", ""), ("x.csv", "\ufeffabstract\n")):
        (tmp_path / name).write_text(f"{header}\ufeffone\n\ufeffABSTRACT\n\ufefftwo\n")
    found = [*map(summarize.clean, summarize.read_documents(str(tmp_path / "x.csv"), "abstract"))]
    assert found == ["one", "ABSTRACT", "two"], "a line for each row, even if it repeats the header"
    assert next(summarize.read_documents(str(tmp_path / "x.txt"), "abstract")) == "one"


def test_a_job_of_several_processes_is_refused(run_here, tmp_path, monkeypatch):
    job = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for name, value in job.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="runs in a single process; start it with python3"):
        run_here(tmp_path / "texts.txt")


def test_a_scorer_and_what_counts_beside_it_choose(run_here, encoders, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    path = tmp_path / "scorer.bin"
    scorer, _, description = load_scorer(encoders["bert"], total_len=30, max_len=10)
    for term in (None, "likelihood", "agreement"):
        weights = {"likelihood": 0.0, "power": 1.0, "agreement": 0.0} | ({term: 1e6} if term else {})
        save_scorer(path, scorer, description | {"weights": weights})
        found = [json.loads(line) for line in run_here(tmp_path / "texts.txt", "--scorer_path", path, "--all")]
        assert run_here(tmp_path / "texts.txt", "--scorer_path", path) == [each["summary"] for each in found]
        assert found[1] == {"summary": "", "candidates": []}
        for each, some in zip(found[::2], candidates_of(encoders["t5"], TEXTS[::2]), strict=True):
            assert sorted(row["text"] for row in each["candidates"]) == sorted(candidate.text for candidate in some)
            scores = [row["score"] for row in each["candidates"]]
            assert scores == sorted(scores, reverse=True)
            assert each["summary"] == each["candidates"][0]["text"]
            if term == "likelihood":
                means = [candidate.log_prob / candidate.tokens for candidate in some]
                assert each["summary"] == some[int(np.argmax(means))].text
            if term == "agreement":
                assert each["summary"] == min(each["candidates"], key=lambda row: row["bayes_risk"])["text"]


def test_a_scorer_of_another_generator_is_told(run_here, encoders, tmp_path):
    (tmp_path / "texts.txt").write_text(TEXTS[0])
    path = tmp_path / "scorer.bin"
    scorer, _, description = load_scorer(encoders["bert"], total_len=30, max_len=10)
    for samples, told in (({"candidates": {"generator": "another"}}, 1), (None, 0)):
        save_scorer(path, scorer, description | {"samples": samples})
        monitored = io.StringIO()
        with contextlib.redirect_stderr(monitored):
            run_here(tmp_path / "texts.txt", "--scorer_path", path)
        assert monitored.getvalue().count("candidates made with other settings (generator) than these") == told


def test_documents_pass_some_at_a_time(run_here, monkeypatch):
    calls = []

    class Counted:
        def __init__(self, args, world):
            pass

        def __call__(self, documents):
            calls.append((len(documents), read[0]))
            return [{"summary": ""}] * len(documents)

    read = [0]

    def lines(path):
        for _ in range(200):
            read[0] += 1
            yield "text"

    monkeypatch.setattr(summarize, "Summarizer", Counted)
    monkeypatch.setattr(summarize, "read_lines", lines)
    assert len(run_here("-", "--cand_gen_batch", 3)) == 200
    assert [count for count, _ in calls] == [48] * 4 + [8]
    assert [seen for _, seen in calls] == [48, 96, 144, 192, 200]


def test_documents_cut_otherwise_than_in_training_are_told(run_here, encoders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_generator(encoders["t5"], torch.float32)
    args = summarize.get_args_parser().parse_args(
        ["--generator_name", "x", "--num_cands", "4", "--decoder_max_len", "9"]
    )
    made = CandidateGenerator(model, tokenizer, search_settings(args, model.generation_config), 30).how()
    scorer, _, description = load_scorer(encoders["bert"], total_len=60, max_len=20)
    save_scorer(tmp_path / "scorer.bin", scorer, description | {"samples": {"candidates": made}})
    (tmp_path / "texts.txt").write_text("sort a list\n")
    for length, told in ((30, ""), (20, "made with other settings (max_source_length) than these")):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        run_here("texts.txt", "--scorer_path", "scorer.bin", "--max_source_length", length)
        assert told in sys.stderr.getvalue()
        assert bool(told) == ("warning" in sys.stderr.getvalue())


def test_a_sentence_may_have_the_name_of_the_column_between_commas(run_here, tmp_path):
    (tmp_path / "a.txt").write_text("We compare concrete, abstract, and mixed nouns.\n")
    assert len(run_here(tmp_path / "a.txt")) == 1
    (tmp_path / "b.txt").write_text("id;abstract;title\n")
    with pytest.raises(UserError, match="is a table header with the column 'abstract'"):
        run_here(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [("a.jsonl", b'{"abstract": "read the lines"}\n', "neither plain text"), ("a.tsv", b"a\tb\n", "neither plain text"),
     ("a.txt.gz", gzip.compress(b"read the lines", mtime=0), "is compressed; decompress it first")],
)  # fmt: skip
def test_what_is_no_text_is_refused(run_here, tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line):
        run_here(tmp_path / name)


def test_where_rouge_alone_chooses_it_must_see_the_candidates(run_here, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("read the lines\n")
    russian = [Candidate("прочитай строки K файла", -1.0, 4), Candidate("прочитай 2 строки", -2.0, 3)]
    monkeypatch.setattr(CandidateGenerator, "candidates", lambda *_: [russian])
    with pytest.raises(UserError, match="^the candidates: .* add --rouge_tokens unicode"):
        run_here(tmp_path / "a.txt")
    assert run_here(tmp_path / "a.txt", "--rouge_tokens", "unicode") == ["прочитай строки K файла"]
