"""The training speed of resnext_fast.py relative to the original's, technique by technique. Targets: TARGETS.

    python3 benchmarks/fast.py
    python3 benchmarks/fast.py --dataset cifar10

The rows lead from the original (Adam, 2 workers, contiguous, eager) to the fast script, one technique per row. Each row
adds its technique to the earlier ones that resnext_fast.py has on by default on this device; techniques that are off by
default are measured, but not carried over to later rows. The last row with a default technique is resnext_fast.py as it
is. First, each row's logits and one gradient on the same first batch are checked against float64; then all rows train
in turn, a few steps per round. On CUDA, the original's half precision is timed as well. scaling.py measures what larger
batches, other widths and smaller images cost.

A round has more steps than the workers load ahead, and first discards the batches that they have ready. Otherwise the
original would get batches for free that its workers loaded while other rows were timed. cuDNN's search for the fastest
algorithms is on in all rows, which favours the original.

hardware_limits.py measures the distance to the hardware's limits. On a CPU, resnext_fast.py also keeps freed memory; no
row does so here, since one process cannot alternate between both. allocator.py measures that.
"""

import dataclasses
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, ON_CUDA, ROOT, finish, get_parser, interleaved_rounds, new_record, ratio_summary, save

import torch
from exactness import Exact
from fast_steps import ORIGINAL, LongEpochs, TrainingSteps, fastest_layout
from hardware_limits import distance, forward_work
from resnext_fast import get_fast_args_parser

from experiment import model_name
from harness import arguments, endings
from harness.endings import UserError
from images import load_images

TECHNIQUES = {
    "loading on the device": "--loader device",
    "channels last": "--channels_last True",
    "bfloat16": "--half_precision bfloat16",
    "torch.compile": "--compile True",
    "max-autotune": "--compile True --max_autotune True",
    "CUDA graphs": "--compile True --cuda_graphs True",
    "separate convolutions": "--grouped_convolution separate",
    "dense convolutions": "--grouped_convolution dense",
    "SGD in one cycle": "--optimizer sgd --lr 0.1",
    "Muon in one cycle": "--optimizer muon --lr 0.1",
    "label smoothing": "--label_smoothing 0.1",
}
ON_CUDA_ONLY = ("max-autotune", "CUDA graphs")
HALF = "original, float16"
FAST = "resnext_fast.py"
TARGETS = {
    "cpu": {"resnext29_2x16d, resnext_fast.py over the original": ("at least", 1.5)},
    "cpu, bfloat16": {"resnext29_2x16d, resnext_fast.py over the original": ("at least", 2.4)},
    "cuda": {
        "resnext29_4x64d, resnext_fast.py over the original": ("at least", 5.0),
        "resnext29_4x64d, resnext_fast.py over the original in float16": ("at least", 3.5),
    },
}


@dataclasses.dataclass
class Row:
    """A way to train: flags of resnext_fast.py, and whether later rows build on them."""

    label: str
    flags: list
    carried: bool = True

    @property
    def args(self):
        return get_fast_args_parser().parse_args(self.flags)


def get_args_parser():
    parser = get_parser(__doc__, "fast", rounds=10 if ON_CUDA else 7)
    add = parser.add_argument
    add("--dataset", choices=("cifar10", "digits", "folder"), default="digits")
    add("--data_dir", default=str(ROOT / "resnext" / "data"))
    add("--model", type=model_name, default="resnext29_4x64d" if ON_CUDA else "resnext29_2x16d")
    add("--batch_size", type=arguments.positive_int, default=128 if ON_CUDA else 64)
    add("--steps", type=arguments.positive_int, default=30 if ON_CUDA else 9, help="training steps per row and round")
    add("--techniques", nargs="*", choices=TECHNIQUES, default=list(TECHNIQUES), help="rows besides the original's")
    return parser


def main():
    args = get_args_parser().parse_args()
    torch.backends.cudnn.benchmark = True
    layout, milliseconds = fastest_layout(Row(FAST, common_flags(args)).args, DEVICE)
    rows = make_rows(args, DEVICE, layout)
    record = new_record("fast", DEVICE, layout_milliseconds=milliseconds)
    record |= {name: getattr(args, name) for name in ("dataset", "model", "batch_size", "steps", "rounds")}
    if args.dataset == "folder":
        record["dataset"] = Path(args.data_dir).resolve().name
    measure_speed(rows, record, functools.partial(save, record, args), args, DEVICE, layout)
    finish(record, args)


def common_flags(args):
    names = ("dataset", "data_dir", "model", "batch_size")
    return [word for name in names for word in (f"--{name}", str(getattr(args, name)))]


