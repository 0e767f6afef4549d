"""Files that are whole or not there, and records that name no folder of the machine that made them."""

import errno
import fcntl
import json
import os
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import files, run_log, runs
from harness.distributed import World
from harness.endings import UserError
from harness.files import ROOT, output_lock, places, portable, staging, write_record
from harness.runs import Run


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_that_takes_no_files_is_told():
    with pytest.raises(UserError, match="cannot create files in the folder /proc"), files.atomic_write("/proc/x.json"):
        pass


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (f"{ROOT}/SimCLS/demo", "SimCLS/demo"),
        (f"--data_dir={ROOT}/resnext/data", "--data_dir=resnext/data"),
        ("/home/someone/my papers/p.csv", "p.csv"),
        ("--output=/tmp/x/y.json", "--output=y.json"),
        (Path("/data/pictures/"), "pictures"),
        ("../../elsewhere/gen", "gen"),
        ("runs/digits", "runs/digits"),
        (Path("samples"), "samples"),
        ("/", "/"),
        ("--lr=0.1", "--lr=0.1"),
        ("documents/s", "documents/s"),
        ({"a": [1, (2.5, "/x/y"), None]}, {"a": [1, [2.5, "y"], None]}),
    ],
)
def test_what_a_record_keeps_of_a_path(word, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable(word) == expected


def test_a_path_below_the_repository_is_told_from_there(monkeypatch):
    monkeypatch.chdir(ROOT / "SimCLS")
    assert portable("../resnext/data") == "resnext/data"


def test_what_a_record_cuts_has_the_digest_of_its_place():
    arguments = {"relative": Path("samples"), "text": "samples", "cut": Path("/x/samples"), "lr": 0.1, "none": None}
    assert places(arguments).keys() == {"cut"}


def test_no_record_has_a_folder_of_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/resnext.py", "--data_dir", f"{tmp_path}/my pictures"])
    run = make_run(tmp_path, data_dir=f"{tmp_path}/my pictures", output_dir=tmp_path)
    run.write_record()
    text = run.path(".json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    assert record["arguments"]["data_dir"] == "my pictures"
    assert record["machine"]["command"] == "resnext.py --data_dir 'my pictures'"


def test_no_committed_record_has_a_folder_of_its_machine():
    paths = [path for folder in ("benchmarks/results", "SimCLS/demo") for path in (ROOT / folder).rglob("*.json")]
    records = [path for path in paths if '"machine"' in path.read_text(encoding="utf-8")]
    assert records
    for path in records:
        words = [word for text in strings(json.loads(path.read_text(encoding="utf-8"))) for word in text.split()]
        assert portable(words) == words, path


def strings(value):
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def test_finished_runs_on_two_folders_of_one_name_are_told_apart(tmp_path):
    make_run(tmp_path, data_dir="/one/pictures").write_record()
    another = r"is from a run with --data_dir pictures \(\w{8}\) \(now pictures \(\w{8}\)\)"
    for folder, line in (("/one/pictures", "is a finished run"), ("/two/pictures", another)):
        with pytest.raises(UserError, match=line), make_run(tmp_path, data_dir=folder).lock():
            pass


def make_run(folder, **args):
    return Run("resnext", folder, "name", Namespace(**args), World(0, 1, torch.device("cpu")))


def test_the_clock_of_a_resumed_run_goes_on_from_its_last_state(tmp_path, monkeypatch):
    """Each process has a clock of its own; what was done after the last state is done again, and counts once."""
    now = [1000.0]
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for start, saved_after, killed_after, total in ((1000.0, 60, 5, 60), (7.0, 30, 500, 90), (9e6, 10, 0, 100)):
        now[0] = start
        run = make_run(tmp_path, num_epoch=9)
        run.resume()
        now[0] += saved_after
        assert run.elapsed_seconds() == total
        run.save(1, 0)
        now[0] += killed_after


def test_numbers_are_those_that_were_measured(tmp_path):
    write_record(tmp_path / "a.json", {"seconds": 0.1 + 0.2, "count": 3, "name": "/x/y"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"seconds": 0.1 + 0.2, "count": 3, "name": "y"}


@pytest.fixture
def no_warning_yet():
    files._warn_of_no_locks.cache_clear()
    yield
    files._warn_of_no_locks.cache_clear()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL])
def test_where_there_are_no_locks_a_warning_says_so_once(number, tmp_path, monkeypatch, capsys, no_warning_yet):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with output_lock(tmp_path / "run.lock"), staging(tmp_path / "samples") as stage:
            (stage / "0.json").touch()
    errors = capsys.readouterr().err
    assert errors.startswith("warning: ")
    # The run and the folder are told of by name.
    assert errors.count("\n") == errors.count("make sure that no second run writes the same output") == 2


def test_another_failure_of_a_lock_is_not_hidden(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), output_lock(tmp_path / "run.lock"):
        pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (files.Timeout("run.lock"), "cannot create the lock file .*run.lock; choose another output"),
        (OSError(errno.EINVAL, "Invalid argument", "run.lock"), "cannot create the lock file .*run.lock; choose"),
        (PermissionError(errno.EACCES, "lock file belongs to uid 7", "run.lock"),
         f"cannot use the lock file .*run.lock, which belongs to user id {os.getuid()}; remove it"),
        (NotImplementedError("FileSystem does not appear to support flock"), ".*run does not support locks"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_lock_file_is_told_apart(error, line, tmp_path, monkeypatch, capsys, no_warning_yet):
    """Errors of opening it, as filelock passes them on, and of an older filelock."""

    def refuse(*args, **more):
        raise error

    monkeypatch.setattr(files, "FileLock", refuse)
    if isinstance(error, PermissionError):
        (tmp_path / "run.lock").touch()
    if isinstance(error, NotImplementedError):
        with output_lock(tmp_path / "run.lock"):
            assert re.match(f"warning: {line}", capsys.readouterr().err)
        return
    with pytest.raises(UserError, match=line), output_lock(tmp_path / "run.lock"):
        pass


def test_a_lock_file_that_is_a_link_is_told_as_one(tmp_path):
    (tmp_path / "run.lock").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"run.lock is a link; remove it"), output_lock(tmp_path / "run.lock"):
        pass


@pytest.mark.parametrize("left", ["a file", "a link", "what stays"])
def test_what_stands_in_the_place_of_unfinished_files_goes_or_is_told(left, tmp_path, monkeypatch):
    place = tmp_path / ".unfinished"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine").touch()
    if left == "a file":
        place.touch()
    elif left == "a link":
        place.symlink_to("kept")
    else:
        place.mkdir()
        monkeypatch.setattr(files.shutil, "rmtree", lambda *args, **more: None)
        with pytest.raises(UserError, match=r"cannot replace .*\.unfinished; remove it"), staging(tmp_path):
            pass
        place.rmdir()
    if left != "what stays":
        with staging(tmp_path) as stage:
            assert list(stage.iterdir()) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "mine"]


