"""The faults that tests/faults.py brings about. Each is a function of a Trial, and raises Lost where it did harm."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import launch
from experiments import COUNT_CHANGES, snapshot
from launch import ROOT, wait_until

KILL_AT_CHANGE = """
import signal, threading, time

def at_change(number):
    if number == {number}:
        if {delay}:  # In the middle of what is written after this.
            threading.Thread(target=lambda: (time.sleep({delay}), os.kill(process, signal.SIGKILL))).start()
        else:
            os.kill(process, signal.SIGKILL)
"""
OUT_OF_MEMORY = """
import torch
from torch.overrides import TorchFunctionMode

class Full(TorchFunctionMode):
    products = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "").strip("_") in ("linear", "conv2d", "matmul", "bmm", "mm", "baddbmm"):
            self.products += 1
            if self.products == {number}:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **(kwargs or dict()))

Full().__enter__()
"""


class Lost(Exception):
    """What a fault has done harm to, in a few words."""


class Unavailable(Exception):
    """Why a fault cannot be brought about here."""


class Trial:
    """One time that a fault is brought about: an Experiment, in a `folder` of its own, against its Undisturbed run."""

    def __init__(self, experiment, usual, folder, random):
        self.experiment, self.usual, self.folder, self.random = experiment, usual, folder, random

    def start(self, *more, before="", folder=None):
        folder = folder or self.folder
        return launch.Script(self.experiment.script, *self.experiment.args, *more, cwd=folder, before=before)

    def some_time(self, low=0.0, high=1.0):
        """Sleep for a random part of what an undisturbed run takes."""
        time.sleep(self.random.uniform(low, high) * self.usual.seconds)

    def goes_on(self, folder=None, more=()):
        """Run the command again, and compare its files with those of the undisturbed run."""
        again = self.start(*self.experiment.go_on, *more, folder=folder)
        check(again.wait() == 0, f"going on ended with {again.code}: {last_line(again.err)}")
        self.compare(snapshot(folder or self.folder))

    def compare(self, files):
        usual = self.usual.files
        check(not usual.keys() - files.keys(), f"files are missing: {sorted(usual.keys() - files.keys())}")
        check(not files.keys() - usual.keys(), f"files are left over: {sorted(files.keys() - usual.keys())}")
        different = [name for name in usual if usual[name] != files[name]]
        check(not different, f"files differ: {different}")

    def no_half_file(self, folder):
        """Every file under its final name is whole: that of an undisturbed run."""
        files = {name: content for name, content in snapshot(folder).items() if name in self.usual.files}
        half = [name for name in files if files[name] != self.usual.files[name] and not self.is_passing(name)]
        check(not half, f"half or wrong files: {half}")
        return files

    def is_passing(self, name):
        """Whether a file changes within a run, as the scorer's weights do from one validation to the next; scorer.json
        is told in the end what counts beside the score, and the record of an earlier run goes with its weights."""
        passing = (".bin", "config.json", "scorer.json", "worker.json")
        return self.experiment.name == "main.py" and name.endswith(passing)


def check(good, what):
    if not good:
        raise Lost(what)


def last_line(text):
    return (text.strip().splitlines() or [""])[-1]


def said_in_one_line(script, code, wanted):
    """Check that `script` has ended with `code` and one line, that holds `wanted`, apart from progress and from what
    transformers warns of."""
    check(script.code == code, f"exit code {script.code}: {last_line(script.err)}")
    lines = [line for line in script.err.splitlines() if not re.search(r"\d+ of \d+$|^\[transformers\]", line)]
    check(len(lines) == 1 and re.search(wanted, lines[0]), f"said: {script.err.strip()!r}")


# ------------------------------------------------------------------------------------------------- kills and signals


def kill_at_a_random_moment(trial):
    script = trial.start()
    trial.some_time()
    script.kill()
    script.wait()
    trial.goes_on()


def kill_while_files_change(trial):
    number = trial.random.randint(1, trial.usual.changes)
    delay = trial.random.choice([0, 0.0005, 0.002])
    script = trial.start(before=COUNT_CHANGES + KILL_AT_CHANGE.format(number=number, delay=delay))
    script.wait()
    trial.no_half_file(trial.folder)
    trial.goes_on()


def signals(trial):
    number, code = trial.random.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    for attempt in range(5):
        folder = trial.folder / str(attempt)
        folder.mkdir()
        script = trial.start(folder=folder)
        # Until it has begun to work: while it is imported it ends as any Python process.
        wait_until(lambda: any(folder.iterdir()) or not script.running(), 30)  # noqa: B023 (called here)
        trial.some_time(0, 0.4)
        script.kill(number)
        script.wait()
        if script.code != 0:  # It had not ended before.
            break
    else:
        raise Unavailable(f"each of {attempt + 1} runs had ended before its signal")
    if number != signal.SIGHUP:  # There is nobody left to say it to.
        said_in_one_line(script, code, "interrupted|terminated")
    trial.goes_on(folder)


# ------------------------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder, size):
    """A new file system of `size` bytes, mounted at `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        raise Unavailable("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder):
    return sum(path.stat().st_size + 4096 for path in folder.rglob("*") if path.is_file())


def full_disk(trial):
    """A disk that is full at a random point of the work, half of the times with the files of an earlier run on it."""
    trial.start().wait()
    needed = size_of(trial.folder)
    earlier = trial.experiment.overwrites and trial.random.random() < 0.5
    with small_disk(trial.folder / "disk", 20 * needed + 2**22) as disk:
        if earlier:
            trial.start(folder=disk).wait()
        free = os.statvfs(disk).f_bavail * 4096
        with open(disk / "filler", "wb") as filler:
            filler.write(bytes(free - int(trial.random.uniform(0, 0.8) * needed)))
        script = trial.start(*trial.experiment.anew * earlier, folder=disk)
        script.wait()
        # Those that need more while they work than they leave, find the disk full at a point that cannot be told.
        if script.code != 0:
            said_in_one_line(script, 2, "No space left|disk is full")
        (disk / "filler").unlink()
        files = trial.no_half_file(disk)
        gone = [name for name in trial.usual.files.keys() - files.keys() if not trial.is_passing(name)]
        check(not earlier or not gone, f"files of an earlier run are gone: {gone}")
        check(not list(disk.rglob("*.tmp")), "a temporary file is left")
        trial.goes_on(disk)


def read_only_disk(trial):
    with small_disk(trial.folder / "disk", 2**28) as disk:
        trial.start(folder=disk).wait()
        before = snapshot(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        script = trial.start(folder=disk)
        script.wait()
        if trial.experiment.overwrites:
            said_in_one_line(script, 2, "Read-only file system")
        check(snapshot(disk) == before, "files have changed")


# --------------------------------------------------------------------------------------------------- other processes


def wait_for_workers(script):
    wait_until(lambda: len(script.relatives()) >= 3 or not script.running(), 30)


def killed_worker(trial):
    """SIGKILL for a process that loads or scores data."""
    for attempt in range(5):
        script = trial.start(*trial.experiment.workers, *trial.experiment.anew * (attempt > 0))
        wait_for_workers(script)
        trial.some_time(0, 0.3)
        workers = [pid for pid in script.relatives() if pid != script.pid]
        if workers and script.running():
            break
    check(workers, "it has no workers")
    with contextlib.suppress(ProcessLookupError):
        os.kill(trial.random.choice(workers), signal.SIGKILL)
    script.wait()
    if script.code != 0:  # Else the worker had just ended.
        said_in_one_line(script, 2, "process was killed")
    check(wait_until(lambda: not script.relatives(), 15, 0.1), "a process has outlived it")
    again = trial.start(*trial.experiment.workers, *trial.experiment.go_on)
    check(again.wait() == 0, f"going on ended with {again.code}: {last_line(again.err)}")


def killed_with_workers(trial):
    """SIGKILL for the main process alone: its workers end too, and do not keep the next run from its files."""
    script = trial.start(*trial.experiment.workers)
    wait_for_workers(script)
    trial.some_time(0, 0.5)
    script.kill()
    script.wait()
    again = trial.start(*trial.experiment.workers, *trial.experiment.go_on)
    check(again.wait() == 0, f"going on ended with {again.code}: {last_line(again.err)}")
    check(wait_until(lambda: not script.relatives(), 15, 0.1), "a worker has outlived it")


def out_of_gpu_memory(trial):
    """torch.OutOfMemoryError, as a full GPU raises it, in one of the first matrix products or convolutions."""
    script = trial.start(before=OUT_OF_MEMORY.format(number=trial.random.randint(1, 30)))
    script.wait()
    said_in_one_line(script, 2, "--batch_size.*half_precision.*recompute activations")
    trial.goes_on()


def second_run(trial):
    """A second run with the same output, started while the first one works."""
    first = trial.start()
    trial.some_time(0.2, 0.5)
    second = trial.start()
    second.wait()
    first.wait()
    for script in (first, second):
        if script.code != 0:
            said_in_one_line(script, 2, "another run is writing|holds an interrupted run|is a finished run")
    check(0 in (first.code, second.code), "both have ended without a result")
    trial.compare(snapshot(trial.folder))


# ---------------------------------------------------------------------------------------------------------- torchrun


def torchrun(trial, folder, *more, meeting=("--standalone", "--nproc_per_node=2")):
    """A new job of two processes, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, ROOT / trial.experiment.script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        list(map(str, [*command, *trial.experiment.args, *more])),
        cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(job, timeout=300):
    """Its exit code and errors; Lost when it takes longer."""
    try:
        errors = job.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise Lost(f"the job took longer than {timeout} s") from None
    return job.returncode, errors


def killed_rank(trial):
    """SIGKILL for one of two processes of torchrun; then the same job goes on."""
    whole, cut = trial.folder / "whole", trial.folder / "cut"
    whole.mkdir()
    cut.mkdir()
    code, errors = ended(torchrun(trial, whole))
    check(code == 0, f"undisturbed it ended with {code}: {last_line(errors)}")
    job = torchrun(trial, cut)
    check(wait_until(lambda: any(path.suffix in (".state", ".partial") for path in cut.rglob("*")), 120), "no state")
    ranks = [pid for pid in launch.children(job.pid) if pid != job.pid]
    os.kill(trial.random.choice(ranks), signal.SIGKILL)
    code, _ = ended(job)
    check(code != 0, "the job ended as if nothing had happened")
    check(wait_until(lambda: not launch.relatives(job.pid), 15, 0.1), "a process has outlived the job")
    code, errors = ended(torchrun(trial, cut, *trial.experiment.go_on))
    check(code == 0, f"going on ended with {code}: {last_line(errors)}")
    check(snapshot(cut) == snapshot(whole), "its files differ from those of an undisturbed job")


def two_machines(trial):
    """Two agents on this machine, each with one process: the files are those of one agent with two."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meeting = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    folders = [trial.folder / "agents", trial.folder / "one"]
    for folder in folders:
        folder.mkdir()
    jobs = [torchrun(trial, folders[0], meeting=meeting) for _ in range(2)]
    for code, errors in map(ended, jobs):
        check(code == 0, f"an agent ended with {code}: {last_line(errors)}")
    code, errors = ended(torchrun(trial, folders[1]))
    check(code == 0, f"one agent ended with {code}: {last_line(errors)}")
    check(snapshot(folders[0]) == snapshot(folders[1]), "the files differ from those of one machine")


KILLS = {"SIGKILL at a random moment": kill_at_a_random_moment, "SIGKILL while files change": kill_while_files_change}
OTHERS = {
    "SIGINT, SIGTERM or SIGHUP": signals,
    "full disk": full_disk,
    "read-only disk": read_only_disk,
    "GPU out of memory": out_of_gpu_memory,
    "second run, same output": second_run,
}
WITH_WORKERS = {"killed worker": killed_worker, "SIGKILL with workers": killed_with_workers}
MANY_PROCESSES = {"killed process of torchrun": killed_rank, "two agents of torchrun": two_machines}
