"""The one line that stands for an error."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

from harness import endings
from harness.endings import UserError, explain


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_gpu_without_memory_is_one_line(error):
    line = explain(error)
    assert line.startswith("the GPU is out of memory; use a smaller --batch_size, add --half_precision")
    assert "\n" not in line


def test_other_errors_of_a_gpu_keep_their_traceback():
    assert explain(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


def test_a_lost_peer_is_told_in_one_line_within_a_job_alone(monkeypatch):
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5361")
    monkeypatch.delenv("RANK", raising=False)
    assert explain(error) is None
    monkeypatch.setenv("RANK", "1")
    assert explain(error) == "another process of this job has ended; its own message says why"


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (
            "DistStoreError",
            "Timed out after 9 seconds waiting for clients. 1/2 clients joined.",
            "joined); start all of",
        ),
        ("DistNetworkError", "The client socket has timed out\nframes", "socket has timed out); start all of"),
        ("DistNetworkError", "failed to listen. name: EADDRINUSE", "the port is already in use); set MASTER_PORT"),
    ],
)
def test_processes_that_cannot_meet_are_one_line(kind, text, reason, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "7")
    line = explain(getattr(torch.distributed, kind)(text))
    assert line.startswith("the processes of this job cannot meet at host, port 7 (")
    assert reason in line
    assert "\n" not in line


def test_a_compiler_that_fails_is_one_line_with_its_reason():
    from torch._inductor.exc import InvalidCxxCompiler

    line = explain(InvalidCxxCompiler())
    assert "No working C++ compiler found" in line
    assert "--compile False" in line
    assert "\n" not in line
    assert endings._reason("backend='inductor' raised:\nInductorError: no gcc.\n\nSet TORCHDYNAMO_VERBOSE=1") == (
        "InductorError: no gcc"
    )


def test_a_killed_data_worker_is_one_line():
    assert "a worker process was killed" in explain(
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    )


@pytest.mark.parametrize(
    ("error", "by", "line"),
    [
        # As where /dev/shm is read-only, or absent: no file is named.
        (OSError(errno.EROFS, "Read-only file system"), "multiprocessing.synchronize", "out of shared memory"),
        (OSError(errno.ENOENT, "No such file or directory"), "multiprocessing.synchronize", "out of shared memory"),
        (
            OSError(errno.EAGAIN, "Resource temporarily unavailable"),
            "multiprocessing.popen_fork",
            "cannot start more processes",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "harness.files", "cannot open or write the output"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "harness.files", None),
    ],
)
def test_processes_that_cannot_be_made_are_told_apart_from_a_disk_that_cannot_be_written(error, by, line):
    scope = {"__name__": by, "error": error}
    exec("def make():\n    raise error", scope)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        scope["make"]()
    told = explain(caught.value)
    assert told is None if line is None else line in told


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError])
def test_a_connection_that_ends_is_a_killed_data_worker_where_it_was_to_one(kind):
    def raised(by):
        scope = {"__name__": by, "kind": kind}
        exec("def receive():\n    raise kind('gone')", scope)
        with pytest.raises(kind) as caught:
            scope["receive"]()
        return caught.value

    assert "a worker process was killed" in explain(raised("multiprocessing.connection"))
    assert explain(raised("csv")) is None  # A defect of ours, whose traceback stays.


def raised_again(error):
    """`error` as DataLoader raises it, when a worker process has met it."""
    try:
        raise error
    except type(error):
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    try:
        wrapper.reraise()
    except Exception as again:
        return again


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("cannot decode the image a/b.png"), "cannot decode the image a/b.png"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            "cannot open or write x: No space left on device; free",
        ),
        (
            OSError(errno.EIO, "Input/output error", "a/b.png"),
            "cannot open or write a/b.png: Input/output error; the disk has failed",
        ),
        (MemoryError(), "the machine is out of memory"),
        (np._core._exceptions._ArrayMemoryError((9, 9), np.dtype("float64")), "the machine is out of memory"),
        (RuntimeError("can't start new thread"), "cannot start more processes or threads"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_9_1>: Success"), "out of shared memory"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 65280 vs 65172"), "the disk is full"),
        (RuntimeError("unable to write to file </torch_9_1_0>: No space left on device (28)"), "out of shared memory"),
        (RuntimeError("received 0 items of ancdata"), "out of shared memory"),
        (OSError(errno.EMFILE, "Too many open files"), "out of shared memory"),
        (ValueError("a defect of ours"), None),
    ],
)
def test_what_a_worker_met_is_told_as_if_it_had_been_met_here(error, line):
    told = explain(raised_again(error))
    assert told is None if line is None else line in told
    assert "\n" not in str(told)


def test_of_what_a_worker_met_the_last_is_told():
    try:
        try:
            raise ValueError("what was behind it")
        except ValueError as error:
            raise UserError("cannot decode the image a/b.png") from error
    except UserError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError) as again:
        wrapper.reraise()
    assert explain(again.value) == "cannot decode the image a/b.png"


ENDS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from harness import endings
from harness.resume import stop_requests
def main():
    os.kill(os.getpid(), signal.SIGTERM)
    with stop_requests() as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert not stop
    print("a dash – and a name that is no text: \\udce9")
endings.run(main)
"""


