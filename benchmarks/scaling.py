"""How time and memory scale with the batch, the width, the side and number of images, and the threads.

    python3 benchmarks/scaling.py

Times the training steps of resnext_fast.py on images of noise, which cost as much as any others. Each row changes one
thing; if that is the number of images, a whole epoch is timed. All rows take turns, after those with the usual batch
size have been checked against float64.

Memory includes the weights, their gradients, the optimizer state, the images (stored on the device), and the peak of
activations and their gradients: on CUDA as allocated, on a CPU counted from the tensors that operators return.

Existing options of resnext_fast.py train with larger batches (--batch_size 512 --lr 0.2) and with smaller images: with
--dataset folder, --size 24 for the first epochs, then --size 32 --init with the weights from those. Only training shows
whether the accuracy is as good.
"""

import dataclasses
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, ON_CUDA, finish, get_parser, interleaved_rounds, new_record, ratio_summary, save

import torch
from exactness import Exact
from fast_steps import LongEpochs, TrainingSteps, fastest_layout, random_pictures
from hardware_limits import forward_work
from resnext_fast import get_fast_args_parser

from experiment import model_name, picture_size
from harness import arguments, endings
from harness.memory import LiveBytes
from image_loaders import DeviceImages
from images import SIZE
from reporting.comparison import number


@dataclasses.dataclass(frozen=True)
class Point:
    """A way to train, of which `steps` steps are timed. side: of the images, in pixels. threads: on the CPU."""

    model: str
    batch_size: int
    side: int
    pictures: int
    threads: int
    steps: int = 1

    @property
    def flops(self):
        return 3 * forward_work(self.model)[0] * (self.side / SIZE) ** 2 * self.batch_size * self.steps


def get_args_parser():
    parser = get_parser(__doc__, "scaling", rounds=9 if ON_CUDA else 7)
    add, positive_int = parser.add_argument, arguments.positive_int
    shapes, pictures = ("2x4", "2x8", "2x16"), [512, 1024, 2048]
    if ON_CUDA:
        shapes, pictures = ("4x16", "4x32", "4x64"), [12_800, 25_600, 51_200]
    models = [f"resnext29_{shape}d" for shape in shapes]
    add("--model", type=model_name, default=models[1], help="model where the width does not vary")
    add("--batch_size", type=positive_int, default=128, help="batch size where it does not vary")
    add("--batch_sizes", type=positive_int, nargs="+", default=[256, 512, 1024])
    add("--models", type=model_name, nargs="+", default=models)
    add("--sides", type=picture_size, nargs="+", default=[16, 24, SIZE], help="sides of the images, in pixels")
    add("--pictures", type=positive_int, nargs="+", default=pictures, help="images per epoch")
    return parser


def main():
    args = get_args_parser().parse_args()
    torch.backends.cudnn.benchmark = True
    axes = make_axes(args, DEVICE)
    usual = get_fast_args_parser().parse_args(["--model", args.model, "--batch_size", str(args.batch_size)])
    layout, _ = fastest_layout(usual, DEVICE)
    print(f"{args.model}, batch {args.batch_size}, {layout}, {torch.get_num_threads()} threads", flush=True)
    steps, memory = {}, {}
    for point in (point for axis in axes.values() for point in axis.values()):
        if point not in steps:
            steps[point], memory[point] = make_steps(point, layout, point.batch_size == args.batch_size, DEVICE)
    record = new_record("scaling", DEVICE, model=args.model, batch_size=args.batch_size, layout=str(layout))
    record["precision"] = steps[point].precision.label
    arms = {point: lambda point=point: timed(point, steps[point]) for point in steps}
    for seconds in interleaved_rounds(arms, args.rounds):  # Saved after each, since a borrowed GPU may be withdrawn.
        rows = [row for name, axis in axes.items() for row in make_rows(name, axis, seconds, memory)]
        record |= {"rounds": len(next(iter(seconds.values()))), "rows": rows}
        save(record, args)
    finish(record, args)


def make_axes(args, device):
    """{what varies: {its value, in words: Point}}, each in increasing order."""
    threads = torch.get_num_threads()
    usual = Point(args.model, args.batch_size, SIZE, args.pictures[0], threads)
    change = dataclasses.replace
    axes = {
        "batch": {str(size): change(usual, batch_size=size) for size in args.batch_sizes},
        "width": {model: change(usual, model=model) for model in args.models},
        "side of the pictures": {f"{side} px": change(usual, side=side) for side in args.sides},
        "pictures, an epoch": {
            f"{count:,}": change(usual, pictures=count, steps=max(1, count // args.batch_size))
            for count in args.pictures
        },
    }
    if device.type == "cpu":
        counts = sorted({min(2**power, threads) for power in range(threads.bit_length() + 1)})
        axes["threads"] = {str(count): change(usual, threads=count) for count in counts}
    return axes


def make_steps(point, layout, is_checked, device):
    """(the TrainingSteps of `point` in the Layout, the bytes that they need); checked against float64 if
    `is_checked`."""
    chosen = ["--channels_last", str(layout.channels_last), "--grouped_convolution", layout.form]
    args = get_fast_args_parser().parse_args(
        ["--model", point.model, "--batch_size", str(point.batch_size), "--size", str(point.side), *chosen]
    )
    data = random_pictures(point.pictures, point.side)
    steps = TrainingSteps(args, data, device)
    if is_checked:
        batches = LongEpochs(point.pictures, point.batch_size, seed=0)
        Exact(point.model, data, batches, device).check(str(point), steps.precision.label, steps.first_pass)
    if device.type == "cuda":
        return steps, steps.peak_bytes
    with LiveBytes(steps.model) as live:
        steps.step()
    held = [*steps.model.parameters(), *steps.model.buffers(), *(weight.grad for weight in steps.model.parameters())]
    held += [each for state in steps.optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    return steps, live.peak + sum(each.nbytes for each in held) + DeviceImages.bytes_needed(data)


def timed(point, steps):
    before = torch.get_num_threads()
    torch.set_num_threads(point.threads)
    seconds = steps.run(point.steps)
    torch.set_num_threads(before)
    return seconds


def make_rows(name, axis, seconds, memory):
    """Yield a row for each Point of an axis, relative to the previous one.

    seconds: as `interleaved_rounds` yields them. memory: {Point: bytes}.
    """
    before = None
    for value, point in axis.items():
        row = {"changed": name, "to": value, "flops_times": None}
        row |= {"milliseconds": 1e3 * statistics.median(seconds[point]), "time_times": None, "time_interval": None}
        row |= {"memory_mib": memory[point] / 2**20, "memory_times": None}
        if before:
            time = ratio_summary(seconds[point], seconds[before])
            row |= {"flops_times": point.flops / before.flops, "time_times": time["median"]}
            row["time_interval"] = " to ".join(map(number, time["interval"])) if time["interval"] else None
            row["memory_times"] = memory[point] / memory[before]
        yield row
        before = point


if __name__ == "__main__":
    endings.run(main)
