"""What the rows of benchmarks/fast.py reach when they train: accuracy over seeds, and the seconds that it took."""

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


def accuracy(row, epochs, args, whole=False):
    """What training by the Row for `epochs` reaches over the seeds, flat; with `whole`, also how long it took."""
    runs = [train(row, epochs, seed, args.run_dir) for seed in args.seeds]
    found = {"epochs": epochs, "seeds": len(runs)} | summarise(runs, whole)
    words = (f"{key} {each if not isinstance(each, float) else round(each, 3)}" for key, each in found.items())
    print(f"{row.label}: {'  '.join(words)}", flush=True)
    return found


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


def summarise(runs, whole):
    reached = Sample.of(run.last("test_acc") for run in runs)
    found = {
        "test_acc_mean": reached.mean,
        "test_acc_deviation": reached.deviation if reached.n > 1 else None,
    }
    if not whole:
        return found
    return found | {
        "training_seconds": mean_or_none(run.overall_seconds() for run in runs),
        f"seconds_to_{GOAL:g}_percent": mean_or_none(map(seconds_to_goal, runs)),
        "load_share_of_step": mean_or_none(load_share(run) for run in runs),
    }


def mean_or_none(values):
    """The mean of `values`; None when one of them is."""
    values = list(values)
    return None if None in values else statistics.mean(values)


def load_share(run):
    """The time of loading over that of the steps, in all; None without steps."""
    percent = run.load_percent()
    return percent and percent / 100


def seconds_to_goal(run):
    """Training seconds until the end of the first epoch with GOAL; None when no epoch reaches it, and for a run that
    was resumed, whose record lacks a part of an epoch."""
    reached = next((index for index, epoch in enumerate(run.epochs, 1) if epoch["test_acc"] >= GOAL), None)
    if reached is None or run.overall_seconds() is None:
        return None
    return dataclasses.replace(run, record=run.record | {"epochs": run.epochs[:reached]}).overall_seconds()
