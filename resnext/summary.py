#!/usr/bin/env python3
"""Print one Markdown table of the ResNeXt records in a folder: times by phase, memory, and what they did to accuracy.

The first row is the baseline: 2 workers, single precision, no checkpointing; ratios are to it. Times are medians over
steps after the warm-up (host times on a CPU, device times on CUDA); an epoch's is the median over epochs.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import command_line
from harness.command_line import OneLineParser, UserError

COLUMNS = (
    "run",
    "precision",
    "load ms",
    "step ms",
    "epoch s",
    "x epoch",
    "memory MiB",
    "x memory",
    "epochs",
    "test acc %",
)


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("model_history"))
    print(table(read_records(parser.parse_args().folder)))


def read_records(folder):
    """The finished records in `folder`, the baseline first. Files that are no records are named on stderr."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if "test_acc" in record["epochs"][-1]:  # Else --max_steps stopped it, for a profile.
                records.append(describe(record))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, statistics.StatisticsError):
            print(f"{path} is no whole record; skipped", file=sys.stderr)
    if not records:
        raise UserError(f"there are no records of finished runs in {folder}; run bash run.sh first")
    return sorted(records, key=lambda record: (record["rank"], record["run"]))


def describe(record):
    """The figures of a record's row. Memory is the peak allocated on CUDA, else what is saved for backward."""
    arguments = record["arguments"]
    # An epoch in which the run was stopped and resumed has the timings of its last steps alone.
    whole = max(epoch["timing"]["steps"] for epoch in record["epochs"])
    epochs = [epoch for epoch in record["epochs"] if epoch["timing"]["steps"] == whole]
    loading = "device" if arguments["loader"] == "device" else f"{arguments['num_worker']} workers"
    changes = [loading, f"batch {arguments['batch_size']}"]
    if "policy" in record:
        changes.append(f"checkpointing ({record['policy']})")
    peaks = [epoch["peak_memory"]["allocated_bytes"] for epoch in epochs if epoch["peak_memory"]]
    baseline = loading == "2 workers" and record["precision"] in ("fp32", "tf32") and "policy" not in record
    return {
        "rank": (not baseline, "policy" in record, record["precision"] in ("fp16", "bf16")),
        "run": ", ".join(changes),
        "precision": record["precision"],
        "load ms": median_of_phase(epochs, "data load", device=False),
        "step ms": median_of_phase(epochs, "step"),
        "epoch s": statistics.median(epoch["timing"]["seconds"] for epoch in epochs),
        "memory MiB": (max(peaks) if peaks else record["saved_activation_bytes"]) / 2**20,
        "epochs": str(len(record["epochs"])),
        "test acc %": record["epochs"][-1]["test_acc"],
    }


def median_of_phase(epochs, name, device=True):
    """The median over epochs of the phase's median in ms; of the device's time where there is one and it is wanted."""
    phases = [epoch["timing"]["phases"][name] for epoch in epochs]
    medians = [((device and phase["device_ms"]) or phase["host_ms"])["median"] for phase in phases]
    return statistics.median(value for value in medians if value is not None)


def table(records):
    """Markdown, a row a record; ratios are to the first."""
    first = records[0]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for record in records:
        record["x epoch"] = record["epoch s"] / first["epoch s"]
        record["x memory"] = record["memory MiB"] / first["memory MiB"]
        cells = [record[name] if isinstance(record[name], str) else f"{record[name]:.2f}" for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
