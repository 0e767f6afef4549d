"""Reads the records of runs, and computes the figures of a single run."""

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from harness import shapes
from harness.endings import UserError
from harness.epoch_times import phase_times, training_seconds
from harness.files import RECORD_FORMAT
from harness.machine import UNKNOWN
from harness.shapes import ANY, COUNT, NUMBER, PAIR, PERCENT, POSITIVE, TEXT, WHOLE, each, maybe, or_null

# Candidates of SimCLS, and what resnext/evaluate.py writes.
NO_RECORD = re.compile(r"\w+\.settings\.json|provenance\.json|.+\.evaluation\.json")
SAMPLE = re.compile(r"\d+\.json")  # Or a run that somebody named like a sample.
# JSON's escape of a byte in a file name that is not UTF-8, which no font can draw.
NO_LETTER = re.compile(rb"(?<!\\ud[89ab][0-9a-f]{2})\\ud[c-f][0-9a-f]{2}", re.IGNORECASE)
EVALUATION = "simcls_evaluation"
# The experiments, and the arguments that their records need in order to be compared.
OF_IMAGES = {
    "model": TEXT, "dataset": TEXT, "batch_size": WHOLE, "num_worker": COUNT, "half_precision": or_null(ANY),
    "loader": maybe(TEXT), "data_dir": maybe(TEXT), "init": maybe(TEXT),
}  # fmt: skip
OF_ALL = {"seed": maybe(COUNT), "max_steps": maybe(COUNT), "num_epoch": maybe(COUNT), "batch_size": maybe(WHOLE)}
ARGUMENTS = {
    "resnext": OF_IMAGES,
    "resnext_checkpoint": OF_IMAGES | {"policy": TEXT, "memory_budget": maybe(NUMBER)},
    "resnext_fast": OF_IMAGES | {"policy": maybe(TEXT), "memory_budget": maybe(NUMBER)},
    "simcls": {
        "batch_size": WHOLE,
        "num_workers": COUNT,
        "half_precision": or_null(ANY),
        "use_checkpoint": ANY,
        "dataset": maybe(TEXT),
        "model_type": maybe(TEXT),
    },
    EVALUATION: {},
}
MACHINE = {
    "hardware": maybe(TEXT), "device": maybe(TEXT), "threads": maybe(COUNT), "versions": maybe(each(dict, TEXT)),
    "date": maybe(TEXT), "commit": maybe(TEXT), "command": maybe(TEXT),
}  # fmt: skip
TIMES = {"median": or_null(NUMBER), "p95": or_null(NUMBER), "total": NUMBER}
PEAK = maybe({"allocated_bytes": NUMBER, "reserved_bytes": NUMBER})
PHASE = {"count": COUNT, "share": NUMBER, "host_ms": TIMES, "device_ms": or_null(TIMES)}
TIMING = {
    "seconds": POSITIVE, "steps": COUNT, "warmup_steps": COUNT, "unphased_seconds": NUMBER, "peak_memory": PEAK,
    "phases": each(dict, PHASE),
}  # fmt: skip
OF_EPOCH = (
    "loss", "acc", "test_acc", "samples_per_second", "val_rouge1", "val_rouge2", "val_rougeL", "elapsed_seconds",
)  # fmt: skip
EPOCH = {"epoch": COUNT, "timing": TIMING, "peak_memory": PEAK, "losses": maybe(each(list, PAIR))}
EPOCH |= dict.fromkeys(OF_EPOCH, maybe(NUMBER)) | dict.fromkeys(("acc", "test_acc"), maybe(PERCENT))
RECORD = {
    "name": maybe(TEXT), "data": maybe({"train_pictures": maybe(WHOLE), "digest": maybe(TEXT)}),
    "machine": MACHINE, "precision": maybe(TEXT), "loading": maybe(TEXT), "places": maybe(each(dict, TEXT)),
    "earlier_commits": maybe(each(list, TEXT)), "epochs_elsewhere": maybe(COUNT),
    "saved_activation_bytes": maybe(NUMBER), "start_up_seconds": maybe(NUMBER),
    "measured": maybe({"peak_bytes": maybe(NUMBER)}), "plan": maybe({"plain_peak_bytes": maybe(NUMBER)}),
}  # fmt: skip
OF_RUN = {"epochs": each(list, EPOCH)}
OF_EVALUATION = {
    "systems": each(dict, each(dict, {"mean": NUMBER, "low": NUMBER, "high": NUMBER})),
    "p_values": maybe(each(dict, each(dict, NUMBER))),
    "p_values_alone": maybe(each(dict, each(dict, NUMBER))),
    "words": maybe(each(dict, NUMBER)),
    "strongest": maybe(TEXT),
    "rouge": maybe(TEXT),
    "warnings": maybe(each(list, TEXT)),
}


