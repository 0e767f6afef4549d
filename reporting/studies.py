"""The tables of run records: which runs each contains, what distinguishes its rows, and its columns."""

from reporting import published
from reporting.comparison import difference, quantity, ratio_with_interval
from reporting.records import Record
from reporting.tables import Arm, Column, Study, percent, time

IMAGES = ("resnext", "resnext_checkpoint")
LOADING = ("num_worker", "loader")
PRECISION = ("half_precision", "true_fp32")
RECOMPUTATION = ("experiment", "policy", "memory_budget", "budget_of")


def test_accuracy(run):
    return run.last("test_acc")


def loading_label(run):
    """ "2 workers", "1 worker" or "device": what actually ran, which is workers if the images did not fit on the
    device."""
    if run.record.get("loading", run.arguments.get("loader")) == "device":
        return "device"
    workers = run.arguments["num_workers" if run.experiment == "simcls" else "num_worker"]
    return f"{workers} worker{'' if workers == 1 else 's'}"


def recomputation_label(run):
    """ "none", a policy, "budget 0.5" (of the peak), or "held 0.5", which includes old records without --budget_of."""
    if run.arguments.get("memory_budget") is not None:
        of = "budget" if run.arguments.get("budget_of") == "peak" else "held"
        return f"{of} {run.arguments['memory_budget']:g}"
    return run.arguments.get("policy") or "none"


IN_WORDS = {
    "0 workers": "loading without workers",
    "device": "images on the training device",
    "none": "no recomputation",
    "chain": "recomputing all but convolutions",
    "block": "recomputing whole blocks",
    "nested": "recomputing whole stages",
    "fp32": "single precision (fp32)",
    "tf32": "single precision (tf32)",
    "fp16": "half precision (fp16)",
    "bf16": "half precision (bf16)",
}
BUDGETS = {"budget": "peak at most", "held": "keeping at most"}


def in_words(label):
    """The label of an Arm for figures, which have no table header to give it context."""
    label, bracket, flags = label.partition(" (--")  # The flags tell arms with the same label apart.
    return ", ".join(map(_in_words, label.split(", "))) + bracket + flags


def _in_words(part):
    name = part.removeprefix("loading: ").removeprefix("recomputing: ")
    kind, _, share = name.partition(" ")
    if kind in BUDGETS:
        return f"recomputing, {BUDGETS[kind]} {100 * float(share):g} %"
    return IN_WORDS.get(name, f"loading by {name}" if share.startswith("worker") else name)


def loading_arm(run):
    if run.experiment not in IMAGES:
        return None
    label = loading_label(run)
    workers = float("inf") if label == "device" else run.arguments["num_worker"]
    figures = _published(run, published.DATA_LOADER, (run.arguments["batch_size"], label))
    is_baseline = label == "2 workers" and run.arguments.get("loader") != "device"
    return Arm(label, (workers,), is_baseline, figures)


def precision_arm(run):
    if run.experiment not in IMAGES:
        return None
    single = run.arguments["half_precision"] is None
    is_baseline = single and not run.arguments.get("true_fp32")
    label = run.precision or "unknown"
    key = run.arguments["batch_size"], "single" if is_baseline else label
    return Arm(label, (not single, label), is_baseline, _published(run, published.MIXED_PRECISION, key))


def checkpointing_arm(run):
    if run.experiment not in IMAGES:
        return None
    label = recomputation_label(run)
    figures = _published(run, published.CHECKPOINTING, (run.arguments["batch_size"], label))
    return Arm(label, (-(run.saved_mib() or 0), label), label == "none", figures)


def simcls_arm(run):
    if run.experiment != "simcls":
        return None
    arguments = run.arguments
    extras = [run.precision or "unknown"] * bool(arguments["half_precision"])
    extras += ["recomputation"] * bool(arguments["use_checkpoint"])
    label = ", ".join([loading_label(run), *extras])
    return Arm(label, (extras, arguments["num_workers"]), label == "4 workers")


def together_arm(run):
    """For all ResNeXt runs: how each differs from the original, which is resnext.py without arguments."""
    kept = ", freed memory kept" if run.arguments.get("keep_memory") else ""
    if run.experiment == "resnext_fast":
        redone, sgd = recomputation_label(run), ", with SGD" * (run.arguments.get("optimizer") == "sgd")
        label = f"everything on{sgd}" + ("" if redone == "none" else f", recomputing: {redone}")
        return Arm(label, (3, sgd, redone))
    if run.experiment == "resnext_checkpoint":
        return Arm(f"recomputing: {recomputation_label(run)}{kept}", (2, -(run.saved_mib() or 0)))
    if run.experiment != "resnext":
        return None
    if run.arguments["half_precision"]:
        return Arm(f"half precision ({run.precision or 'unknown'}){kept}", (1,))
    if kept:
        return Arm("freed memory kept", (1,))
    loading, batch_size = loading_label(run), run.arguments["batch_size"]
    if loading == "2 workers" and not run.arguments.get("true_fp32"):
        asked = run.arguments
        changed = [asked.get("init"), asked.get("deterministic"), asked.get("lr") != published.LEARNING_RATE]
        return Arm("original", (0, batch_size, sum(map(bool, changed))), is_baseline=True)
    return Arm("no TF32" if run.arguments.get("true_fp32") else f"loading: {loading}", (1, batch_size))


