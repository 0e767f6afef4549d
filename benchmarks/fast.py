"""How many times as fast as in the original's way resnext_fast.py trains, technique by technique. Targets: TARGETS.

    python3 benchmarks/fast.py
    python3 benchmarks/fast.py --dataset cifar10

From the original's way (Adam, 2 workers, contiguous, eager) to the fast one, a row a technique, each on top of those
before it that resnext_fast.py has on by default on this device; the others are measured and not carried on. One row,
the last of those, is resnext_fast.py as it is. First each row's logits and a gradient, of the same first batch, are
checked against those in float64, then all rows train in turn, some steps a round. On CUDA the original's half precision
is timed too. What larger batches, other widths and smaller pictures cost, scaling.py measures.

A round has more steps than the batches that worker processes load ahead, and starts by throwing those away: else the
workers, which load while other rows are timed, would give the original's way its batches for nothing. cuDNN's search
for the fastest algorithms is on in all rows, in favour of the original's.

How far the script is from the hardware's limit, hardware_limits.py measures. On a CPU the script also keeps freed
memory, which no row does here: one process cannot do both in turn. allocator.py measures it.
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
from fast_steps import LongEpochs, TrainingSteps, fastest_layout
from hardware_limits import distance, forward_work
from resnext_fast import get_fast_args_parser

from experiment import model_name
from harness import arguments, endings
from harness.endings import UserError
from images import load_images

ORIGINAL = (
    "--loader workers --num_worker 2 --half_precision False --channels_last False --grouped_convolution groups "
    "--compile False --keep_memory False --optimizer adam --lr 0.01 --label_smoothing 0"
)
TECHNIQUES = {
    "loading on the device": "--loader device",
    "channels last": "--channels_last True",
    "bfloat16": "--half_precision bfloat16",
    "torch.compile": "--compile True",
    "CUDA graphs": "--compile True --cuda_graphs True",
    "separate convolutions": "--grouped_convolution separate",
    "dense convolutions": "--grouped_convolution dense",
    "SGD in one cycle": "--optimizer sgd --lr 0.1",
    "Muon in one cycle": "--optimizer muon --lr 0.1",
    "label smoothing": "--label_smoothing 0.1",
}
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
    """A way to train: the flags of resnext_fast.py, and whether the rows after it have them too."""

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
    add("--steps", type=arguments.positive_int, default=30 if ON_CUDA else 9, help="of a row in a round")
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
    """The Row of resnext_fast.py as it is, but for --keep_memory, where it has chosen the Layout."""
    chosen = ["--channels_last", str(layout.channels_last), "--grouped_convolution", layout.form]
    return Row(FAST, [*common_flags(args), *chosen, "--keep_memory", "False"])


def make_rows(args, device, layout):
    """The Rows, from the original's way to the fast one in its Layout; `fast_row` finds one among them."""
    common = common_flags(args)
    defaults = own_row(args, layout).args
    flags = [*common, *ORIGINAL.split()]
    rows = [Row("original", flags)]
    if device.type == "cuda":
        rows.append(Row(HALF, [*flags, "--half_precision", "float16"], carried=False))
    for label in args.techniques:
        if label == "CUDA graphs" and device.type == "cpu":
            continue
        row = Row(label, [*flags, *TECHNIQUES[label].split()])
        changed = [flag[2:] for flag in TECHNIQUES[label].split() if flag.startswith("--")]
        row.carried = all(getattr(row.args, name) == getattr(defaults, name) for name in changed)
        rows.append(row)
        flags = row.flags if row.carried else flags
    return rows if fast_row(rows, args, layout) else [*rows, own_row(args, layout)]


def fast_row(rows, args, layout):
    """The one of `rows` that trains as resnext_fast.py does without a flag, or None."""
    own = own_row(args, layout).args
    return next((row for row in rows if row.args == own), None)


def measure_speed(rows, record, write, args, device, layout):
    """Put speed and memory of the Rows into `record`, anew after every round, and then how far from the limits
    resnext_fast.py is; `write()` after each, since a lent GPU may be taken back."""
    data = load_images(args.dataset, args.data_dir)
    if args.batch_size > len(data.train_labels):
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(data.train_labels)} training pictures")
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
    """{label: TrainingSteps} of the Rows, each of which computes what float64 does."""
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
    """{case: ratio_summary} of resnext_fast.py over the original's ways. own: the label of its row."""
    ratios = {f"{FAST} over the original": ratio_summary(seconds["original"], seconds[own])}
    if HALF in seconds:
        ratios[f"{FAST} over the original in float16"] = ratio_summary(seconds[HALF], seconds[own])
    return ratios


def check_enough_steps(steps, loaded_ahead):
    if steps <= loaded_ahead:
        raise UserError(
            f"--steps {steps}: the workers have {loaded_ahead} batches ready; a round needs more steps than that"
        )


def ablation_row(row, steps, seconds, args):
    """What was measured of the Row `row`, flat. seconds: of all rows, as `interleaved_rounds` yields them."""
    ratio = ratio_summary(seconds["original"], seconds[row.label])
    rate = args.steps * args.batch_size / statistics.median(seconds[row.label])
    return {
        "technique": row.label,
        "carried": row.carried,
        "precision": steps.precision.label,
        "pictures_per_second": rate,
        # Its own statistic: the median of the ratios is not the ratio of the medians, and a slow minute moves it less.
        "times_original": ratio["median"],
        "times_original_low": ratio["low"],
        "times_original_high": ratio["high"],
        "tflops_per_second": rate * 3 * forward_work(args.model)[0] / 1e12,
        "saved_mib": steps.saved_bytes / 2**20,
        "peak_allocated_mib": steps.peak_bytes and steps.peak_bytes / 2**20,
    }


if __name__ == "__main__":
    endings.run(main)
