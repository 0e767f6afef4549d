"""How many times as fast as in the original's way resnext_fast.py trains, technique by technique. Targets: TARGETS.

    python3 benchmarks/fast.py                                                    digits, speed alone
    python3 benchmarks/fast.py --dataset cifar10 --fast_epochs 30 --seeds 0 1 2   and accuracy over seeds

From the original's way (Adam, 2 workers, contiguous, eager) to the fast one, a row a technique, each on top of those
before it that resnext_fast.py has on by default on this device; the others are measured and not carried on. One row,
the last of those, is resnext_fast.py as it is. First each row's loss on the same first batch is checked against the
original's, then all rows train in turn, some steps a round. On CUDA the original's half precision is timed too.

A round has more steps than the batches that worker processes load ahead, and starts by throwing those away: else the
workers, which load while other rows are timed, would give the original's way its batches for nothing. cuDNN's search
for the fastest algorithms is on in all rows, in favour of the original's.

How far the script is from the hardware's limit, hardware_limits.py measures.

--ablation_epochs trains every row, --fast_epochs resnext_fast.py alone, over --seeds; what is trained already in
--run_dir is not trained again, and what was interrupted goes on.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "", "resnext")]

import torch
import torch.nn.functional as F
from common import check, interleaved_rounds, ratio_summary, results_path, verdict
from hardware_limits import distance, forward_work
from resnext_fast import compiled, get_fast_args_parser, make_optimizer, suffix
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from experiment import model_name, run_name
from harness import arguments, endings
from harness.distributed import World
from harness.endings import UserError
from harness.files import write_record
from harness.loading import EpochBatches
from harness.machine import describe_machine
from harness.memory import SavedBytes, reset_peak_memory
from harness.precision import choose_precision
from image_loaders import training_loader
from images import load_images
from layouts import Layout, candidates, fastest
from models.resnext import ResNeXt, parse_name

SCRIPT = ROOT / "resnext" / "resnext_fast.py"
ORIGINAL = (
    "--loader workers --num_worker 2 --half_precision False --channels_last False --grouped_convolution groups "
    "--compile False --optimizer adam --lr 0.01 --label_smoothing 0"
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
    "label smoothing": "--label_smoothing 0.1",
    "weight averaging": "--ema 0.99",
}
TOLERANCES = {"fp32": 1e-4, "tf32": 3e-3, "fp16": 1e-2, "bf16": 3e-2}  # Of the first loss.
NO_CONTEXT = contextlib.nullcontext()
HALF = "original, float16"
GOAL = 94.0  # Percent of the test pictures; the seconds until there are stated.
WARM_UP = 2  # Steps, besides the one that is checked.
FAST = "resnext_fast.py"
TARGETS = {
    "cpu": {"resnext29_2x16d, resnext_fast.py over the original": ("at least", 1.3)},
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
    on_cuda = torch.cuda.is_available()
    parser = arguments.OneLineParser(description=arguments.first_line(__doc__))
    add = parser.add_argument
    add("--dataset", choices=("cifar10", "digits", "folder"), default="digits")
    add("--data_dir", default=str(ROOT / "resnext" / "data"))
    add("--model", type=model_name, default="resnext29_4x64d" if on_cuda else "resnext29_2x16d")
    add("--batch_size", type=arguments.positive_int, default=128)
    add("--steps", type=arguments.positive_int, default=30 if on_cuda else 12, help="of a row in a round")
    add("--rounds", type=arguments.positive_int, default=10 if on_cuda else 5)
    add("--techniques", nargs="*", choices=TECHNIQUES, default=list(TECHNIQUES), help="rows besides the original's")
    add("--ablation_epochs", type=arguments.non_negative_int, default=0)
    add("--fast_epochs", type=arguments.non_negative_int, default=0)
    add("--seeds", type=arguments.seed, nargs="+", default=[0])
    add("--run_dir", type=Path, default=ROOT / "runs" / "fast", help="where the records of the training runs go")
    add("--output", type=Path, help="by default benchmarks/results/<hardware>/fast.json")
    return parser


def main():
    args = get_args_parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    layout, milliseconds = choose_layout(args, device)
    rows = make_rows(args, device, layout)
    record = {"benchmark": "fast", "machine": describe_machine(device), "layout_milliseconds": milliseconds}
    record |= {name: getattr(args, name) for name in ("dataset", "model", "batch_size", "steps", "rounds")}
    if args.dataset == "folder":
        record["dataset"] = Path(args.data_dir).resolve().name
    path = args.output or results_path("fast", device)
    for part in time_rows(rows, args, device, layout):  # Round by round, since a lent GPU may be taken back.
        record |= part
        write_record(path, record)
    record["accuracy"] = []
    for _ in train_rows(rows, record, args, layout):
        write_record(path, record)
    print(f"written: {path}")


def common_flags(args):
    names = ("dataset", "data_dir", "model", "batch_size")
    return [word for name in names for word in (f"--{name}", str(getattr(args, name)))]


def choose_layout(args, device):
    """(the Layout that resnext_fast.py chooses here, {layout: milliseconds a picture})"""
    precision = choose_precision(Row(FAST, common_flags(args)).args.half_precision, device)
    model = ResNeXt(*parse_name(args.model)).to(device)
    return fastest(model, candidates(None, None), precision, World(0, 1, device), args.batch_size, size=32)


def own_row(args, layout):
    """The Row of resnext_fast.py as it is, where it has chosen the Layout."""
    chosen = ["--channels_last", str(layout.channels_last), "--grouped_convolution", layout.form]
    return Row(FAST, [*common_flags(args), *chosen])


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


# ---------------------------------------------------------------------- speed and memory


def time_rows(rows, args, device, layout):
    """Yield the parts of the record that tell speed and memory: the same ones after every round, then the limits."""
    data = load_images(args.dataset, args.data_dir)
    if args.batch_size > len(data.train_labels):
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(data.train_labels)} training pictures")
    trainings = {}
    for row in rows:
        trainings[row.label] = training = Training(row.args, data, device)
        check_enough_steps(args.steps, training.loaded_ahead)
        loss, right = training.first_loss, trainings["original"].first_loss
        check(abs(loss / right - 1) <= TOLERANCES[training.precision.label], f"{row.label}: loss {loss}, not {right}")
        print(f"{row.label}: {training.precision.label}, first loss {loss:.6f}", flush=True)
    arms = {name: lambda each=each: each.run(args.steps) for name, each in trainings.items()}
    for seconds in interleaved_rounds(arms, args.rounds):
        ablation = [ablation_row(row, trainings[row.label], seconds, args) for row in rows]
        ratios = fast_ratios(seconds, fast_row(rows, args, layout).label)
        facts = {"pictures": len(data.train_labels), "rounds": len(seconds["original"])}
        yield facts | {"seconds": seconds, "ratios": ratios, "ablation": ablation}
    show(ablation, ratios, args.model, device)
    own = next(row for row in ablation if row["technique"] == fast_row(rows, args, layout).label)
    precision = trainings[own["technique"]].precision
    yield {"limits": [distance(args.model, own["pictures_per_second"], precision, len(data.train_labels), device)]}


def fast_ratios(seconds, own):
    """{case: ratio_summary} of resnext_fast.py over the original's ways. own: the label of its row."""
    ratios = {f"{FAST} over the original": ratio_summary(seconds["original"], seconds[own])}
    if HALF in seconds:
        ratios[f"{FAST} over the original in float16"] = ratio_summary(seconds[HALF], seconds[own])
    return ratios