def warn(line):
    print(f"report.py: {line}", file=sys.stderr)


def skip(path, fault):
    warn(f"skipped {path}: {fault}")


def read_folders(folders, published=False, tell=skip):
    """(runs, evaluations) in `folders` and all their subfolders: lists of Record and of dicts, in order of path.

    A file that is truncated or not one of our records is left out, after `tell(path, fault)`; with `published`, so is
    one without a clean commit. Copies of a record count once. UserError if a folder does not exist.
    """
    runs, evaluations, seen = [], [], set()
    for path in sorted({path for folder in folders for path in _json_files(Path(folder))}):
        record = _read(path, tell)
        if record is None or (published and refused(path, record)):
            continue
        text = json.dumps(record, sort_keys=True)
        if text in seen:
            continue
        seen.add(text)
        if record["experiment"] == EVALUATION:
            evaluations.append(record | {"path": str(path)})
        else:
            runs.append(Record(path, record))
    return _with_data_told_apart(runs), evaluations


def _with_data_told_apart(runs):
    """The Records; if data of the same name contain different images, the name includes their digest."""
    images = defaultdict(set)
    for run in runs:
        images[run.data].add(run.images)
    return [dataclasses.replace(run, names_images=len(images[run.data] - {None}) > 1) for run in runs]


def refused(path, record):
    """Whether `record` may not be published, since nobody can get the code that made it; stderr names it."""
    commits = [*record.get("earlier_commits", ()), record["machine"].get("commit") or UNKNOWN]
    commit = next((commit for commit in commits if commit == UNKNOWN or commit.endswith("-dirty")), None)
    if commit is None:
        return False
    made = f"from uncommitted changes (on commit {commit[:7]})" if commit != UNKNOWN else "without a commit"
    warn(f"refused {path}: made {made}; commit, then run it again")
    return True


def provenance(records):
    """ "commit 1f098ca, 2026-11-23": what made `records`, dicts, and when; "" if they do not say."""
    machines = [record["machine"] for record in records]
    commits = [(*record.get("earlier_commits", ()), record["machine"].get("commit")) for record in records]
    commits = list(dict.fromkeys(commit[:7] for commit in itertools.chain(*commits) if commit))
    dates = sorted({machine["date"][:10] for machine in machines if machine.get("date")})
    words = [f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"] if commits else []
    return ", ".join(words + ([" to ".join(dict.fromkeys([dates[0], dates[-1]]))] if dates else []))


def machine_letter(path):
    """ "b" of a record in benchmarks/results/<hardware>_b: what tells machines of one kind apart; None elsewhere."""
    match = re.search(r"/benchmarks/results/[^/_]*_([^/]+)/", Path(path).absolute().as_posix())
    return match and match[1]


def _json_files(folder):
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; choose one with run records, which bash run.sh makes")
    found, seen = [], set()
    walk = os.walk(folder, followlinks=True, onerror=lambda error: skip(error.filename, error.strerror))
    for place, folders, names in walk:
        real = os.path.realpath(place)
        if real in seen:  # Reached through a link, perhaps to a parent folder.
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if name.endswith(".json") and not NO_RECORD.fullmatch(name)]
    return [path for path in found if path.is_file()]


