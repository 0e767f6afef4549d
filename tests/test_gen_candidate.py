"""gen_candidate.py as a user runs it: its files, interruption, many processes and bad input."""

import csv
import fcntl
import json
import os
import random
import re
import shutil
import socket
import sys
import threading
from types import SimpleNamespace

import gen_candidate
import pytest
import torch
from launch import run_two
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from utils import read_lines

from harness.endings import UserError
from harness.precision import Precision
from pretrained.model_folders import tokenizer_text
from search.generator import CandidateGenerator, generator_dtype, length_batches, load_generator
from texts import candidate_files, provenance
from texts.documents import read_documents, split_documents
from texts.sentences import ptb_tokenize

pytestmark = pytest.mark.slow

SPLITS = ("train", "val", "test")
SETTINGS = ["--num_cands", "4", "--decoder_max_len", "7", "--cand_gen_batch", "3"]
WORDS = [f"word{i}" for i in range(50)]
# Tokens whose text would break a line, and a sentence's end.
BREAKING = ["new\nline", "para\u2029graph", "nul\x00l", "next\x85line", "end."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with generator/ (a random T5 and its tokenizer) and papers.csv, 60 documents of random words."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS, *BREAKING])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "generator")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4, "num_layers": 1, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(vocabulary), **sizes))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.8, generator=generator)
    with torch.no_grad():
        model.shared.weight[-len(BREAKING) :] *= 2
    model.save_pretrained(folder / "generator")
    draw = random.Random(0)
    with open(folder / "papers.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["abstract", "title"])
        for number in range(60):
            text = " ".join(draw.choices(WORDS, k=draw.randint(3, 40)))
            writer.writerow([f"{text} .", f"Title {number}: it's (here)."])
    return folder


def arguments(tiny, output_dir, *more):
    names = ["--generator_name", tiny / "generator", "--dataset_name", tiny / "papers.csv"]
    return [str(word) for word in (*names, "--output_dir", output_dir, *SETTINGS, *more)]


def run_here(monkeypatch, *words):
    """Run the script in this process, which saves the seconds that imports take."""
    monkeypatch.setattr(sys, "argv", ["gen_candidate.py", *map(str, words)])
    gen_candidate.main()


def only_folder(output_dir):
    (folder,) = [path for path in output_dir.iterdir() if path.is_dir()]
    return folder


def contents(output_dir):
    return {path.name: path.read_bytes() for path in only_folder(output_dir).iterdir()}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, run_script):
    """The output folder of one uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("whole")
    result = run_script("SimCLS/gen_candidate.py", *arguments(tiny, output_dir))
    assert re.search(r"^train: 48 documents, [\d.]+ documents/s$", result.stdout, re.MULTILINE)
    shown = r"(train|val|test) batches: \d+ of \d+"
    assert all(re.fullmatch(shown, line) for line in result.stderr.splitlines()), result.stderr
    return output_dir


def test_every_split_has_its_own_documents_and_all_their_candidates(tiny, whole):
    folder = only_folder(whole)
    splits = split_documents(read_documents(tiny / "papers.csv"))
    names = {f"{split}.{name}" for split in SPLITS for name in (*candidate_files.FILES, "settings.json")}
    names.add("provenance.json")
    assert {path.name for path in folder.iterdir()} == names
    for split, documents in splits.items():
        lines = {name: list(read_lines(folder / f"{split}.{name}")) for name in candidate_files.FILES}
        assert lines["source"] == [document.text for document in documents]
        assert lines["target"] == [document.summary for document in documents]
        assert len(lines["out"]) == len(lines["likelihood"]) == 4 * len(documents)
        for name in ("source", "target", "out"):
            assert lines[f"{name}.tokenized"] == [ptb_tokenize(line) for line in lines[name]]
    assert "it 's ( here ) ." in (folder / "test.target.tokenized").read_text()


def test_candidates_are_those_of_their_document_in_order(tiny, whole):
    model, tokenizer = load_generator(str(tiny / "generator"), torch.float32)
    settings = {"num_beams": 4, "num_groups": 4, "diversity_penalty": 1.0, "max_length": 7}
    generator = CandidateGenerator(model, tokenizer, settings)
    lines, likelihoods = (list(read_lines(only_folder(whole) / f"val.{name}")) for name in ("out", "likelihood"))
    for place, document in enumerate(split_documents(read_documents(tiny / "papers.csv"))["val"]):
        (candidates,) = generator.generate(generator.tokenize([document.text]))
        mine = slice(4 * place, 4 * place + 4)
        assert [candidate.text for candidate in candidates] == lines[mine]
        assert len(set(lines[mine])) > 1
        for candidate, line in zip(candidates, likelihoods[mine], strict=True):
            log_prob, tokens = line.split()
            assert (float(log_prob), int(tokens)) == (pytest.approx(candidate.log_prob, abs=1e-4), candidate.tokens)


def test_candidates_of_several_searches_stand_in_one_group_a_document(tiny, tmp_path, monkeypatch):
    found = {}
    for search, count in (("beam", 2), ("sample", 2), ("beam+sample", 4)):
        more = ["--dataset_percent", 20, "--search", search, "--num_cands", 2]
        run_here(monkeypatch, *arguments(tiny, tmp_path / search, *more))
        assert only_folder(tmp_path / search).name.endswith(f"generator_{count}")
        lines = iter(read_lines(only_folder(tmp_path / search) / "train.out"))
        found[search] = list(zip(*[lines] * count, strict=True))
    assert found["beam+sample"] == [beam + sample for beam, sample in zip(found["beam"], found["sample"], strict=True)]
    origin = json.loads((only_folder(tmp_path / "beam+sample") / "provenance.json").read_text())
    assert ["top_p" in each for each in origin["search"]["searches"]] == [False, True]


def test_tokens_that_break_lines_were_generated(whole):
    """Else the counts of lines above prove nothing."""
    text = (only_folder(whole) / "train.out").read_text()
    assert "new line" in text or "para graph" in text or "next line" in text


@pytest.mark.parametrize("moment", [0, 3, 16, "source", "out", "out.tokenized", "settings.json"])
def test_a_crash_at_any_moment_loses_nothing(tiny, whole, tmp_path, monkeypatch, moment):
    """Torn while it writes batch `moment`, or before the file `moment` gets its name."""
    append, replace = candidate_files._append, os.replace
    written = []

    def torn_append(file, value):
        if len(written) == moment:
            file.write(b'{"batch"' + 2000 * b" ")  # Longer than what comes in its place.
            file.flush()
            raise KeyboardInterrupt
        written.append(value)
        append(file, value)

    def failing_replace(source, target):
        if str(target).endswith(f"train.{moment}"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(candidate_files, "_append", torn_append)
        patch.setattr(os, "replace", failing_replace)
        with pytest.raises(KeyboardInterrupt):
            run_here(patch, *arguments(tiny, tmp_path))
    assert not (only_folder(tmp_path) / "train.settings.json").exists()
    run_here(monkeypatch, *arguments(tiny, tmp_path))
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(tiny, whole, tmp_path):
    main, other = run_two("SimCLS/gen_candidate.py", *arguments(tiny, tmp_path), cwd=tmp_path)
    assert "train batches: 8 of 8" in main.err  # Half of them.
    assert "train: 48 documents, " in main.out
    assert other.out == ""
    assert contents(tmp_path) == contents(whole)


def test_work_of_two_processes_is_finished_by_one(tiny, whole, tmp_path, monkeypatch):
    documents = split_documents(read_documents(tiny / "papers.csv"))["train"]
    folder = tmp_path / only_folder(whole).name
    shutil.copytree(only_folder(whole), folder)
    (folder / "train.settings.json").unlink()
    settings = candidate_files._read_json(only_folder(whole) / "train.settings.json")
    model, tokenizer = load_generator(str(tiny / "generator"), torch.float32)
    search = {key: settings[key] for key in ("num_beams", "num_groups", "diversity_penalty", "max_length")}
    generator = CandidateGenerator(model, tokenizer, search)
    sources = generator.tokenize([document.text for document in documents])
    made = []
    for rank, number in ((0, 4), (1, 9)):
        files = candidate_files.CandidateFiles(folder, "train", settings, SimpleNamespace(rank=rank))
        places = length_batches(sources, 3)[number]
        with files.open() as file:
            candidates = generator.generate([sources[place] for place in places])
            files.add(file, places, [documents[place] for place in places], candidates)
        made += places
    assert files.finished() == set(made)
    run_here(monkeypatch, *arguments(tiny, tmp_path))
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("size", [1, 2, 5, 48])
def test_another_batch_size_goes_on_with_what_is_made(tiny, whole, tmp_path, monkeypatch, capsys, size):
    """As after an end for lack of memory: whole splits and finished documents stay."""
    append = candidate_files._append
    written = []

    def failing_append(file, value):
        if len(written) == 19:  # Settings and 16 batches of train, settings and one of val's two.
            raise MemoryError
        written.append(value)
        append(file, value)

    with monkeypatch.context() as patch:
        patch.setattr(candidate_files, "_append", failing_append)
        with pytest.raises(MemoryError):
            run_here(patch, *arguments(tiny, tmp_path))
    capsys.readouterr()
    run_here(monkeypatch, *arguments(tiny, tmp_path, "--cand_gen_batch", size))
    out = capsys.readouterr().out
    assert "train: the candidates of 48 documents already exist" in out
    assert "resuming after 3 of 6 documents" in out
    assert "val: 3 documents, " in out  # Nothing is made a second time.
    assert "starting over" not in out
    made, expected = contents(tmp_path), contents(whole)
    for split in SPLITS:  # In batches of another size, sums are rounded otherwise.
        ours, theirs = (
            [float(number) for number in files.pop(f"{split}.likelihood").split()] for files in (made, expected)
        )
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert made == expected


def hang_up(server, calls):
    """End each connection without an answer, and note what was asked for."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            calls.append(" ".join(connection.recv(4096).decode().split()[:2]))


def test_a_hub_that_cannot_be_reached_is_one_line_and_is_asked_once(tiny, tmp_path, run_script):
    """Left to itself, the library tries each file of a model for 40 s."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as hub:
        threading.Thread(target=hang_up, args=(hub, calls), daemon=True).start()
        result = run_script(
            "SimCLS/gen_candidate.py", *arguments(tiny, tmp_path, "--generator_name", "some/model"), code=2, fresh=True,
            HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{hub.getsockname()[1]}", HF_HOME=str(tmp_path / "hub"),
        )  # fmt: skip
    # Of a model no file is asked for; in some environments the client asks for more than models.
    assert calls[0] == "HEAD /"
    assert not [call for call in calls if "some/model" in call]
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "'some/model': cannot load a sequence-to-sequence model and its tokenizer from this name" in result.stderr


def test_half_precision_that_names_no_type_is_bfloat16_for_the_t5_family():
    from transformers import BartConfig

    on_cuda = Precision("fp16", torch.float16, None, "cuda")
    for value, t5, bart in (("auto", torch.bfloat16, torch.float16), ("float16", torch.float16, torch.float16)):
        dtype = generator_dtype(value, on_cuda)
        assert (dtype(T5Config()), dtype(BartConfig())) == (t5, bart)
    assert generator_dtype(None, Precision("fp32", None, None, "cuda"))(T5Config()) == torch.float32
    parse = gen_candidate.get_args_parser().parse_args
    for words, value in (([], "auto"), (["True"], "auto"), (["1"], "auto"), (["fp16"], "float16"), (["no"], None)):
        assert parse(["--generator_name", "x", "--half_precision", *words]).half_precision == value


def test_candidates_of_a_tokenizer_that_cuts_or_reads_otherwise_are_others(tiny, whole):
    _, tokenizer = load_generator(str(tiny / "generator"), torch.float32)
    text = tokenizer_text(tokenizer)
    tokenizer("a call", truncation=True, max_length=5)
    assert tokenizer_text(tokenizer) == text
    path = only_folder(whole) / "val.settings.json"
    settings = json.loads(path.read_text())
    assert settings["tokenizer"] == provenance.digest(text)
    tokenizer.truncation_side = "left"
    other = settings | {"tokenizer": provenance.digest(tokenizer_text(tokenizer))}
    for ours, complete in ((settings, True), (other, False)):
        files = candidate_files.CandidateFiles(path.parent, "val", ours, SimpleNamespace(rank=0))
        assert files.complete() == complete
        assert files.changed(settings) == ("" if complete else "tokenizer")
        assert files.changed({name: value for name, value in settings.items() if name != "tokenizer"}) == ""
    tokenizer.truncation_side = "right"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_text(tokenizer) != text


def test_a_complete_run_is_left_alone(tiny, whole, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in only_folder(whole).iterdir()}
    run_here(monkeypatch, *arguments(tiny, whole))
    assert "train: the candidates of 48 documents already exist" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in only_folder(whole).iterdir()} == before


@pytest.mark.parametrize(
    ("words", "other"),
    [
        (["--decoder_max_len", 6, "--diversity_penalty", 2], r"\(diversity_penalty, "),
        (["--dataset_name", "{tmp}/changed.csv"], r"\(documents\)"),
        (["--dataset_percent", 50], r"\(documents\)"),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_candidates_made_otherwise_are_never_replaced(tiny, whole, tmp_path, monkeypatch, words, other, killed):
    folder = tmp_path / only_folder(whole).name
    shutil.copytree(only_folder(whole), folder)
    if killed:
        settings = json.loads((folder / "train.settings.json").read_text())
        for path in folder.glob("*"):
            path.unlink()
        candidate_files.CandidateFiles(folder, "train", settings, SimpleNamespace(rank=3)).open().close()
    (tmp_path / "changed.csv").write_text((tiny / "papers.csv").read_text().replace("Title ", "Another "))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"train candidates made with other settings {other}"):
        run_here(monkeypatch, *arguments(tiny, tmp_path, *[str(word).format(tmp=tmp_path) for word in words]))
    assert contents(tmp_path) == before


def test_a_second_run_with_the_same_output_is_refused(tiny, whole, tmp_path, monkeypatch):
    with open(tmp_path / f"{only_folder(whole).name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing"):
            run_here(monkeypatch, *arguments(tiny, tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_empty_candidates_keep_their_lines(tiny, tmp_path, monkeypatch):
    """Candidates of one token, often the end token alone."""
    run_here(monkeypatch, *arguments(tiny, tmp_path, "--decoder_max_len", 2, "--num_cands", 54, "--num_groups", 27))
    lines = list(read_lines(only_folder(tmp_path) / "test.out"))
    assert len(lines) == 6 * 54
    assert "" in lines


def test_a_name_with_parent_folders_stays_inside(tiny, tmp_path, monkeypatch):
    (tmp_path / "work" / "deep").mkdir(parents=True)
    shutil.copytree(tiny / "generator", tmp_path / "generator")
    monkeypatch.chdir(tmp_path / "work" / "deep")
    words = arguments(tiny, "candidates", "--generator_name", "../../generator", "--dataset_percent", 20)
    run_here(monkeypatch, *words)
    assert [path.name for path in (tmp_path / "work" / "deep").iterdir()] == ["candidates"]
    assert only_folder(tmp_path / "work" / "deep" / "candidates").name == "generator_4"
    assert {path.name for path in tmp_path.iterdir()} == {"work", "generator"}


def test_half_precision_on_a_cpu(tiny, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, *arguments(tiny, tmp_path, "--half_precision", "True", "--dataset_percent", 20))
    assert "half precision on a CPU is bfloat16" in capsys.readouterr().out
    assert len(list(read_lines(only_folder(tmp_path) / "train.out"))) == 4 * 9


def test_settings_that_one_side_alone_has_are_others(tmp_path):
    files = candidate_files.CandidateFiles(tmp_path, "val", {"a": 1, "b": 2, "d": 4}, SimpleNamespace(rank=0))
    for name in (".val.out.1.tmp", ".provenance.json.1.tmp"):  # Of a run that was killed.
        (tmp_path / name).touch()
    files.prepare()
    assert not any(tmp_path.iterdir())
    for there in ({"a": 1, "b": 2, "d": 4}, {"a": 1, "c": 3, "d": 0}):
        files.settings_path.write_text(json.dumps(there))
        if there == files.settings:
            files.prepare()
    with pytest.raises(UserError, match=r"val candidates made with other settings \(b, c, d\); choose"):
        files.prepare()


@pytest.mark.parametrize(("name", "text"), [("out", "mine"), ("settings.json", "{"), ("settings.json", "[" * 100_000)])
def test_candidates_that_do_not_tell_what_made_them_are_not_replaced(tmp_path, name, text):
    files = candidate_files.CandidateFiles(tmp_path, "val", {"a": 1}, SimpleNamespace(rank=0))
    (tmp_path / f"val.{name}").write_text(text)
    with pytest.raises(UserError, match=r"val candidates whose val.settings.json is missing or damaged; choose"):
        files.prepare()