def show(ablation, ratios, model, device):
    for row in ablation:
        print(
            f"{row['technique']}: {row['pictures_per_second']:.0f} pictures/s, {row['times_original']:.2f} x the "
            f"original ({row['times_original_low']:.2f} to {row['times_original_high']:.2f}), "
            f"{row['tflops_per_second']:.3f} TFLOP/s" + ("" if row["carried"] else ", not carried on")
        )
    for case, ratio in ratios.items():
        ending = verdict(TARGETS, device, f"{model}, {case}", ratio)
        print(f"{case}: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}){ending}", flush=True)


def check_enough_steps(steps, loaded_ahead):
    if steps <= loaded_ahead:
        raise UserError(
            f"--steps {steps}: the workers have {loaded_ahead} batches ready; a round needs more steps than that"
        )


def ablation_row(row, training, seconds, args):
    """What was measured of the Row `row`, flat. seconds: of all rows, as `interleaved_rounds` yields them."""
    ratio = ratio_summary(seconds["original"], seconds[row.label])
    rate = args.steps * args.batch_size / statistics.median(seconds[row.label])
    return {
        "technique": row.label,
        "carried": row.carried,
        "precision": training.precision.label,
        "pictures_per_second": rate,
        # Its own statistic: the median of the ratios is not the ratio of the medians, and a slow minute moves it less.
        "times_original": ratio["median"],
        "times_original_low": ratio["low"],
        "times_original_high": ratio["high"],
        "tflops_per_second": rate * 3 * forward_work(args.model)[0] / 1e12,
        "saved_mib": training.saved_bytes / 2**20,
        "peak_allocated_mib": training.peak_bytes and training.peak_bytes / 2**20,
    }