def test_data_is_on_the_disk_before_it_has_its_name_and_others_may_read_it(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("replace") or replace(old, new))
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert done == ["fsync", "replace"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("raised", [RuntimeError("a data worker is killed"), KeyboardInterrupt("is killed")])
def test_what_a_signal_raises_while_torch_writes_is_told(tmp_path, raised):
    """Torch itself says only that its archive is not whole."""

    def write():
        with files.atomic_write(tmp_path / "a.state") as file:
            parts, real = [], file._file

            def killed_at_the_third(data):
                parts.append(data)
                if len(parts) == 3:
                    raise raised
                return real.write(data)

            file._file = SimpleNamespace(write=killed_at_the_third, flush=real.flush)
            torch.save({"weights": torch.zeros(1000)}, file)

    with pytest.raises(type(raised), match="is killed"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_place_whose_name_is_no_text_has_a_digest_too(tmp_path):
    odd = os.fsdecode(b"o\xff")
    assert not files.is_utf8(tmp_path / odd)
    assert files.is_utf8(tmp_path / "ö")
    assert len(files.place_digest(odd)) == 8
    assert files.place_digest(odd) != files.place_digest("o")


def test_a_log_takes_any_words_and_no_place_that_tensorboard_refuses(tmp_path):
    with pytest.raises(UserError, match="whose name is not UTF-8"):
        run_log.RunLog(tmp_path / os.fsdecode(b"o\xff"))
    log = run_log.RunLog(tmp_path)
    log.line(os.fsdecode(b"o\xff"))
    log.close()
    assert (tmp_path / "log.txt").read_text() == "o\\udcff\n"
