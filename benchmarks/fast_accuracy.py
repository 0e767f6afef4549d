"""What resnext_fast.py reaches when benchmarks/fast.py trains it: accuracy over seeds, and the seconds it took."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

from resnext_fast import get_fast_args_parser, suffix

from experiment import run_name
from harness.endings import UserError
from reporting.comparison import Sample
from reporting.records import Record

SCRIPT = Path(__file__).resolve().parent.parent / "resnext" / "resnext_fast.py"
GOAL = 94.0  # Percent of the test pictures; the seconds until there are stated.


def accuracy(row, args):
    """What training by the Row reaches over the seeds, and how long it took, flat."""
    runs = [train(row, args.fast_epochs, seed, args.run_dir) for seed in args.seeds]
    return {"epochs": args.fast_epochs, "seeds": len(runs)} | summarise(runs)


def train(row, epochs, seed, folder):
    """The Record of resnext_fast.py with the flags of `row`, from `folder` when it is there already."""
    flags = [*row.flags, "--num_epoch", str(epochs), "--seed", str(seed)]
    folder = folder / f"{epochs}_epochs"
    code = subprocess.run([sys.executable, str(SCRIPT), *flags, "--output_dir", str(folder), "--resume"]).returncode
    if code:
        raise UserError(f"training the row {row.label!r} ended with exit code {code}; its own line says why")
    args = get_fast_args_parser().parse_args(flags)
    path = folder / f"{run_name(args, suffix(args))}.json"
    return Record(path, json.loads(path.read_text(encoding="utf-8")))


def summarise(runs):
    reached = Sample.of(run.last("test_acc") for run in runs)
    load = mean_or_none(run.load_percent() for run in runs)
    return {
        "test_acc_mean": reached.mean,
        "test_acc_deviation": reached.deviation if reached.n > 1 else None,
        "training_seconds": mean_or_none(run.overall_seconds() for run in runs),
        f"seconds_to_{GOAL:g}_percent": mean_or_none(map(seconds_to_goal, runs)),
        "load_share_of_step": load and load / 100,
    }


def mean_or_none(values):
    """The mean of `values`; None when one of them is."""
    values = list(values)
    return None if None in values else statistics.mean(values)


def seconds_to_goal(run):
    """Training seconds until the end of the first epoch with GOAL; None when no epoch reaches it, and for a run that
    was resumed, whose record lacks a part of an epoch."""
    reached = next((index for index, epoch in enumerate(run.epochs, 1) if epoch["test_acc"] >= GOAL), None)
    if reached is None or run.overall_seconds() is None:
        return None
    return dataclasses.replace(run, record=run.record | {"epochs": run.epochs[:reached]}).overall_seconds()
