"""Shared by all benchmarks: writing and showing records, and fair timing of several arms in one run."""

import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Scripts import this module first, so that they can then import from these folders.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "resnext", "SimCLS")]

import torch

from harness import arguments
from harness.endings import UserError
from harness.files import write_record
from harness.machine import describe_machine
from reporting import benchmarks, terminal
from reporting.verdicts import median_interval

HERE = Path(__file__).resolve().parent
CPU, ON_CUDA = torch.device("cpu"), torch.cuda.is_available()
DEVICE = torch.device("cuda") if ON_CUDA else CPU


def get_parser(description, name, rounds=None):
    """A parser with the benchmarks' common arguments: --output and, if `rounds` is given, --rounds with that default.

    name: the benchmark's, for the default of --output in the help.
    """
    parser = arguments.OneLineParser(description=description)
    if rounds:
        parser.add_argument("--rounds", type=arguments.positive_int, default=rounds, help="timing rounds")
    parser.add_argument("--output", type=Path, help=f"by default benchmarks/results/<hardware>/{name}.json")
    return parser


def new_record(name, device, **facts):
    """A new record of the benchmark `name`, a dict. device: the torch.device that it runs on."""
    return {"benchmark": name, "machine": describe_machine(device), **facts}


def save(record, args, name=None):
    """Write `record` to --output or, by default, to benchmarks/results/<hardware>/<name>.json; returns the path.

    name: by default the benchmark's name.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", record["machine"]["hardware"].lower()).strip("-")
    path = args.output or HERE / "results" / slug / f"{name or record['benchmark']}.json"
    write_record(path, record)
    return path


def finish(record, args, name=None):
    """Save the record and print it as report.py does: the ratios with their verdicts, then its tables."""
    path, found = save(record, args, name), {record["machine"]["hardware"]: [record]}
    parts = [benchmarks.render(found), benchmarks.render_tables(found, record["benchmark"])]
    print(terminal.aligned("\n\n".join([*filter(None, parts), f"written: {path}"])))


def check(good, what):
    """Raise AssertionError(what) unless `good`. python3 -O would skip an assert, and a wrong result would be timed."""
    if not good:
        raise AssertionError(what)


def interleaved(arms, rounds):
    """Like `interleaved_rounds`, but returns only the seconds of all rounds: dict[str, list[float]]."""
    *_, seconds = interleaved_rounds(arms, rounds)
    return seconds


def wait():
    """Wait until the GPU, if one is in use, is idle."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved_rounds(arms, rounds):
    """Run every arm once per round; yield the arms' wall-clock seconds so far after each: dict[str, list[float]].

    Every second round runs the arms in reverse order, so that a machine that slows down or speeds up favours none. The
    arms must be warmed up. An arm's GPU work is waited for and included. To time only a part of its work, an arm
    measures and returns the seconds, a float.

    arms: dict[str, callable without arguments].
    """
    seconds = {name: [] for name in arms}
    for index in range(rounds):
        order = list(arms) if index % 2 == 0 else list(reversed(arms))
        for name in order:
            wait()
            start = time.perf_counter()
            own = arms[name]()
            wait()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
        yield seconds


def ratio_summary(base, new):
    """How many times faster `new` is: {"median", "low", "high", "interval"} of base / new, round by round.

    base, new: seconds by round, as `interleaved` returns them. interval: `median_interval` of the ratios.
    """
    ratios = [slow / fast for slow, fast in zip(base, new, strict=True)]
    return {
        "median": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "interval": median_interval(ratios),
    }


class Reference:
    """A script of this folder that runs in its own process, often in an interpreter with other package versions.

    It first writes a JSON line {"name"}, then answers each JSON line with one. needs: what that interpreter needs, in
    words, for the UserError when the script does not start or ends early; None if it runs in this interpreter.
    """

    def __init__(self, python, script, *arguments, needs=None):
        command = [python, str(HERE / script), *map(str, arguments)]
        self._error = f"{shlex.join(command)} ended without an answer"
        if needs:
            self._error = f"--reference_python {python}: cannot run {script} with it; it needs {needs}"
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            raise UserError(self._error) from None
        self.name = self._answer()["name"]

    def ask(self, request):
        """The answer to `request`; both are JSON values."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise UserError(self._error) from None
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise UserError(self._error)
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError):  # Closing flushes, which fails if the script has ended already.
            self._process.stdin.close()
        self._process.wait()
