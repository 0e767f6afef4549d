"""Candidate files to samples: nothing lost, shifted or reordered; and the text helpers that this rests on."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import preprocess
import pytest
from conftest import ROOT, script_command
from launch import PATIENCE, wait_until
from rouge_score.rouge_scorer import RougeScorer
from utils import map_in_order, read_lines

from harness.endings import UserError
from harness.files import staging
from texts import provenance
from texts.candidate_files import FILES, edited_files
from texts.samples import read_sample, sample_files
from texts.sentences import SentenceSplitter, ptb_tokenize

pytestmark = pytest.mark.slow

SCRIPT = "SimCLS/preprocess.py"
FIELDS = ("source", "target", "out")
KEYS = ["article", "abstract", "candidates", "article_untok", "abstract_untok", "candidates_untok"]


def write_files(folder, documents, split="train"):
    """documents: list of (source, target, [candidates])."""
    folder.mkdir(exist_ok=True)
    lines = {"source": [], "target": [], "out": []}
    for source, target, candidates in documents:
        lines["source"].append(source)
        lines["target"].append(target)
        lines["out"] += candidates
    for field in FIELDS:
        for suffix, change in (("", str), (".tokenized", ptb_tokenize)):
            with open(folder / f"{split}.{field}{suffix}", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(change(line) + "\n" for line in lines[field])
    return folder


def cat_documents(count, candidates=3):
    return [
        (
            f"Cat number {index} sleeps. It does not run.",
            f"A cat sleeps. It is number {index}.",
            [f"Cat {index} sleeps {choice} times. It runs." for choice in range(candidates)],
        )
        for index in range(count)
    ]


def samples(folder):
    """The samples of a folder in order; any other file but their provenance is an error."""
    names = sorted(set(os.listdir(folder)) - {"provenance.json"}, key=lambda name: int(name.removesuffix(".json")))
    assert names == [f"{index}.json" for index in range(len(names))]
    return [json.loads((folder / name).read_text()) for name in names]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def letters(text):
    """Everything but the white space, of which the splitter drops or adds some between sentences."""
    return "".join(text.split()) if isinstance(text, str) else "".join(map(letters, text))


def test_a_sample_is_as_the_published_ones_and_scored_as_rouge_score_does(tmp_path, run_script):
    documents = [
        (
            "Juan Arango bit an opponent. He was not booked.",
            "Arango bit Zavela. The referee did not book him.",
            ["Arango bites Zavela. He isn't booked.", "", "Arango bites Zavela. He isn't booked."],
        ),
        *cat_documents(4),
    ]
    write_files(tmp_path / "in", documents)
    args = ("--src_dir", tmp_path / "in", "--split", "train", "--cand_num", 3)
    run_script(SCRIPT, *args, "--tgt_dir", tmp_path / "one", "--workers", 1)
    run_script(SCRIPT, *args, "--tgt_dir", tmp_path / "two", "--workers", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    sample = samples(tmp_path / "one")[0]
    assert list(sample) == KEYS
    assert sample["article_untok"] == ["Juan Arango bit an opponent.", "He was not booked."]
    assert sample["abstract"] == ["arango bit zavela .", "the referee did not book him ."]
    untok = ["Arango bites Zavela.", "He isn't booked."]
    tokenized = ["arango bites zavela .", "he is n't booked ."]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    rouge = scorer.score("\n".join(sample["abstract"]), "\n".join(tokenized))
    score = sum(value.fmeasure for value in rouge.values()) / 3
    assert sample["candidates_untok"] == [[untok, pytest.approx(score)], [[], 0.0], [untok, pytest.approx(score)]]
    assert sample["candidates"] == [[tokenized, pytest.approx(score)], [[], 0.0], [tokenized, pytest.approx(score)]]


def test_likelihoods_reach_their_candidates_and_a_wrong_line_is_named(tmp_path, run_script):
    write_files(tmp_path / "in", cat_documents(3))
    args = ("--src_dir", tmp_path / "in", "--tgt_dir", tmp_path / "out", "--split", "train", "--cand_num", 3)
    lines = [f"{-number - 0.5} {number + 1}" for number in range(9)]
    path = tmp_path / "in/train.likelihood"
    path.write_text("\n".join(lines) + "\n")
    run_script(SCRIPT, *args, "--workers", 1)
    found = [read_sample(tmp_path / "out" / f"{index}.json") for index in range(3)]
    assert [pair for sample in found for pair in sample["likelihood"]] == [[-n - 0.5, n + 1] for n in range(9)]
    for wrong in (found[0]["likelihood"][:2], [[-1.0, 0]] * 3, [[float("nan"), 2]] * 3):
        (tmp_path / "wrong.json").write_text(json.dumps(found[0] | {"likelihood": wrong}))
        with pytest.raises(UserError, match=r"2 likelihood;|likelihood.0 is not .log-probability, tokens."):
            read_sample(tmp_path / "wrong.json")
    args = [tmp_path / "bad" if word == tmp_path / "out" else word for word in args]
    for line in ("-1.5", "nan 3", "-2 0", "- 4"):
        path.write_text("\n".join([*lines[:4], line, *lines[5:]]) + "\n")
        assert f"train.likelihood, line 5: {line!r} is not a log-prob" in run_script(SCRIPT, *args, code=2).stderr
    path.write_text("\n".join(lines[:8]) + "\n")
    assert "train.likelihood has 8 lines, not 9" in run_script(SCRIPT, *args, code=2).stderr


def test_files_that_were_edited_are_told(tmp_path, run_script):
    write_files(tmp_path / "in", cat_documents(4))
    args = ("--src_dir", tmp_path / "in", "--split", "train", "--cand_num", 3, "--workers", 1)
    (tmp_path / "in" / "train.likelihood").write_text("-1.5 3\n" * 12)
    digests = {name: provenance.digest_files([tmp_path / "in" / f"train.{name}"]) for name in FILES[:-1]}
    (tmp_path / "in" / "train.settings.json").write_text(json.dumps({"files": digests}))  # As gen_candidate.py does.
    assert "changed since" not in run_script(SCRIPT, *args, "--tgt_dir", tmp_path / "one").stderr
    out = tmp_path / "in" / "train.out"
    out.write_text("".join(reversed(out.read_text().splitlines(keepends=True))))
    (tmp_path / "in" / "train.likelihood").unlink()
    told = run_script(SCRIPT, *args, "--tgt_dir", tmp_path / "two").stderr
    assert f"warning: {tmp_path / 'in'}: train.out, train.likelihood changed since gen_candidate.py wrote them" in told
    made = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("one", "two")]
    assert [each.get("edited") for each in made] == [None, ["train.out", "train.likelihood"]]
    (tmp_path / "in" / "train.settings.json").write_text("{}")  # As an earlier version did.
    assert edited_files(tmp_path / "in", "train") == []


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b\u2029c", "a\x0bb\x0cc\x1cd\x1ee", "\ufeffa\x01"])
def test_only_newlines_end_a_line(tmp_path, text):
    path = tmp_path / "lines"
    path.write_bytes(f"{text}\n\n{text}".encode())
    assert list(read_lines(path)) == [text.removeprefix("\ufeff"), "", text]
    assert len(ptb_tokenize(text).splitlines()) == 1


def test_samples_of_another_input_are_never_replaced(tmp_path, run_script):
    def run(count, *more, code=0, into="out"):
        write_files(tmp_path / "in", cat_documents(count))
        args = ("--src_dir", tmp_path / "in", "--tgt_dir", tmp_path / into, "--split", "train", "--cand_num", 3)
        return run_script(SCRIPT, *args, "--workers", 1, *more, code=code).stderr

    run(7)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "out")
    assert "out has samples made with other settings (files); choose another --tgt_dir, or delete" in run(3, code=2)
    assert "has samples made with other settings (rouge_tokens);" in run(7, "--rouge_tokens", "unicode", code=2)
    assert contents(tmp_path / "out") == before
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "0.json").write_text("{}")
    assert "has samples made with unknown settings;" in run(7, code=2, into="published")
    (tmp_path / "out" / "3.json").unlink()  # As a kill between the old samples' end and the new ones' names leaves it.
    with pytest.raises(UserError, match=r"out has 6 of its 7 samples; run the same preprocess\.py command again"):
        sample_files(tmp_path / "out")
    run(7)
    assert len(sample_files(tmp_path / "out")) == 7
    assert contents(tmp_path / "out") == before


def test_the_first_sample_gets_its_name_last(tmp_path, monkeypatch):
    """So that run.sh, which looks for it, makes the others too after Ctrl-C."""

    def rename(source, target, own=os.rename):
        if len(preprocess.own_samples(tmp_path)) == 2:
            raise KeyboardInterrupt
        own(source, target)

    (tmp_path / "stage").mkdir()
    for index in range(4):
        (tmp_path / "stage" / f"{index}.json").touch()
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        preprocess.publish_samples(tmp_path / "stage", tmp_path, 4)
    assert sorted(path.name for path in preprocess.own_samples(tmp_path)) == ["2.json", "3.json"]


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """(command without --tgt_dir, the files that it ends with, their folder): some seconds of work by two workers."""
    folder = tmp_path_factory.mktemp("slow")
    write_files(folder / "in", cat_documents(1500, candidates=8))
    command = script_command(SCRIPT, "--src_dir", folder / "in", "--split", "train", "--cand_num", 8, "--workers", 2)
    subprocess.run([*command, "--tgt_dir", folder / "out"], check=True, capture_output=True)
    return command, contents(folder / "out"), folder / "out"


def start_and_wait_for_samples(command, folder):
    process = subprocess.Popen(
        [*command, "--tgt_dir", folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begun = wait_until((folder / ".unfinished" / "100.json").exists, PATIENCE)
    assert begun, process.communicate()
    return process


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid):
    try:
        # A process that has ended, but whose parent has not asked for its exit code, has no command line.
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def wait_until_gone(pids):
    assert wait_until(lambda: not any(map(is_running, pids)), PATIENCE), "a worker outlived its parent"


def test_a_killed_run_leaves_no_sample_and_no_worker_and_its_rerun_ends_the_same(tmp_path, slow_run):
    command, expected, _ = slow_run
    process = start_and_wait_for_samples(command, tmp_path / "out")
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_until_gone(workers)
    assert sorted(os.listdir(tmp_path / "out")) == [".unfinished", ".unfinished.lock"]
    subprocess.run([*command, "--tgt_dir", tmp_path / "out"], check=True, capture_output=True)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_line_and_the_old_samples_stay(tmp_path, slow_run, number, code):
    shutil.copytree(slow_run[2], tmp_path / "out")
    process = start_and_wait_for_samples(slow_run[0], tmp_path / "out")
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert [line for line in errors.splitlines() if " of " not in line] == [errors.splitlines()[-1]]
    assert contents(tmp_path / "out") == slow_run[1]


def test_a_killed_worker_is_one_line_and_exit_code_2(tmp_path, slow_run):
    process = start_and_wait_for_samples(slow_run[0], tmp_path / "out")
    os.kill(children(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "a worker process was killed" in errors.splitlines()[-1]
    assert os.listdir(tmp_path / "out") == []


def test_a_second_run_on_the_same_folder_is_refused(tmp_path, run_script):
    write_files(tmp_path / "in", cat_documents(2))
    with staging(tmp_path / "out"):
        args = ("--src_dir", tmp_path / "in", "--tgt_dir", tmp_path / "out", "--split", "train", "--cand_num", 3)
        result = run_script(SCRIPT, *args, code=2)
        assert "another run is writing" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert sorted(os.listdir(tmp_path / "out")) == [".unfinished", ".unfinished.lock"]


def square(number):
    if number < 0:
        raise ValueError(number)
    return number * number


@pytest.mark.parametrize("workers", [1, 2])
def test_mapping_keeps_the_order_and_reads_little_ahead(workers):
    others = set(multiprocessing.active_children())  # Of other tests.
    read = []
    squares = map_in_order(square, (read.append(item) or item for item in range(1000)), workers, chunk=4)
    assert [next(squares) for _ in range(6)] == [0, 1, 4, 9, 16, 25]
    assert len(read) <= 100
    assert list(squares) == [number * number for number in range(6, 1000)]
    with pytest.raises(ValueError, match="-1"):
        list(map_in_order(square, [1, -1, 2], workers, chunk=1))
    assert not set(multiprocessing.active_children()) - others


SIGNALLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from utils import map_in_order
signal.signal(signal.SIGTERM, lambda *_: None)  # As in a script that ends in its own time.
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    print(list(map_in_order(abs, range(100), 2, chunk=1)))
except Exception as error:
    print(error)
"""


