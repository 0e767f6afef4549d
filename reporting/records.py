"""Reading the records that runs leave, and the figures of one run."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np

from harness.endings import UserError
from harness.runs import FORMAT

NO_RECORD = re.compile(r"\d+\.json|\w+\.settings\.json")  # Samples and candidates of SimCLS.
RECORD_START = re.compile(rb'\s*\{\s*"format"\s*:')
EVALUATION = "simcls_evaluation"
# The experiments, and the arguments without which a record of theirs says too little to be compared.
OF_IMAGES = ("model", "dataset", "batch_size", "num_worker", "half_precision")
ARGUMENTS = {
    "resnext": OF_IMAGES,
    "resnext_checkpoint": (*OF_IMAGES, "policy"),
    "resnext_fast": OF_IMAGES,
    "simcls": ("batch_size", "num_workers", "half_precision", "use_checkpoint"),
    EVALUATION: (),
}
OF_EPOCH = {"epoch", "timing"}
OF_TIMING = {"seconds", "steps", "warmup_steps", "unphased_seconds", "phases"}
OF_PHASE = {"count", "share", "host_ms", "device_ms"}
OF_INTERVAL = {"mean", "low", "high"}


def warn(line):
    print(f"report.py: {line}", file=sys.stderr)


def read_folders(folders):
    """(runs, evaluations) under `folders` and all folders in them: lists of Run and of dicts, in order of path.

    A file that is cut short, or is no record of ours, is named on stderr and left out. The same record found twice (a
    copy) counts once. UserError when a folder is not there.
    """
    runs, evaluations, seen = [], [], set()
    for path in sorted({path for folder in folders for path in _json_files(Path(folder))}):
        record = _read(path)
        if record is None:
            continue
        text = json.dumps(record, sort_keys=True)
        if text in seen:
            continue
        seen.add(text)
        if record["experiment"] == EVALUATION:
            evaluations.append(record | {"path": str(path)})
        else:
            runs.append(Run(path, record))
    return runs, evaluations


def _json_files(folder):
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name one that holds run records, as bash run.sh makes them")
    return [path for path in folder.rglob("*.json") if not NO_RECORD.fullmatch(path.name)]


def _read(path):
    """The record at `path`, or None after saying what is wrong with it."""
    try:
        content = path.read_bytes()
        if content and not RECORD_START.match(content) and (path.parent / "config.json").exists():
            return None  # A model's folder: these files describe it, and are whole.
        record = json.loads(content)
    except OSError as error:
        return warn(f"skipped {path}: {error.strerror}")
    except ValueError:
        return warn(f"skipped {path}: not whole JSON; run its script again, or delete it")
    fault = _fault(record)
    return record if fault is None else warn(f"skipped {path}: {fault}")


def _fault(record):
    """What keeps `record` from being one of ours, or None."""
    if not isinstance(record, dict) or "experiment" not in record:
        return "no record of a run"
    if record["experiment"] not in ARGUMENTS:
        return f"a record of the unknown experiment {record['experiment']!r}"
    if record.get("format") != FORMAT:
        return f"a record of format {record.get('format')!r}; this program reads {FORMAT}"
    parts = {"arguments": dict, "machine": dict}
    parts |= {"systems": dict} if record["experiment"] == EVALUATION else {"epochs": list}
    for name, kind in parts.items():
        if not isinstance(record.get(name), kind):
            return f"a record without {name}"
    for name in ARGUMENTS[record["experiment"]]:
        if name not in record["arguments"]:
            return f"a record without the argument {name}"
    if not all(map(_is_epoch, record.get("epochs", ()))):
        return "a record with an epoch that has no whole timing"
    if not all(_holds(system, OF_INTERVAL) for system in record.get("systems", {}).values()):
        return "a record with a system that lacks its ROUGE"
    return None


def _is_epoch(epoch):
    return _has(epoch, OF_EPOCH) and _has(epoch["timing"], OF_TIMING) and _holds(epoch["timing"]["phases"], OF_PHASE)


def _has(value, names):
    """Whether `value` is a dict with these names."""
    return isinstance(value, dict) and names <= value.keys()


def _holds(value, names):
    """Whether `value` is a dict whose values are dicts with these names."""
    return isinstance(value, dict) and all(_has(each, names) for each in value.values())


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. Its figures are None where they were not taken."""

    path: Path
    record: dict

    @property
    def experiment(self):
        return self.record["experiment"]

    @property
    def name(self):
        return self.record.get("name", self.path.stem)

    @property
    def arguments(self):
        return self.record["arguments"]

    @property
    def machine(self):
        return self.record["machine"]

    @property
    def precision(self):
        return self.record.get("precision")

    @property
    def epochs(self):
        return self.record["epochs"]

    @property
    def on_cpu(self):
        return self.machine.get("device") == "cpu"

    def timing(self):
        """The phases over all epochs, as PhaseTimer.end_epoch gives those of one; None without an epoch."""
        return combine([epoch["timing"] for epoch in self.epochs])

    def phase_ms(self, name):
        """Median milliseconds of the phase `name`: on the device where that was measured, else on the host."""
        timing = self.timing()
        phase = timing and timing["phases"].get(name)
        return phase and (phase["device_ms"] or phase["host_ms"])["median"]

    def load_ms(self):
        return self.phase_ms("data load")

    def step_ms(self):
        return self.phase_ms("step")

    def optimizer_ms(self):
        return self.phase_ms("optimizer")

    def load_percent(self):
        """The load's median in percent of the step's."""
        return 100 * self.load_ms() / self.step_ms() if self.load_ms() is not None and self.step_ms() else None

    def _whole_epochs(self):
        """The timings of the epochs that ran from their first step to their last: not resumed in, not cut off."""
        ended = [epoch["timing"] for epoch in self.epochs if epoch.get("loss") is not None]
        longest = max((timing["steps"] for timing in ended), default=0)
        return [timing for timing in ended if timing["steps"] == longest]

    def epoch_seconds(self):
        """Median time of an epoch's training steps, without the first epoch where there are more."""
        seconds = [timing["seconds"] for timing in self._whole_epochs()]
        return float(np.median(seconds[1:] or seconds)) if seconds else None

    def overall_seconds(self):
        """Time of all epochs' training steps; None for a run that was cut off or resumed."""
        whole = self._whole_epochs()
        return sum(timing["seconds"] for timing in whole) if whole and len(whole) == len(self.epochs) else None

    def samples_per_second(self):
        values = [epoch["samples_per_second"] for epoch in self.epochs if epoch.get("samples_per_second")]
        return float(np.median(values[1:] or values)) if values else None

    def saved_mib(self):
        """MiB that autograd keeps from forward for backward."""
        saved = self.record.get("saved_activation_bytes")
        return None if saved is None else saved / 2**20

    def _peak(self, name):
        def peaks(epochs):
            found = [epoch["timing"].get("peak_memory") or epoch.get("peak_memory") for epoch in epochs]
            return [peak[name] for peak in found if peak]

        # In a process' first epoch cuDNN may try algorithms that need more memory than the one it takes.
        warm = [epoch for epoch in self.epochs if not epoch["timing"].get("warmup_steps")]
        return max(peaks(warm) or peaks(self.epochs), default=None)

    def allocated_gb(self):
        """Highest GPU memory in tensors, in 1e9 bytes."""
        peak = self._peak("allocated_bytes")
        return None if peak is None else peak / 1e9

    def reserved_gb(self):
        """Highest GPU memory that PyTorch took, in 1e9 bytes."""
        peak = self._peak("reserved_bytes")
        return None if peak is None else peak / 1e9

    def activation_percent(self):
        """The saved activations in percent of the highest allocated GPU memory."""
        if self.saved_mib() is None or self.allocated_gb() is None:
            return None
        return 100 * self.saved_mib() * 2**20 / (self.allocated_gb() * 1e9)

    def curve(self, key):
        """The values of `key` ("loss", "acc", "test_acc", ...) by epoch, without the epochs that lack it."""
        return [epoch[key] for epoch in self.epochs if epoch.get(key) is not None]

    def last(self, key):
        curve = self.curve(key)
        return curve[-1] if curve else None

    def last_loss(self):
        return self.last("loss")

    def losses(self):
        """[[update, loss], ...] of a SimCLS run, in order; of an image run [[epoch, loss], ...]."""
        within = [point for epoch in self.epochs for point in epoch.get("losses", ())]
        return within or [[epoch["epoch"], epoch["loss"]] for epoch in self.epochs if epoch.get("loss") is not None]