def batch_size(run):
    return run.arguments["batch_size"]


def validation_rouge(run):
    """Mean of ROUGE-1, -2 and -L, in percent, of the candidates that the scorer chose at the last validation."""
    values = [run.last(key) for key in ("val_rouge1", "val_rouge2", "val_rougeL")]
    return None if None in values else 100 * sum(values) / len(values)


def _published(run, figures, key):
    """The published figures of the arm `key`, or {} for a run with another model or other data than the original's."""
    is_same = (run.arguments["model"], run.data) == (published.MODEL, published.DATASET)
    return figures.get(key, {}) if is_same else {}


LOAD = (time("Load, ms", Record.load_ms, timed=True), percent("Load, % of step", Record.load_percent))
STEP_AND_EPOCH = (
    time("Step, ms", Record.step_ms, timed=True),
    Column("Step, ×", Record.step_ms, show=ratio_with_interval, timed=True),
    time("Epoch, s", Record.epoch_seconds, timed=True),
    Column("Epoch, ×", Record.epoch_seconds, show=ratio_with_interval, timed=True),
)
PEAK = (
    Column("Peak memory, GB", Record.allocated_gb),
    Column("Peak memory, ×", Record.allocated_gb, show=ratio_with_interval),
)
SAVED = (
    Column("Saved for backward, MiB", Record.saved_mib),
    Column("Saved, ×", Record.saved_mib, show=ratio_with_interval),
)
A100_STEP = {"A100: step, ms": "step_ms", "A100: epoch, s": "epoch_s"}

DATA_LOADER = Study(
    "data-loader",
    "Loading images",
    loading_arm,
    "Loading",
    "resnext.py with 2 workers",
    LOADING,
    (*LOAD, *STEP_AND_EPOCH, percent("Test accuracy, %", test_accuracy)),
    published={"A100: load, ms": "load_ms", **A100_STEP},
)
MIXED_PRECISION = Study(
    "mixed-precision",
    "Half precision",
    precision_arm,
    "Precision",
    "resnext.py without --half_precision",
    PRECISION,
    (
        *STEP_AND_EPOCH,
        time("Overall, s", Record.overall_seconds),
        Column("Overall, ×", Record.overall_seconds, show=ratio_with_interval),
        Column("Peak memory, GB", Record.allocated_gb),
        Column("Saved for backward, MiB", Record.saved_mib),
        percent("Test accuracy, %", test_accuracy),
        Column("Test accuracy, points", test_accuracy, show=difference),
    ),
    published={**A100_STEP, "A100: overall, s": "overall_s"},
)
CHECKPOINTING = Study(
    "checkpointing",
    "Recomputing activations",
    checkpointing_arm,
    "Recomputed in backward",
    "resnext.py",
    RECOMPUTATION,
    (
        time("Optimizer, ms", Record.optimizer_ms),
        *STEP_AND_EPOCH,
        time("Overall, s", Record.overall_seconds),
        *PEAK,
        Column("Reserved, GB", Record.reserved_gb),
        *SAVED,
        percent("Saved, % of peak", Record.activation_percent),
        percent("Test accuracy, %", test_accuracy),
    ),
    row_keys=("batch_size",),
    published={
        "A100: optimizer, ms": "optimizer_ms",
        **A100_STEP,
        "A100: overall, s": "overall_s",
        "A100: memory, GB": "memory_gb",
    },
)
SIMCLS = Study(
    "simcls",
    "Training the scorer of SimCLS",
    simcls_arm,
    "Set-up",
    "main.py with 4 workers",
    ("num_workers", "half_precision", "use_checkpoint"),
    (
        *LOAD,
        *STEP_AND_EPOCH,
        *PEAK,
        *SAVED,
        Column("Training loss", Record.last_loss),
        Column("Validation ROUGE, %", validation_rouge),
    ),
)
TOGETHER = Study(
    "together",
    "Everything together",
    together_arm,
    "Set-up",
    "resnext.py with 2 workers and without --half_precision",
    (),
    (
        Column("Batch", batch_size, show=lambda sample, base: quantity(sample, places=0)),
        time("Epoch, s", Record.epoch_seconds, timed=True),
        Column("Epoch, ×", Record.epoch_seconds, show=ratio_with_interval, timed=True),
        *PEAK,
        *SAVED,
        percent("Training accuracy, %", lambda run: run.last("acc")),
        percent("Test accuracy, %", test_accuracy),
        Column("Test accuracy, points", test_accuracy, show=difference),
    ),
    same=("model", "dataset", "size", "init", "num_epoch", "max_steps", "processes"),
)
STUDIES = (DATA_LOADER, MIXED_PRECISION, CHECKPOINTING, TOGETHER, SIMCLS)