KILLED_TWICE = """
import sys
sys.path.insert(0, sys.argv[1])
from harness import endings
def epochs():
    try:
        yield
    finally:
        raise RuntimeError(sys.argv[2])
def main():
    for _ in epochs():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
endings.run(main)
"""


@pytest.mark.parametrize("again", ["DataLoader worker (pid 7) is killed by signal: Killed.", "a fault of ours"])
def test_a_killed_worker_is_told_once(again):
    """torch raises its message wherever the process is, also in the `finally` of a loop that the first one ends."""
    command = [sys.executable, "-c", KILLED_TWICE, os.path.dirname(os.path.dirname(endings.__file__)), again]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("-c: a worker process was killed")
    assert ("Exception ignored" in ended.stderr) == (again == "a fault of ours")
    assert len(ended.stderr.splitlines()) == 1 or again == "a fault of ours"


def ignore_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "latin-1:strict"])
def test_what_an_encoding_lacks_is_marked_and_an_ignored_signal_stays_ignored(encoding):
    command = [sys.executable, "-c", ENDS, os.path.dirname(os.path.dirname(endings.__file__))]
    ended = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding},
                           preexec_fn=ignore_signals)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    dash = {"utf-8": "–".encode()}.get(encoding, b"\\u2013")
    assert ended.stdout == b"a dash " + dash + b" and a name that is no text: \\udce9\n"


HANGS_UP = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from harness import endings
from harness.resume import stop_requests
def main():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        print("to a terminal that has gone", flush=True)
        assert stop
        open("saved", "w").close()
        stop.leave("--resume goes on")
endings.run(main)
"""


def notice_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("kind", ["terminal", "pipe", "file"])
def test_a_terminal_that_hangs_up_stops_a_run_as_sigterm_does(kind, tmp_path):
    """Though nothing can be printed any more, where that was a terminal or a pipe."""
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    with open(tmp_path / "log", "wb") as file:
        out = file if kind == "file" else writer
        command = [sys.executable, "-c", HANGS_UP, os.path.dirname(os.path.dirname(endings.__file__))]
        # The tests themselves may have been started by nohup, and what is ignored stays so.
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, preexec_fn=notice_hangups)
        os.close(writer)
        os.close(reader)
        assert process.wait() == 129
    assert (tmp_path / "saved").exists()
    lines = "to a terminal that has gone\n-c: terminated; --resume goes on\n"
    assert (tmp_path / "log").read_text() == (lines if kind == "file" else "")


TWICE = """
import atexit, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from harness import endings
number = getattr(signal, sys.argv[2])
atexit.register(lambda: (os.kill(os.getpid(), number), time.sleep(60)))  # While Python ends, which may take long.
def args(error):
    os.kill(os.getpid(), number)  # While the line is made.
    return ("saved",)
kind = KeyboardInterrupt if number == signal.SIGINT else endings.Terminated
first = type("First", (kind,), {"args": property(args), "number": number})
def main():
    if sys.argv[3] == "interrupted":
        raise first.__new__(first)
    print("done")
endings.run(main)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("first", ["interrupted", "finished"])
def test_a_signal_while_the_script_ends_gives_no_traceback(number, first):
    """The one that hits Python's exit ends the process at once, as it would have ended."""
    command = [sys.executable, "-c", TWICE, os.path.dirname(os.path.dirname(endings.__file__)), number, first]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=heed_signals)
    assert ended.returncode == (128 + getattr(signal, number) if first == "interrupted" else 0)
    assert ended.stdout == "done\n" * (first == "finished")
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == (first == "interrupted")


def heed_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_streams_that_are_closed_take_what_is_printed():
    command = f"{sys.executable} -c '{CLOSED}' {os.path.dirname(os.path.dirname(endings.__file__))} >&- 2>&-"
    assert subprocess.run(command, shell=True).returncode == 2


CLOSED = """
import sys
sys.path.insert(0, sys.argv[1])
from harness import endings
def main():
    print("for nobody", sys.stderr.isatty())
    raise endings.UserError("what is wrong")
endings.run(main)
"""


def test_a_rank_that_is_empty_does_not_hide_the_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "")
    with pytest.raises(SystemExit):
        endings._end(2, "what is wrong")
    assert capsys.readouterr().err.endswith(": what is wrong\n")


def test_a_name_with_line_breaks_stays_on_the_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        endings._end(2, "cannot read a\nb\x1b[31m\u2028c\udcff é.png; choose another")
    assert capsys.readouterr().err == ("script.py: cannot read a\\nb\\x1b[31m\\u2028c\\udcff é.png; choose another\n")


def test_a_rank_without_a_job_hides_no_signal(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        endings._end(130, "interrupted")
    assert capsys.readouterr().err.endswith(": interrupted\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        endings._end(130, "interrupted")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_a_line_that_cannot_be_written_leaves_the_exit_code():
    root = os.path.dirname(os.path.dirname(endings.__file__))
    command = f"{sys.executable} -c '{CLOSED}' {root} >/dev/full 2>/dev/full"
    assert subprocess.run(command, shell=True).returncode == 2