def test_a_signal_that_comes_before_a_worker_is_ready_ends_it():
    """The pool sends one to all workers when one was killed, and then waits for them."""
    code = SIGNALLED.format(path=[str(ROOT), str(ROOT / "SimCLS")])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "a worker process was killed" in result.stdout, result.stderr


def test_ptb_tokens():
    text = 'He said "Hi there." Mr. Smith (of the U.S. Army) can\'t go. "No," she said. P=.5, 3.5 mg etc.'
    expected = (
        "He said `` Hi there . '' Mr. Smith ( of the U.S. Army ) ca n't go . `` No , '' she said . P=.5 , 3.5 mg etc ."
    )
    assert ptb_tokenize(text) == expected
    assert ptb_tokenize("") == ""


SPLIT = """
import sys
sys.path[:0] = {path!r}
from texts.sentences import SentenceSplitter
texts = ["The dose was 5 mg. per day. It worked.", "Patients took 9 mg. of it. They slept."] * 50
print(SentenceSplitter(texts).split("We gave 7 mg. of it. Dr. No came! Why?"))
"""


def split_in_new_process(**env):
    code = SPLIT.format(path=sys.path)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, check=True
    )


def test_learnt_sentences_do_not_depend_on_the_process():
    results = {split_in_new_process(PYTHONHASHSEED=seed, NLTK_DATA="/nowhere").stdout for seed in "123"}
    assert len(results) == 1
    assert "'We gave 7 mg. of it.'" in results.pop()