def _read(path, tell):
    """The record at `path`, or None after telling what is wrong with it."""
    try:
        text = path.read_bytes()
        if SAMPLE.fullmatch(path.name) and b'"experiment":' not in text:
            return None
        record = json.loads(NO_LETTER.sub(rb"\\ufffd", text))
    except OSError as error:
        return tell(path, error.strerror)
    except (ValueError, RecursionError):
        return tell(path, "not valid JSON; run its script again, or delete it")
    is_ours = isinstance(record, dict) and "experiment" in record
    described = not is_ours or record["experiment"] == "brio"
    if described and (path.parent / "config.json").exists():
        return None  # Files that describe a model. Evaluations show what a generator of brio.py is worth.
    fault = _fault(record) if is_ours else "not a record of a run"
    return record if fault is None else tell(path, fault)


def _fault(record):
    """Why `record`, a dict, is not one of ours, or None."""
    experiment = record["experiment"]
    if not isinstance(experiment, str) or experiment not in ARGUMENTS:
        return f"a record of the unknown experiment {experiment!r}"
    if record.get("format") != RECORD_FORMAT:
        return f"a record of format {record.get('format')!r}; this program reads {RECORD_FORMAT}"
    content = OF_EVALUATION if experiment == EVALUATION else OF_RUN
    found = shapes.fault(record, RECORD | content | {"arguments": OF_ALL | ARGUMENTS[experiment]})
    return found and f"a record in which {found}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One training run. Figures that were not measured are None."""

    path: Path
    record: dict
    names_images: bool = False

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
    def data(self):
        """The name of the data; for a folder, the folder's own name."""
        is_folder = self.arguments.get("dataset") == "folder" and self.arguments.get("data_dir")
        name = Path(self.arguments["data_dir"]).name if is_folder else self.arguments.get("dataset")
        return f"{name} ({self.images})" if self.names_images else name

    @property
    def images(self):
        """The first characters of the digest of the images, or None."""
        return ((self.record.get("data") or {}).get("digest") or "")[:8] or None

    @property
    def precision(self):
        return self.record.get("precision")

    @property
    def epochs(self):
        return self.record["epochs"]

    @property
    def timed_epochs(self):
        """The epochs whose times are this set-up's own: a resumed run may have taken over the first ones from a run
        with other workers, or from another machine."""
        return self.epochs[self.record.get("epochs_elsewhere", 0) :]

    @property
    def on_cpu(self):
        return self.machine.get("device") == "cpu"

    def timing(self):
        """The phases over all epochs, in the form of PhaseTimer.end_epoch; None without an epoch."""
        return combine([epoch["timing"] for epoch in self.timed_epochs])

    def phase_ms(self, name):
        """Median milliseconds of the phase `name`, on the device if timed there, else on the host."""
        timing = self.timing()
        phase = timing and self._phase(timing, name)
        return phase and phase["median"]

    @staticmethod
    def _phase(timing, name):
        phase = timing["phases"].get(name)
        return phase and phase_times(phase)

    load_ms = functools.partialmethod(phase_ms, "data load")
    step_ms = functools.partialmethod(phase_ms, "step")
    optimizer_ms = functools.partialmethod(phase_ms, "optimizer")

    def load_percent(self):
        """Loading time in percent of the steps' time. From totals: workers deliver in bursts, which a median does not
        show."""
        timing = self.timing()
        load, step, validation = (timing and self._phase(timing, name) for name in ("data load", "step", "validation"))
        total = step and step["total"] - (validation["total"] if validation else 0.0)
        return 100 * load["total"] / total if load and total else None

    def _whole_epochs(self):
        """The timings of complete epochs: neither resumed within nor cut short."""
        ended = [epoch["timing"] for epoch in self.timed_epochs if epoch.get("loss") is not None]
        whole = max((timing["steps"] for timing in ended), default=0)
        if pictures := (self.record.get("data") or {}).get("train_pictures"):
            whole = -(-pictures // self.arguments["batch_size"])  # A single resumed epoch has no other to compare with.
        return [timing for timing in ended if timing["steps"] == whole]

    def epoch_seconds(self):
        """Median time of an epoch's training steps, without the first epoch if there are more."""
        seconds = [training_seconds(timing) for timing in self._whole_epochs()]
        return float(np.median(seconds[1:] or seconds)) if seconds else None

    def overall_seconds(self):
        """Time of all epochs' training steps; None for a run that was cut short or resumed."""
        whole = self._whole_epochs()
        return sum(map(training_seconds, whole)) if whole and len(whole) == len(self.epochs) else None

    def samples_per_second(self):
        values = [epoch["samples_per_second"] for epoch in self.timed_epochs if epoch.get("samples_per_second")]
        return float(np.median(values[1:] or values)) if values else None

    def saved_mib(self):
        """MiB that autograd keeps from forward for backward."""
        saved = self.record.get("saved_activation_bytes")
        return None if saved is None else saved / 2**20

    def peak_share(self):
        """For a run with a plan, the measured peak of activations and their gradients over the peak without
        recomputation."""
        peak, plain = ((self.record.get(part) or {}).get(name) for part, name in
                       (("measured", "peak_bytes"), ("plan", "plain_peak_bytes")))  # fmt: skip
        return peak / plain if peak and plain else None

    def _peak_gb(self, name):
        """The highest GPU memory of this kind, in 1e9 bytes."""

        def peaks(epochs):
            found = [epoch["timing"].get("peak_memory") or epoch.get("peak_memory") for epoch in epochs]
            return [peak[name] for peak in found if peak]

        # In a process's first epoch cuDNN may try algorithms that need more memory than the one it selects.
        warm = [epoch for epoch in self.timed_epochs if not epoch["timing"].get("warmup_steps")]
        peak = max(peaks(warm) or peaks(self.timed_epochs), default=None)
        return None if peak is None else peak / 1e9

    allocated_gb = functools.partialmethod(_peak_gb, "allocated_bytes")  # In tensors.
    reserved_gb = functools.partialmethod(_peak_gb, "reserved_bytes")  # Taken by PyTorch.

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

    last_loss = functools.partialmethod(last, "loss")

    def accuracy_by_seconds(self):
        """[(seconds since the run's start, test accuracy in percent), ...], one per epoch; [] if any is unknown."""
        points = [(epoch.get("elapsed_seconds"), epoch.get("test_acc")) for epoch in self.epochs]
        own = len(self.timed_epochs) == len(self.epochs)
        return points if own and not any(None in point for point in points) else []

    def losses(self):
        """[[update, loss], ...] of a SimCLS run, in order."""
        return [point for epoch in self.epochs for point in epoch.get("losses") or ()]


def combine(timings):
    """The timings of several epochs as one, in the same form; None if there are none.

    Seconds, steps, counts and totals are summed. Medians and 95th percentiles are medians over the epochs, weighted by
    the number of samples.
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
    middle = {}
    for key in ("median", "p95"):
        known = [(time[key], count) for time, count in zip(times, counts, strict=True) if time[key] is not None]
        middle[key] = _weighted_median(known)
    return middle | {"total": sum(time["total"] for time in times)}


def _weighted_median(pairs):
    """The median of [(value, weight), ...], where each value counts `weight` times; None for an empty list."""
    values, times = np.array(sorted(pairs), dtype=float).reshape(-1, 2).T
    total = times.sum()
    if not total:
        return None
    reached = times.cumsum()
    low, high = (values[np.searchsorted(reached, place, side="right")] for place in ((total - 1) // 2, total // 2))
    return float((low + high) / 2)
