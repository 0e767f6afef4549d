"""The effect of each technique, one per row: the table, the sentences and the figure at the top of the README."""

import dataclasses

from harness.machine import AMX, BFLOAT16, VECTOR_INSTRUCTIONS
from reporting import pace, published
from reporting.comparison import Sample, difference_interval, interval_text, paired, signed
from reporting.records import Record, provenance
from reporting.studies import SIMCLS, STUDIES, test_accuracy, validation_rouge
from reporting.tables import data_name, groups, is_toy, length, markdown, multiple, place

CHECKPOINT = "`resnext_checkpoint.py"  # Flags and the closing quote follow.
MULTIPLIES_HALF = "on CPUs with bfloat16 instructions, and on GPUs (published)"
HALF, SIMCLS_HALF = "Half precision: `--half_precision`", "SimCLS, half precision: `main.py --half_precision`"
# Study, and an arm's label or its first words -> the technique, how to switch it on, and when it pays. In the order of
# the table: the most effective first.
TECHNIQUES = {
    ("together", "everything on"): (
        "Everything on, with a new recipe (Muon, one-cycle learning rate): `resnext_fast.py`",
        "to train well and fast",
    ),
    ("together", "everything on, with SGD"): (
        "Everything on, with SGD instead of Muon: `resnext_fast.py --optimizer sgd`",
        "if you prefer a common optimizer",
    ),
    ("together", "freed memory kept"): (
        "Keeping freed memory in the process: `--keep_memory`",
        "on a CPU; the process needs somewhat more memory",
    ),
    ("mixed-precision", "fp16"): (HALF, MULTIPLIES_HALF),
    ("mixed-precision", "bf16"): (HALF, MULTIPLIES_HALF),
    ("checkpointing", "chain"): (
        f"Recomputing everything but convolutions: {CHECKPOINT}`",
        "to save up to half of the memory",
    ),
    ("checkpointing", "block"): (f"Recomputing whole blocks: {CHECKPOINT} --policy block`", "to save more memory"),
    ("checkpointing", "nested"): (
        f"Recomputing whole stages, as in the original study: {CHECKPOINT} --policy nested`",
        "never: the other policies cost less",
    ),
    ("checkpointing", "budget"): (
        f"Recomputing within a budget for the peak: {CHECKPOINT} --memory_budget`",
        "when you know how much memory you have",
    ),
    ("checkpointing", "held"): (
        f"Recomputing within a budget for what is held: {CHECKPOINT} --budget_of held --memory_budget`",
        "to compare with other planners",
    ),
    ("data-loader", "0 workers"): (
        "Loading without worker processes: `--num_workers 0`",
        "to debug; otherwise use workers",
    ),
    ("data-loader", "device"): (
        "Images stored and augmented on the training device: `--loader device`",
        "when the images fit there and steps are short",
    ),
    ("simcls", "4 workers, recomputation"): (
        "SimCLS, recomputing the encoder's layers: `main.py --use_checkpoint`",
        "when long documents do not fit in memory",
    ),
    ("simcls", "4 workers, fp16"): (SIMCLS_HALF, MULTIPLIES_HALF),
    ("simcls", "4 workers, bf16"): (SIMCLS_HALF, MULTIPLIES_HALF),
}
SHORT = {  # By `Effect.in_turn`.
    True: "shorter, interleaved runs",
    False: "shorter runs, hours apart from those of the baseline",
    None: "shorter runs",
}
FEW_UPDATES, SAME, UNKNOWN = 100, "none: identical numbers", "not known"
PAGES = (*(study.name for study in STUDIES), "freed-memory")
PUBLISHED = {  # Study -> the original study's figures, and which of them is its baseline.
    "data-loader": (published.DATA_LOADER, "2 workers"),
    "mixed-precision": (published.MIXED_PRECISION, "single"),
    "checkpointing": (published.CHECKPOINTING, "none"),
}


@dataclasses.dataclass(frozen=True)
class Effect:
    """The effect of one technique compared with its baseline. time, memory: (ratio, low, high), or None if not
    known."""

    kind: tuple  # The key in TECHNIQUES.
    label: str
    technique: str
    when: str
    time: tuple | None
    memory: tuple | None
    result: str
    n: int
    group: object
    row: object
    timed: object  # The Row whose times are used: `row`, or that of short runs.
    in_turn: bool | None  # As of `pace.in_turn` for `timed`.
    published: str | None

    @property
    def name(self):
        """The technique without the share of a budget."""
        return TECHNIQUES[self.kind][0]

    @property
    def study(self):
        return self.kind[0]

    @property
    def page(self):
        return "freed-memory" if self.label == "freed memory kept" else self.study

    @property
    def hardware(self):
        return self.group.machine["hardware"] or "unknown hardware"

    @property
    def where(self):
        settings = self.group.settings
        words = ", ".join(filter(None, [settings.get("model"), data_name(self.group), length(settings)]))
        short = f" (times: {SHORT[self.in_turn]})" if self.timed is not self.row else ""
        return f"{words}{short}; {place(self.group.machine)}"

    def runs(self):
        return list({id(run): run for run in (*self.row.runs, *self.timed.runs)}.values())