def combine(timings):
    """The timings of several epochs as one, in the same form; None when there are none.

    Seconds, steps, counts and totals add up. Medians and 95th percentiles are the median over the epochs, each
    counted as often as it has samples.
    """
    if not timings:
        return None
    seconds = sum(timing["seconds"] for timing in timings)
    phases = {}
    for name in dict.fromkeys(name for timing in timings for name in timing["phases"]):
        parts = [timing["phases"][name] for timing in timings if name in timing["phases"]]
        counts = [part["count"] for part in parts]
        host_ms = _combine_times([part["host_ms"] for part in parts], counts)
        device_ms = None
        if all(part["device_ms"] for part in parts):
            device_ms = _combine_times([part["device_ms"] for part in parts], counts)
        share = (device_ms or host_ms)["total"] / (1e3 * seconds)
        phases[name] = {"count": sum(counts), "share": share, "host_ms": host_ms, "device_ms": device_ms}
    return {
        "seconds": seconds,
        "steps": sum(timing["steps"] for timing in timings),
        "warmup_steps": sum(timing["warmup_steps"] for timing in timings),
        "unphased_seconds": sum(timing["unphased_seconds"] for timing in timings),
        "phases": phases,
    }


def _combine_times(times, counts):
    counted = [(time, count) for time, count in zip(times, counts, strict=True) if count]
    weights = [count for _, count in counted]
    middle = {
        key: float(np.median(np.repeat([time[key] for time, _ in counted], weights))) if counted else None
        for key in ("median", "p95")
    }
    return middle | {"total": sum(time["total"] for time in times)}
