"""From runs to Markdown: which runs may be compared, and how a comparison is presented."""

import dataclasses
import functools
import re
from collections.abc import Callable

from reporting import pace
from reporting.comparison import Sample, paired, quantity, ratio_interval
from reporting.published import SETUP
from reporting.records import machine_letter, provenance, warn

# Runs that differ only in these are the same experiment: they say where and how the process ran. A folder of images is
# identified by its name, as in Record.data, and device and threads by `hardware`.
NOT_SETTINGS = (
    "seed", "output_dir", "run_name", "resume", "restart", "log", "port", "gpuid", "evaluate",
    "data_dir", "device", "threads", "save_every", "dry_run",
)  # fmt: skip

NUMBER = re.compile(r"[+-]?[\d.]+( ± [\d.]+)?(, within the noise)?")
CPU_NOTE = (
    "The CPU was shared with other work: rely on the ratios only, and with caution; `benchmarks/` interleaves what it "
    "compares."
)
PUBLISHED_NOTE = f"Columns headed A100 are the original study's published figures ({SETUP}): not comparable with ours."
PACE_NOTE = "Times are those of shorter runs of the same set-ups, where there are any."
ONE_RUN_NOTE = "One run per row: the noise is unknown."


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant in a study: its label, its place among the rows, and the published figures for it."""

    label: str
    order: tuple
    is_baseline: bool = False
    published: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Column:
    """How a figure is shown: show(sample, baseline's sample) gives text or None.

    is_time: whether it is a time, which means nothing on another machine. timed: whether it is taken from the runs that
    `pace.timed` chooses.
    """

    header: str
    figure: Callable  # Record -> float or None
    show: Callable = lambda sample, base: quantity(sample)
    is_time: bool = False
    timed: bool = False


def percent(header, figure):
    return Column(header, figure, show=lambda sample, base: quantity(sample, places=1))


def time(header, figure, timed=False):
    return Column(header, figure, is_time=True, timed=timed)


@dataclasses.dataclass(frozen=True)
class Study:
    """A table: one row for each combination of the arguments `varies`, with the runs that differ only in their seeds.

    arm: Record -> Arm, or None for a run that does not belong in this table. varies: the arguments that distinguish its
    arms; runs are compared only if everything else is the same, including hardware and versions. same: as an
    alternative, the arguments that must be the same; arms may differ in all others. row_keys: further arguments that
    distinguish rows; each value has its own baseline. published: header -> key of Arm.published.
    """

    name: str
    title: str
    arm: Callable
    arm_header: str
    baseline: str  # The run that the others are compared with, as text.
    varies: tuple
    columns: tuple
    row_keys: tuple = ()
    same: tuple | None = None
    published: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
    """Runs of one arm. keys: the values of the study's row_keys; flags: its `varies` with their values, a dict."""

    arm: Arm
    keys: tuple
    flags: dict
    runs: list


@dataclasses.dataclass
class Group:
    """The rows of a study that belong in one table: runs with equal `settings`, a dict, on equal `machine`, a dict."""

    settings: dict
    machine: dict
    rows: list

    def baseline(self, row):
        """The Row that `row` is compared with: the first of several, preferably, for a technique, with its batch
        size."""
        found = [other for other in self.rows if other.arm.is_baseline and other.keys == row.keys]
        alike = [other for other in found if other.flags.get("batch_size") == row.flags.get("batch_size")]
        return next(iter(found if row.arm.is_baseline else alike or found), None)


def settings(run, without=()):
    """The settings of `run`, as a dict: its experiment and arguments, without those in NOT_SETTINGS or `without`, and
    without what is off, since records older than an option lack it."""
    left_out = {*NOT_SETTINGS, *without}
    everything = {"experiment": run.experiment} | run.arguments
    if "dataset" in everything:
        everything["dataset"] = run.data
    if everything.get("init"):  # Two weight files may have the same name.
        everything["init"] += f" ({(run.record.get('places') or {}).get('init')})"
    return {
        name: value
        for name, value in everything.items()
        if name not in left_out and value is not None and value is not False
    }


def hardware(run):
    """Where `run` ran, as a dict."""
    machine = run.machine
    place = {"hardware": machine.get("hardware"), "torch": (machine.get("versions") or {}).get("torch")}
    letter = machine_letter(run.path)
    place |= {"letter": letter} if letter else {}
    return place | ({"threads": machine.get("threads")} if run.on_cpu else {})


def groups(study, runs):
    """The Groups of `runs` that have something to compare: real data before digits, then the largest first."""
    found = {}
    for run in runs:
        arm = study.arm(run)
        if arm is None:
            continue
        everything = settings(run)
        varies = study.varies if study.same is None else sorted(everything.keys() - {*study.same, *study.row_keys})
        common = {name: value for name, value in everything.items() if name not in (*varies, *study.row_keys)}
        group = found.setdefault(_key(common, hardware(run)), Group(common, hardware(run), []))
        keys = tuple(everything.get(name) for name in study.row_keys)
        flags = {name: everything.get(name) for name in varies}
        row = next((row for row in group.rows if (row.flags, row.keys) == (flags, keys)), None)
        if row is None:
            group.rows.append(row := Row(arm, keys, flags, []))
        row.runs.append(run)
    kept = [
        group for group in found.values() if len(group.rows) > 1 and not all(row.arm.is_baseline for row in group.rows)
    ]
    for group in kept:
        for row in group.rows:
            row.runs = one_a_seed(row.runs)
        group.rows.sort(key=lambda row: (row.keys, not row.arm.is_baseline, row.arm.order))
        _tell_apart(group)
    return sorted(kept, key=lambda group: (is_toy(group), -len(group.rows), _key(group.settings, group.machine)))


# Other data sets keep their own names.
DATA = {"cifar10": "CIFAR-10", "digits": "handwritten digits", "samples": "SimCLS texts"}


def data_name(group):
    """The name of a Group's data in the headline and figures."""
    name = str(group.settings.get("dataset"))
    return DATA.get(name, name)


def is_toy(group):
    """Whether a Group uses scikit-learn's digits, which are for trying things out and show less than real images."""
    return group.settings.get("dataset") == "digits"


def one_a_seed(runs):
    """The latest of `runs`, all of one set-up, for each seed: repeating a seed shows nothing about how seeds differ."""
    latest = {}
    for run in sorted(runs, key=lambda run: run.machine.get("date") or ""):
        other = latest.get(run.arguments.get("seed"))
        if other and other.curve("loss") != run.curve("loss"):
            _tell_of_two(other.path, run.path)
        latest[run.arguments.get("seed")] = run
    return list(latest.values())


@functools.cache  # Once, whatever the number of tables.
def _tell_of_two(older, newer):
    warn(f"{older} and {newer} have the same settings and seed, but other results; only the later one counts")


def _tell_apart(group):
    """Add the differing flags to rows with the same label: on a CPU --true_fp32 changes nothing, and every half
    precision is bfloat16, but such runs do not repeat each other. The first baseline keeps its name. Rows whose
    baseline has another batch size show their own."""
    rows, labels = group.rows, []
    for row in rows:
        base, batch_size = group.baseline(row), row.flags.get("batch_size")
        if base is not None and base.flags.get("batch_size") != batch_size:
            row.arm = dataclasses.replace(row.arm, label=f"{row.arm.label}, batch {batch_size}")
    for row in rows:
        same = [other.flags for other in rows if (other.arm.label, other.keys) == (row.arm.label, row.keys)]
        differing = [name for name in row.flags if any(flags.get(name) != row.flags[name] for flags in same)]
        words = ", ".join(f"--{name} {row.flags[name]}" for name in differing)
        labels.append(f"{row.arm.label} ({words})" if words and row is not group.baseline(row) else row.arm.label)
    for row, label in zip(rows, labels, strict=True):
        row.arm = dataclasses.replace(row.arm, label=label)


def multiple(row, base, figure):
    """(multiple, low, high) of the mean of `figure`, a function of a Record, over a Row's runs, relative to that of the
    Row `base`; None if either is unknown, or that of `base` is 0."""
    new, old = (Sample.over(each.runs, figure) for each in (row, base))
    new, old = paired(new, old) if new and old else (None, None)
    return ratio_interval(new, old) if old and old.mean else None


def _key(*dicts):
    return tuple((name, str(each[name])) for each in dicts for name in sorted(each))


def render(study, runs, with_cpu_times=True):
    """The study's tables as Markdown; "" if no runs can be compared. with_cpu_times=False leaves out times measured on
    a CPU, and keeps the ratios."""
    found = groups(study, runs)
    parts = []
    for group in found:
        on_cpu = group.rows[0].runs[0].on_cpu
        rows = [_cells(study, group, row, found, with_cpu_times or not on_cpu) for row in group.rows]
        notes = [CPU_NOTE] * (on_cpu and with_cpu_times)  # docs/results.md says it once for all its tables.
        if any(pace.timed(group, row, found)[0] is not row for row in group.rows):
            notes.append(PACE_NOTE)
        if all(len(row.runs) < 2 for row in group.rows):
            notes.append(ONE_RUN_NOTE)
        notes += _without_baseline(study, group)
        if any(row.arm.published for row in group.rows):
            notes.append(PUBLISHED_NOTE)
        parts.append("\n\n".join([caption(group, found), markdown(rows), *([" ".join(notes)] if notes else [])]))
    return "\n\n".join(parts)


def _without_baseline(study, group):
    """A note that explains why some rows are compared with nothing."""
    alone = [row for row in group.rows if group.baseline(row) is None]
    if not alone:
        return []
    keys = ", ".join(dict.fromkeys(f"{_words(name).lower()} {key}" for row in alone
                                   for name, key in zip(study.row_keys, row.keys, strict=True)))  # fmt: skip
    return [f"No ×{f' at {keys}' if keys else ''}: no run of {study.baseline} has otherwise equal settings."]


def _cells(study, group, row, found, with_times):
    """One row of a table: header -> text, or None if not known."""
    baseline = group.baseline(row)
    label = f"{row.arm.label} (baseline)" if row is baseline else row.arm.label
    cells = dict(zip(map(_words, study.row_keys), map(str, row.keys), strict=True))
    cells |= {study.arm_header: label, "n": str(len(row.runs))}
    timed = pace.timed(group, row, found)
    for column in study.columns:
        if column.is_time and not with_times:
            continue
        measured = timed if column.timed else (row, baseline)
        sample, base = (Sample.over(each.runs, column.figure) if each else None for each in measured)
        cells[column.header] = column.show(sample, sample if row is baseline else base)
    for header, key in study.published.items():
        figure = row.arm.published.get(key)
        cells[header] = None if figure is None else str(figure)
    return cells


def caption(group, all_groups):
    """What all rows of a group share, without unremarkable settings that are the same in all groups."""
    common = group.settings
    phrases = {"model": "{}", "dataset": "{}", "batch_size": "batch {}"}
    words = [phrase.format(common[name]) for name, phrase in phrases.items() if name in common]
    words += [length(common)] if length(common) else []
    for name in sorted(set(common) - {*phrases, "num_epoch", "max_steps"}):
        if len({str(other.settings.get(name)) for other in all_groups}) > 1:
            words.append(f"{_words(name).lower()} {common[name]}")
    records = [run.record for row in group.rows for run in row.runs]
    made = provenance(records)
    return f"{', '.join(words)}; {place(group.machine)}{'; ' * bool(made)}{made}:"


def length(settings):
    """ "15 epochs", or "30 steps" where --max_steps ended the runs first; None if the `settings` do not tell."""
    for name, unit in (("max_steps", "step"), ("num_epoch", "epoch")):
        if settings.get(name):
            return f"{settings[name]} {unit}{'' if settings[name] == 1 else 's'}"
    return None


def place(machine):
    """ "AMD EPYC, 2 cores, 1 thread, torch 2.13.0" for a result of `hardware`."""
    words = [machine["hardware"] or "unknown hardware"]
    if "letter" in machine:
        words.append(f"machine {machine['letter']}")
    if machine.get("threads"):
        words.append(f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}")
    return ", ".join(words + [f"torch {machine['torch']}"] * bool(machine["torch"]))


def _words(name):
    return name.replace("_", " ").capitalize()


def markdown(rows):
    """A Markdown table from dicts, header -> text or None. Columns without any text are left out. Special characters in
    names of runs and classes are escaped, so that they do not end a cell or line, or become HTML."""
    headers = dict.fromkeys(header for row in rows for header in row)
    columns = {header: [row.get(header) for row in rows] for header in headers}
    columns = {header: column for header, column in columns.items() if any(column)}
    rules = ["---:" if all(map(_is_number, column)) else "---" for column in columns.values()]
    lines = [columns, rules, *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(map(_escaped, cells))} |" for cells in lines)


def _escaped(cell):
    return " ".join((cell or "–").split()).replace("|", "\\|").replace("<", "&lt;")


def _is_number(text):
    return text is None or NUMBER.fullmatch(text)