def own_row(args, layout):
    """The Row of resnext_fast.py with its defaults and the Layout that it chose, but with --keep_memory False."""
    chosen = ["--channels_last", str(layout.channels_last), "--grouped_convolution", layout.form]
    return Row(FAST, [*common_flags(args), *chosen, "--keep_memory", "False"])


def make_rows(args, device, layout):
    """The Rows from the original to resnext_fast.py in its Layout; `fast_row` finds the latter among them."""
    common = common_flags(args)
    defaults = own_row(args, layout).args
    flags = [*common, *ORIGINAL.split()]
    rows = [Row("original", flags)]
    if device.type == "cuda":
        rows.append(Row(HALF, [*flags, "--half_precision", "float16"], carried=False))
    for label in args.techniques:
        if label in ON_CUDA_ONLY and device.type == "cpu":
            continue
        row = Row(label, [*flags, *TECHNIQUES[label].split()])
        changed = [flag[2:] for flag in TECHNIQUES[label].split() if flag.startswith("--")]
        row.carried = all(getattr(row.args, name) == getattr(defaults, name) for name in changed)
        rows.append(row)
        flags = row.flags if row.carried else flags
    return rows if fast_row(rows, args, layout) else [*rows, own_row(args, layout)]


def fast_row(rows, args, layout):
    """The one of `rows` that equals `own_row`, or None."""
    own = own_row(args, layout).args
    return next((row for row in rows if row.args == own), None)


def measure_speed(rows, record, write, args, device, layout):
    """Record the speed and memory of the Rows after every round, then the distance of resnext_fast.py to the hardware's
    limits. Calls `write()` each time, since a borrowed GPU may be withdrawn."""
    data = load_images(args.dataset, args.data_dir)
    if args.batch_size > len(data.train_labels):
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(data.train_labels)} training images")
    steps = checked_steps(rows, data, args, device)
    own = fast_row(rows, args, layout).label
    record["pictures"] = len(data.train_labels)
    arms = {name: lambda each=each: each.run(args.steps) for name, each in steps.items()}
    for seconds in interleaved_rounds(arms, args.rounds):
        record |= {"rounds": len(seconds["original"]), "seconds": seconds, "ratios": fast_ratios(seconds, own)}
        record["ablation"] = [ablation_row(row, steps[row.label], seconds, args) for row in rows]
        write()
    (rate,) = (row["pictures_per_second"] for row in record["ablation"] if row["technique"] == own)
    precision, where = steps[own].precision, layout.memory_format
    record["limits"] = [distance(args.model, rate, precision, len(data.train_labels), device, where)]
    write()


def checked_steps(rows, data, args, device):
    """{label: TrainingSteps} of the Rows, each checked against float64."""
    exact = Exact(args.model, data, LongEpochs(len(data.train_labels), args.batch_size, seed=0), device)
    found = {}
    for row in rows:
        found[row.label] = steps = TrainingSteps(row.args, data, device)
        check_enough_steps(args.steps, steps.loaded_ahead)
        precision = steps.precision.label
        errors = exact.check(row.label, precision, steps.first_pass)
        print("{}: {}, logits off by {:.1e}, gradient by {:.1e}".format(row.label, precision, *errors), flush=True)
    return found


def fast_ratios(seconds, own):
    """{case: ratio_summary} of resnext_fast.py over the original, and over its float16. own: the label of the fast
    row."""
    ratios = {f"{FAST} over the original": ratio_summary(seconds["original"], seconds[own])}
    if HALF in seconds:
        ratios[f"{FAST} over the original in float16"] = ratio_summary(seconds[HALF], seconds[own])
    return ratios


def check_enough_steps(steps, loaded_ahead):
    if steps <= loaded_ahead:
        raise UserError(
            f"--steps {steps}: the workers load {loaded_ahead} batches ahead; a round needs more steps than that"
        )


def ablation_row(row, steps, seconds, args):
    """The measurements of the Row `row`, a flat dict. seconds: of all rows, as `interleaved_rounds` yields them."""
    ratio = ratio_summary(seconds["original"], seconds[row.label])
    rate = args.steps * args.batch_size / statistics.median(seconds[row.label])
    return {
        "technique": row.label,
        "carried": row.carried,
        "precision": steps.precision.label,
        "pictures_per_second": rate,
        # The median of the rounds' ratios, not the ratio of the medians: a slow minute moves it less.
        "times_original": ratio["median"],
        "times_original_low": ratio["low"],
        "times_original_high": ratio["high"],
        "tflops_per_second": rate * 3 * forward_work(args.model)[0] / 1e12,
        "saved_mib": steps.saved_bytes / 2**20,
        "peak_allocated_mib": steps.peak_bytes and steps.peak_bytes / 2**20,
    }


if __name__ == "__main__":
    endings.run(main)
