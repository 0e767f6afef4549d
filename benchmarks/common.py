"""What every benchmark shares: where its figures go, how they are shown, and fair timing of arms in one run."""

import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Before the imports from it: a script imports this module first, and can then import from these folders, too.
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
    """A parser with what the benchmarks share: --output of the benchmark `name`, and --rounds, by default `rounds`."""
    parser = arguments.OneLineParser(description=description)
    if rounds:
        parser.add_argument("--rounds", type=arguments.positive_int, default=rounds, help="of timing")
    parser.add_argument("--output", type=Path, help=f"by default benchmarks/results/<hardware>/{name}.json")
    return parser


def new_record(name, device, **facts):
    """The record of the benchmark `name`, a dict. device: torch.device, that it runs on."""
    return {"benchmark": name, "machine": describe_machine(device), **facts}


def save(record, args, name=None):
    """Write `record` to --output, or else to benchmarks/results/<hardware>/<name>.json, by default called as its
    benchmark is; returns the path."""
    slug = re.sub(r"[^a-z0-9]+", "-", record["machine"]["hardware"].lower()).strip("-")
    path = args.output or HERE / "results" / slug / f"{name or record['benchmark']}.json"
    write_record(path, record)
    return path


def finish(record, args, name=None):
    """`save` the record, and print what report.py shows of it: ratios with their verdicts, and its tables."""
    path, found = save(record, args, name), {record["machine"]["hardware"]: [record]}
    parts = [benchmarks.render(found), benchmarks.render_tables(found, record["benchmark"])]
    print(terminal.aligned("\n\n".join([*filter(None, parts), f"written: {path}"])))


def check(good, what):
    """AssertionError `what` unless `good`. An assert would be left out by python3 -O, and a wrong result be timed."""
    if not good:
        raise AssertionError(what)


def interleaved(arms, rounds):
    """Run every arm once a round, and return each arm's wall-clock seconds by round: dict[str, list[float]].

    As for `interleaved_rounds`, which see.
    """
    *_, seconds = interleaved_rounds(arms, rounds)
    return seconds


def wait():
    """Until the GPU, where there is one in use, has nothing left to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved_rounds(arms, rounds):
    """Run every arm once a round, and yield each arm's wall-clock seconds by round so far: dict[str, list[float]].

    Odd rounds go through the arms backwards, so that a machine that slows down or speeds up favours none. Warm up
    before. What an arm has the GPU do counts: it is waited for. An arm of which only a part is to be timed takes the
    time itself, and returns those seconds, a float.

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
    """A script of this folder that runs in another interpreter, which has another version of some package.

    It answers a line of JSON with a line of JSON, and starts with {"name"}. needs: the packages, in words, for the
    UserError when it does not start, or ends; None of a script that runs in this interpreter.
    """

    def __init__(self, python, script, *arguments, needs=None):
        command = [python, str(HERE / script), *map(str, arguments)]
        self._error = f"{shlex.join(command)}: it ended without an answer"
        if needs:
            self._error = f"--reference_python {python}: cannot run {script} there; it needs {needs}"
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            raise UserError(self._error) from None
        self.name = self._answer()["name"]

    def ask(self, request):
        """The answer to `request`; both are whatever JSON can hold."""
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
        with contextlib.suppress(OSError):  # What it ended without reading is still to be written.
            self._process.stdin.close()
        self._process.wait()
