"""Hand-made run records, and the tables that are made of them."""

import re
from pathlib import Path

from reporting import tables
from reporting.records import Record

PHASES = {"data load": 4.0, "forward": 30.0, "backward": 60.0, "optimizer": 6.0, "step": 100.0}
ARGUMENTS = {
    "num_worker": 2, "half_precision": None, "num_epoch": 3, "batch_size": 128, "lr": 0.01, "model": "resnext29_4x64d",
    "dataset": "cifar10", "data_dir": "data", "loader": "workers", "true_fp32": False, "seed": 0, "output_dir": "here",
    "resume": False, "max_steps": None, "processes": 1,
}  # fmt: skip


def make_timing(scale=1.0, device="cuda", seconds=40.0):
    phases = {}
    for name, ms in PHASES.items():
        times = {"median": ms * scale, "p95": 1.5 * ms * scale, "total": 390 * ms * scale}
        host = {key: value / 2 for key, value in times.items()} if device == "cuda" else times
        share = times["total"] / (1e3 * seconds * scale)
        device_ms = times if device == "cuda" else None
        phases[name] = {"count": 385, "share": share, "host_ms": host, "device_ms": device_ms}
    return {
        "seconds": seconds * scale, "steps": 390, "warmup_steps": 5, "unphased_seconds": 0.5 * scale, "phases": phases,
        "peak_memory": {"allocated_bytes": int(8e9), "reserved_bytes": int(9e9)} if device == "cuda" else None,
    }  # fmt: skip


def make_record(scale=1.0, device="cuda", precision="tf32", experiment="resnext", saved=2**30, acc=90.0, **arguments):
    """A record in which times are `scale` times those of PHASES, and 40 s an epoch (50 s the first)."""
    hardware = {"cuda": "NVIDIA A100", "cpu": "AMD EPYC, 2 cores"}[device]
    epochs = [
        {
            "epoch": epoch, "loss": 1 / epoch, "acc": acc - 5 + epoch, "test_acc": acc - 3 + epoch,
            "samples_per_second": 1000 / scale, "timing": make_timing(scale, device, 50.0 if epoch == 1 else 40.0),
        }
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    machine = {"device": device, "hardware": hardware, "threads": 2, "versions": {"torch": "2.13.0"}}
    machine |= {"commit": "0123456789ab", "date": "2026-01-01T00:00:00Z"}
    return {
        "format": 1, "experiment": experiment, "name": f"{experiment}_{precision}", "arguments": ARGUMENTS | arguments,
        "machine": machine, "precision": precision, "saved_activation_bytes": saved, "epochs": epochs,
    }  # fmt: skip


def make_run(*args, **changes):
    return Record(Path("record.json"), make_record(*args, **changes))


def read_table(markdown, number=0):
    """The `number`th table of a text as [{header: cell}, ...]."""
    blocks = re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[number].strip().split("\n")]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def rows_of(study, runs, **options):
    table = read_table(tables.render(study, runs, **options))
    return {row[study.arm_header]: row for row in table}