def effects(runs):
    """The Effects of all techniques in `runs`, ordered by place: real images, digits, SimCLS.

    For each kind of hardware, a technique is shown by one group, the first by `rank` that has it. A technique that was
    tried on real images is not shown on digits for the same hardware.
    """
    found = []
    for study in STUDIES:
        of_study, shown_by = groups(study, runs), {}
        for group in sorted(of_study, key=rank):
            for each in filter(None, (effect(study, group, row, of_study) for row in group.rows)):
                if shown_by.setdefault((each.name, each.hardware), group) is group:
                    found.append(each)
    real = {(each.name, each.hardware) for each in found if not is_toy(each.group)}
    found = [each for each in found if not is_toy(each.group) or (each.name, each.hardware) not in real]
    places = {each.where: position for position, each in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda each: (each.study == "simcls", is_toy(each.group), places[each.where]))


def distinct(found):
    """The Effects with a known result. An Effect whose interval overlaps that of an earlier one of the same technique
    is left out: it only confirms it on another machine."""
    shown = []
    for each in (each for each in found if not each.result.startswith(UNKNOWN)):
        earlier = [one for one in shown if one.technique == each.technique]
        if not any(_agree(each.time, one.time) for one in earlier):
            shown.append(each)
    return shown


def _agree(one, other):
    """Whether the 95 % intervals of two ratios overlap; False if one of them is not known."""
    known = one and other and None not in one + other
    return bool(known) and max(one[1], other[1]) <= min(one[2], other[2])


def rank(group):
    """What comes first: real images, enough epochs to see a result, several seeds, more epochs, more seeds."""
    epochs = pace.epochs(group)
    seeds = min(len(row.runs) for row in group.rows)
    return is_toy(group), epochs < pace.FEW_EPOCHS, seeds < 2, -epochs, -seeds


def effect(study, group, row, of_study):
    """The Effect of a Row of `study`, one of STUDIES, whose Groups are `of_study`; None if it belongs to no
    technique."""
    base = group.baseline(row)
    kind = next((kind for kind in TECHNIQUES
                 if kind[0] == study.name and f"{row.arm.label} ".startswith(f"{kind[1]} ")), None)  # fmt: skip
    if kind is None or base is None or row is base:
        return None
    technique, when = TECHNIQUES[kind]
    if row.arm.label.startswith(("budget", "held")):
        technique = f"{technique[:-1]} {row.arm.label.split()[1]}`"  # Inside the quotes.
    timed, timed_base = pace.timed(group, row, of_study)
    memory = Record.allocated_gb if base.runs[0].allocated_gb() else Record.saved_mib
    memory_ratio = multiple(row, base, memory)
    if row.arm.label.startswith("budget") and memory is Record.saved_mib:
        # The peak of activations and their gradients, relative to the same steps without recomputation.
        peaks = Sample.of(run.peak_share() for run in row.runs)
        memory_ratio = peaks and (peaks.mean, None, None)
    return Effect(
        kind,
        row.arm.label,
        technique,
        when,
        multiple(timed, timed_base, Record.epoch_seconds),
        memory_ratio,
        _result(study, row, base),
        min(_pairs(row, base), _pairs(timed, timed_base)),
        group,
        row,
        timed,
        pace.in_turn(timed, timed_base),
        _published(study.name, row.arm.label),
    )


def _pairs(row, base):
    """The number of seeds by which two Rows are compared."""
    samples = paired(*(Sample.over(each.runs, lambda run: len(run.epochs)) for each in (row, base)))
    return min(sample.n for sample in samples)


