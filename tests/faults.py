#!/usr/bin/env python3
"""Bring faults about for real, and count what survives them.

    python3 tests/faults.py --trials 50                        every fault; 50 times SIGKILL
    python3 tests/faults.py --faults disk --scripts main.py    the faults and scripts whose names hold these words

Each script works on the smallest inputs, once undisturbed and then once a trial. A trial has survived when the script
ends as it should, when no file under its final name is half or changed, and when the same command (with --resume where
the script has it) then ends with the files of the undisturbed run, bit for bit. Prints a table in Markdown. Full and
read-only disks need root. tests/test_faults.py is the short form.
"""

import collections
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "SimCLS"), str(ROOT / "tests")]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Only on a CPU are two runs bit-equal without being asked to be.

import fault_kinds
from experiments import experiments, undisturbed
from fault_kinds import Lost, Trial, Unavailable

from harness import arguments, endings

COLUMNS = ("fault", "script", "tried", "survived", "lost")


class Trials:
    """Runs trials in `folder`. `rows` counts them: (fault, script) -> {"tried", "survived", "lost"}."""

    def __init__(self, folder, scripts=(), seed=0):
        (folder / "inputs").mkdir()
        found = experiments(folder / "inputs")
        self.experiments = [each for each in found if not scripts or any(word in each.name for word in scripts)]
        self.folder, self.random, self.rows = folder, random.Random(seed), {}
        self._usual, self._numbers = {}, collections.Counter()

    def run(self, fault, function, experiment):
        """Bring a fault about once, count it, and return what was lost, or "nothing"."""
        row = self.rows.setdefault((fault, experiment.name), {"tried": 0, "survived": 0, "lost": "nothing"})
        usual = self._usual.get(experiment.name)
        if usual is None:
            usual = self._usual[experiment.name] = undisturbed(experiment, self._new_folder(experiment))
        try:
            function(Trial(experiment, usual, self._new_folder(experiment), self.random))
        except Unavailable as reason:
            row["lost"] = f"not tried: {reason}"
            return row["lost"]
        except (Lost, TimeoutError) as error:
            row["tried"] += 1
            row["lost"] = str(error)
            return row["lost"]
        row["tried"] += 1
        row["survived"] += 1
        return "nothing"

    def _new_folder(self, experiment):
        self._numbers[experiment.name] += 1
        folder = self.folder / f"{experiment.name}-{self._numbers[experiment.name]}"
        folder.mkdir()
        return folder


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    integer = arguments.positive_int
    parser.add_argument("--trials", type=integer, default=50, help="times SIGKILL, over all scripts")
    parser.add_argument("--others", type=integer, default=2, help="times each other fault for each script")
    parser.add_argument("--faults", nargs="+", default=[""], help="only those whose names hold one of these words")
    parser.add_argument("--scripts", nargs="+", default=[], help="only those whose names hold one of these words")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the random moments")
    parser.add_argument("--output", type=Path, help="record, as JSON; rows of other faults and scripts stay in it")
    return parser


def plan(args, experiments):
    """The trials as a list of (fault, function, experiment)."""
    kills = list(fault_kinds.KILLS.items())
    planned = [(*kills[number % 2], experiments[number // 2 % len(experiments)]) for number in range(args.trials)]
    for _ in range(args.others):
        for experiment in experiments:
            for fault, function in fault_kinds.OTHERS.items():
                if experiment.model or fault != "GPU out of memory":
                    planned.append((fault, function, experiment))
            if experiment.workers:
                planned += [(fault, function, experiment) for fault, function in fault_kinds.WITH_WORKERS.items()]
    for experiment in experiments:
        if experiment.processes:
            planned += [(fault, function, experiment) for fault, function in fault_kinds.MANY_PROCESSES.items()]
    return [trial for trial in planned if any(word in trial[0] for word in args.faults)]


def main():
    args = get_args_parser().parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trials = Trials(Path(folder), args.scripts, args.seed)
        planned = plan(args, trials.experiments)
        try:
            for number, (fault, function, experiment) in enumerate(planned, 1):
                lost = trials.run(fault, function, experiment)
                seconds = time.monotonic() - started
                progress = f"{number} of {len(planned)}, {seconds:.0f} s: {fault}, {experiment.name}: lost {lost}"
                print(progress, file=sys.stderr, flush=True)
        finally:  # What was tried until an interruption counts too.
            rows = [{"fault": fault, "script": script, **row} for (fault, script), row in trials.rows.items()]
            print(table(rows), flush=True)
            if args.output:
                add_to_record(args.output, rows)
    if any(row["survived"] < row["tried"] for row in rows):
        sys.exit(1)


def table(rows):
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---:|---:|---|"]
    lines += ["| " + " | ".join(str(row[column]) for column in COLUMNS) + " |" for row in rows]
    total = {name: sum(row[name] for row in rows) for name in ("tried", "survived")}
    return "\n".join([*lines, f"| all | | {total['tried']} | {total['survived']} | |"])


def add_to_record(path, rows):
    """Write the record, with the rows of earlier runs that these do not replace."""
    import torch

    from harness.files import write_record
    from harness.machine import describe_machine

    new = {(row["fault"], row["script"]): row for row in rows}
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))["trials"]
        new = {(row["fault"], row["script"]): row for row in earlier} | new
    machine = describe_machine(torch.device("cpu"))
    write_record(path, {"benchmark": "faults", "machine": machine, "trials": [new[key] for key in sorted(new)]})


if __name__ == "__main__":
    endings.run(main)
