"""What every benchmark shares: where its figures go, fair timing of two or more arms in one run, and its verdicts."""

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

from harness import arguments
from harness.endings import UserError
from harness.files import write_record
from harness.machine import describe_machine, hardware_name
from reporting.verdicts import find_target, judge, median_interval

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


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


def save(record, args, device, name=None):
    """Write `record` to --output, or to its place among the results, there called `name` if not as its benchmark is;
    returns the path."""
    path = args.output or results_path(name or record["benchmark"], device)
    write_record(path, record)
    return path


def results_path(benchmark_name, device):
    """`benchmarks/results/<hardware>/<benchmark_name>.json`, the hardware's name in lower case with hyphens.

    device: torch.device.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", hardware_name(device).lower()).strip("-")
    return RESULTS / slug / f"{benchmark_name}.json"


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


def interleaved_rounds(arms, rounds):
    """Run every arm once a round, and yield each arm's wall-clock seconds by round so far: dict[str, list[float]].

    Odd rounds go through the arms backwards, so that a machine that slows down or speeds up favours none. Warm up
    before. An arm that works on a GPU has to synchronise before it returns. An arm of which only a part is to be timed
    takes the time itself, and returns those seconds, a float.

    arms: dict[str, callable without arguments].
    """
    seconds = {name: [] for name in arms}
    for index in range(rounds):
        order = list(arms) if index % 2 == 0 else list(reversed(arms))
        for name in order:
            start = time.perf_counter()
            own = arms[name]()
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


def spread(ratio, digits=2):
    """ "95 % interval 1.21 to 1.34", of a ratio_summary; of fewer than six rounds "lowest to highest 1.15 to 1.38"."""
    name = "95 % interval" if ratio["interval"] else "lowest to highest"
    low, high = ratio["interval"] or (ratio["low"], ratio["high"])
    return f"{name} {low:.{digits}f} to {high:.{digits}f}"


def verdict(targets, device, case, ratio):
    """ "; target at least 8: yes", of the ratio_summary `ratio`, judged by its interval; "" without such a target.

    targets, case: as for `find_target`. device: torch.device.
    """
    target = find_target(targets, device.type, hardware_name(device), case)
    if target is None:
        return ""
    bound, limit = target
    return f"; target {bound} {limit:g}: {judge(bound, limit, ratio['interval'])}"


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