class Training:
    """The training step of resnext_fast.py with the arguments `args`, again and again over full batches.

    first_loss: the cross-entropy of the first batch, before any update. saved_bytes: for backward. peak_bytes: of
    what a step needs, with the pictures of the device loader, weights and the optimizer's state; None without CUDA,
    and with CUDA graphs. loaded_ahead: of its loader.
    """

    def __init__(self, args, data, device):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else None
        self.device = device
        self.precision = choose_precision(args.half_precision, device, say=lambda line: None)
        layout = Layout(args.channels_last, args.grouped_convolution)
        self.layout = {"memory_format": layout.memory_format, "dtype": self.precision.dtype or torch.float32}
        torch.manual_seed(0)
        model = ResNeXt(*parse_name(args.model), num_classes=len(data.classes)).to(device)
        self.model = layout.apply(model)
        self.fast_model = compiled(model, args, layout.channels_last) if args.compile else model
        self.average = None
        if args.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        # Times need no progress.
        self.optimizer = make_optimizer(model, args.optimizer, args.lr / 100, device, self.precision.scaler)
        batches = LongEpochs(len(data.train_labels), args.batch_size, seed=0)
        loader = training_loader(args.loader, data, 0, batches, args.num_worker, device, **self.layout)
        self.loaded_ahead = loaded_ahead(loader)
        self.source = endless(loader, batches)
        output, labels = self.step(saved := SavedBytes(model))
        self.first_loss, self.saved_bytes = F.cross_entropy(output.float(), labels).item(), saved.bytes
        self.run(WARM_UP)
        reset_peak_memory(device)  # Not before: cuDNN tries algorithms in the first steps, some with much memory.
        self.run(1)
        # The memory of CUDA graphs does not count as allocated.
        known = before is not None and not args.cuda_graphs
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if known else None

    def step(self, forward_context=NO_CONTEXT):
        """One training step; returns the logits and the labels."""
        images, labels = next(self.source)
        images = images.to(self.device, non_blocking=True, **self.layout)
        labels = labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast(), forward_context:
            output = self.fast_model(images)
            loss = self.criterion(output, labels)
        self.precision.scaler.scale(loss).backward()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        if self.average:
            self.average.update_parameters(self.model)
        return output.detach(), labels

    def run(self, steps):
        """Train `steps` steps, with no batch loaded ahead when they start; returns their seconds."""
        for _ in range(self.loaded_ahead):
            next(self.source)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def loaded_ahead(loader):
    """How many batches the worker processes of a loader have ready when they have had the time; 0 without workers."""
    return loader.num_workers * (loader.prefetch_factor or 0) if isinstance(loader, DataLoader) else 0


class LongEpochs(EpochBatches):
    """EpochBatches over `size` samples, again and again until an epoch is as long as CIFAR-10's; all are full.

    As an epoch begins, nothing is loaded ahead: epochs of a few batches would charge that to every few steps.
    """

    def __init__(self, size, batch_size, seed):
        self.samples = size
        super().__init__(max(50_000, size) // batch_size * batch_size, batch_size, seed)

    def order(self):
        return super().order() % self.samples


def endless(loader, batches):
    """The batches of epoch after epoch."""
    for epoch in itertools.count():
        batches.start(epoch)
        yield from loader


# ---------------------------------------------------------------------- accuracy


def train_rows(rows, record, args, layout):
    """Put the accuracy of each Row into its row of the ablation, and what resnext_fast.py reaches into `accuracy`;
    yield after each."""
    if args.ablation_epochs:
        for row, measured in zip(rows, record["ablation"], strict=True):
            measured |= accuracy(row, args.ablation_epochs, args)
            yield
    if args.fast_epochs:
        row = own_row(args, layout)
        record["accuracy"].append({"technique": row.label} | accuracy(row, args.fast_epochs, args, whole=True))
        yield


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


if __name__ == "__main__":
    endings.run(main)