def test_without_documents_a_short_list_of_abbreviations_splits():
    code = SPLIT.replace("(texts)", "(None)").format(path=sys.path)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"NLTK_DATA": "/x"}, check=True
    )
    assert result.stdout == "['We gave 7 mg.', 'of it.', 'Dr. No came!', 'Why?']\n"


def test_installed_nltk_data_is_used(tmp_path):
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / name).write_text("dr" if name == "abbrev_types.txt" else "")
    assert "'Dr. No came!'" in split_in_new_process(NLTK_DATA=str(tmp_path)).stdout
    assert "'Dr. No came!'" not in split_in_new_process(NLTK_DATA="/nowhere").stdout


def test_a_splitter_reads_a_bounded_sample(monkeypatch):
    def texts():
        yield "Short. Text."
        for _ in range(20):
            yield "Many words. " * 5000
        raise AssertionError("read to the end")

    assert SentenceSplitter(texts()).split("One. Two.") == ["One.", "Two."]


def test_a_missing_file_names_itself(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.out"):
        next(read_lines(tmp_path / "nothing.out"))


def test_a_digest_of_files_is_of_each_of_them(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    digests = set()
    for changed in (None, *paths):
        for path in paths:
            path.write_text("changed" if path == changed else path.name)
        digests.add(provenance.digest_files(paths))
    assert len(digests) == 4