def _result(study, row, base):
    """The change in test accuracy, or in the validation ROUGE of what a scorer chooses; "none" if the curves of each
    seed are identical."""
    curve, figure, unit = "test_acc", test_accuracy, "points"
    if study is SIMCLS:
        updates = min(run.losses()[-1][0] if run.losses() else 0 for run in (*row.runs, *base.runs))
        if updates < FEW_UPDATES:  # Too few to teach a scorer anything, so nothing could change.
            return f"{UNKNOWN}: {updates} updates"
        curve, figure, unit = "val_loss", validation_rouge, "ROUGE"
    if _same_curves(row, base, curve):
        return SAME
    new, old = (Sample.over(each.runs, figure) for each in (row, base))
    if new is None or old is None:
        return "–"
    if study is SIMCLS:
        return _change(new, old, unit)
    epochs = max(len(run.epochs) for run in (*row.runs, *base.runs))
    if epochs < pace.FEW_EPOCHS:
        return f"too few epochs ({epochs}) to tell"
    # At the original's constant rate the last epoch is a matter of luck, and may be far below the best.
    best = (Sample.over(each.runs, lambda run: max(run.curve(curve), default=None)) for each in (row, base))
    return f"best epoch: {_change(*best, unit)}; last epoch: {_change(new, old, unit)}"


def _change(new, old, unit):
    """ "+1.3 points (-0.2 to +2.8)", for two Samples."""
    new, old = paired(new, old)
    found, low, high = difference_interval(new, old)
    few = ", one run" if new.n == 1 else ", too few runs"
    return f"{signed(found)} {unit}{few if low is None else f' ({signed(low)} to {signed(high)})'}"


def _same_curves(row, base, key):
    theirs = {run.arguments.get("seed"): run.curve(key) for run in base.runs}
    return all(run.curve(key) and run.curve(key) == theirs.get(run.arguments.get("seed")) for run in row.runs)


def _published(study, label):
    """ "time 0.76, memory 0.65" of the original study's A100 for the same technique; None if it has none."""
    figures, first = PUBLISHED.get(study, ({}, None))
    new, old = (figures.get((128, each)) for each in ("fp16" if study == "mixed-precision" else label, first))
    if new is None or old is None:
        return None
    words = [f"time {new['epoch_s'] / old['epoch_s']:.2f}"]
    if "memory_gb" in new and "memory_gb" in old:
        words.append(f"memory {new['memory_gb'] / old['memory_gb']:.2f}")
    return ", ".join(words)


def own_words(hardware, everywhere):
    """What `hardware` has that not all of `everywhere` have: ["CPU with AVX2"] for "AMD EPYC, 2 cores, AVX2"."""
    shared = set.intersection(*(set(each.split(", ")) for each in everywhere))
    words = [word for word in hardware.split(", ") if word not in shared]
    if words and {*words} <= {*VECTOR_INSTRUCTIONS.values(), BFLOAT16, AMX}:
        return [f"CPU with {' and '.join(words)}"]
    return words


def render(runs, page=None):
    """Markdown: the headline table, followed by what its rows ran on; "" if there are no runs for it.

    page: one of PAGES, to show only its rows, but from all machines; without it, the rows that are `distinct`.
    """
    found = [each for each in effects(runs) if page == each.page] if page else distinct(effects(runs))
    if not found:
        return ""
    techniques = [*TECHNIQUES]
    # Where machines disagree about a technique, the one on which it pays comes first.
    found.sort(key=lambda each: (techniques.index(each.kind), each.time[0] if each.time else 0))
    places = list(dict.fromkeys(each.where for each in found))
    everywhere = {each.hardware for each in found}
    rows = [
        {
            "Technique": each.technique,
            "Time, ×": each.time and interval_text(*each.time),
            "Memory, ×": each.memory and interval_text(*each.memory),
            "Change in result": each.result,
            "Use it": each.when if page is None else None,
            "n": str(each.n),
            "Measured on": ", ".join([data_name(each.group), *own_words(each.hardware, everywhere)])
            + f" ({places.index(each.where) + 1})",
            "Published (one A100), ×": each.published,
        }
        for each in found
    ]
    notes = []
    for number, where in enumerate(places, 1):
        made = provenance([run.record for each in found if each.where == where for run in each.runs()])
        notes.append(f"- ({number}) {'; '.join(filter(None, [where, made]))}.")
    return "\n\n".join([markdown(rows), EXPLANATION, "Measured on:", "\n".join(notes)])


EXPLANATION = (
    "**Time**: the training steps of one epoch. **Memory**: what the forward pass keeps for the backward pass; in "
    "rows with a budget for the peak, that peak (of activations and their gradients); on a GPU, the peak allocated "
    "memory. Both are relative to the run without the technique and with the same random seed: means, with 95 % "
    "intervals where there are several seeds. **n**: the number of seeds (of times or of results, whichever is "
    "smaller). CPUs were shared with other work."
)
