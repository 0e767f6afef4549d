"""What the rows of benchmarks/fast.py reach when they train: accuracy over seeds, and the seconds that it took."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from resnext_fast import get_fast_args_parser, suffix

from experiment import run_name
from harness.endings import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "resnext" / "resnext_fast.py"
GOAL = 94.0  # Percent of the test pictures; the seconds until there are stated.


def accuracy(row, epochs, args, whole=False):
    """What training by the Row for `epochs` reaches over the seeds, flat; with `whole`, also how long it took."""
    records = [train(row, epochs, seed, args.run_dir) for seed in args.seeds]
    found = {"epochs": epochs, "seeds": len(records)} | summarise(records, whole)
    words = (f"{key} {each if not isinstance(each, float) else round(each, 3)}" for key, each in found.items())
    print(f"{row.label}: {'  '.join(words)}", flush=True)
    return found


def train(row, epochs, seed, folder):
    """The record of resnext_fast.py with the flags of `row`, from `folder` when it is there already."""
    flags = [*row.flags, "--num_epoch", str(epochs), "--seed", str(seed)]
    folder = folder / f"{epochs}_epochs"
    code = subprocess.run([sys.executable, str(SCRIPT), *flags, "--output_dir", str(folder), "--resume"]).returncode
    if code:
        raise UserError(f"training the row {row.label!r} ended with exit code {code}; its own line says why")
    args = get_fast_args_parser().parse_args(flags)
    return json.loads((folder / f"{run_name(args, suffix(args))}.json").read_text(encoding="utf-8"))


def summarise(records, whole):
    accuracies = [record["epochs"][-1]["test_acc"] for record in records]
    found = {
        "test_acc_mean": statistics.mean(accuracies),
        "test_acc_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    }
    if not whole:
        return found
    return found | {
        "training_seconds": mean_or_none(seconds_until(None, record["epochs"]) for record in records),
        f"seconds_to_{GOAL:g}_percent": mean_or_none(seconds_until(GOAL, record["epochs"]) for record in records),
        "load_share_of_step": mean_or_none(load_share(record["epochs"][-1]["timing"]["phases"]) for record in records),
    }


def mean_or_none(values):
    """The mean of `values`; None when one of them is."""
    values = list(values)
    return None if None in values else statistics.mean(values)


def load_share(phases):
    """The median load time over the median step time of an epoch; None without a step after the warm-up."""
    load, step = ((phases[name]["device_ms"] or phases[name]["host_ms"])["median"] for name in ("data load", "step"))
    return load / step if step else None


def seconds_until(accuracy, epochs):
    """Training seconds until the end of the first epoch with that test accuracy, or of the last epoch for None.

    None when no epoch reaches it, and for a run resumed within an epoch, whose record has only the rest of that one.
    """
    if len({epoch["timing"]["steps"] for epoch in epochs}) > 1:
        return None
    seconds = 0.0
    for epoch in epochs:
        seconds += epoch["timing"]["seconds"]
        if accuracy is not None and epoch["test_acc"] >= accuracy:
            return seconds
    return seconds if accuracy is None else None
