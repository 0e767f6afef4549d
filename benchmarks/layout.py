"""The fastest memory layout and form of ResNeXt's grouped 3x3 convolutions.

    python3 benchmarks/layout.py                              ResNeXt29_4x64d and, on a CPU, a smaller model
    python3 benchmarks/layout.py --precision fp32 bf16        on CUDA also tf32 and fp16

The forms are those of resnext/models/grouped_convolution.py. Forward and backward of each are timed separately, in NCHW
and in NHWC (channels last), after its output and gradients have been checked against the first form in float64.
"""

import itertools
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, ON_CUDA, check, finish, get_parser, interleaved, new_record, save

import torch

from experiment import model_name
from harness import arguments, endings
from models.grouped_convolution import FORMS, GroupedConv2d, groups
from models.resnext import ResNeXt, parse_name

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2, "fp16": 1e-2}  # Of the largest value.


class Shape(NamedTuple):
    """A grouped 3x3 convolution of `channels` to `channels` on images of `size` x `size`."""

    channels: int
    groups: int
    size: int
    stride: int

    @property
    def how(self):
        """The arguments of a form other than image and weight."""
        return {"groups": self.groups, "stride": self.stride, "padding": 1}

    def __str__(self):
        return f"{self.channels} channels, {self.groups} groups, {self.size} x {self.size}, stride {self.stride}"


def get_args_parser():
    parser = get_parser(__doc__, "layout", rounds=10)
    add = parser.add_argument
    # On a GPU, the small model's convolutions would take no longer than their launch.
    models = ["resnext29_4x64d"] if ON_CUDA else ["resnext29_4x64d", "resnext29_2x16d"]
    add("--models", type=model_name, nargs="+", default=models)
    add("--batch_size", type=arguments.positive_int, default=128 if ON_CUDA else 16)
    known = [name for name in DTYPES if ON_CUDA or name != "tf32"]  # A CPU has none.
    add("--precision", choices=known, nargs="+", default=["tf32", "bf16", "fp16"] if ON_CUDA else ["fp32", "bf16"])
    add("--repeats", type=arguments.positive_int, default=20 if ON_CUDA else 1, help="calls per arm and round")
    return parser


def main():
    args = get_args_parser().parse_args()
    torch.backends.cudnn.benchmark = True
    record = new_record("layout", DEVICE, totals=[], by_shape={"rows": []})
    record |= {name: getattr(args, name) for name in ("batch_size", "rounds", "repeats")}
    for model in args.models:
        rows = record["by_shape"]["rows"]
        for shape, count in count_shapes(model).items():
            facts = {"model": model, "shape": str(shape), "count": count}
            rows += [facts | row for row in measure(shape, args, DEVICE)]
            save(record, args)  # After each shape, since a borrowed GPU may be withdrawn.
        for precision in args.precision:
            record["totals"] += sum_up([row for row in rows if (row["model"], row["precision"]) == (model, precision)])
    finish(record, args)


def count_shapes(name):
    """{Shape: number of grouped convolutions of this shape} in the model `name`."""
    found = {}

    def note(layer, inputs):
        shape = Shape(layer.in_channels, layer.groups, inputs[0].shape[-1], layer.stride[0])
        found[shape] = found.get(shape, 0) + 1

    with torch.device("meta"):
        model = ResNeXt(*parse_name(name))
        for layer in model.modules():
            if isinstance(layer, GroupedConv2d):
                layer.register_forward_pre_hook(note)
        model(torch.empty(2, 3, 32, 32))
    return found


def measure(shape, args, device):
    """A row per precision, form and layout, with the median milliseconds of a call."""
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, shape.channels, shape.size, shape.size, device=device)
    weight = torch.randn(shape.channels, shape.channels // shape.groups, 3, 3, device=device) / shape.channels**0.5
    exact = call_once(groups, x.double(), weight.double(), shape)
    rows = []
    for precision in args.precision:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        arms = {}
        for (form, function), (layout, memory_format) in itertools.product(FORMS.items(), LAYOUTS.items()):
            operands = [each.to(DTYPES[precision], memory_format=memory_format) for each in (x, weight)]
            for ours, right in zip(call_once(function, *operands, shape), exact, strict=True):
                error = (ours.double() - right).abs().max() / right.abs().max()
                check(error <= TOLERANCES[precision], f"{form} {layout} {precision} {shape}: off by {error:.1e}")
            arms |= make_arms(f"{form} {layout}", function, operands, shape, args.repeats)
        for arm in arms.values():
            arm()  # Warm up.
        seconds = interleaved(arms, args.rounds)
        milliseconds = {name: 1e3 * statistics.median(values) / args.repeats for name, values in seconds.items()}
        for form, layout in itertools.product(FORMS, LAYOUTS):
            forward, backward = (milliseconds[f"{form} {layout} {side}"] for side in ("forward", "backward"))
            row = {"precision": precision, "form": form, "layout": layout}
            rows.append(row | {"forward_ms": forward, "backward_ms": backward})
    return rows


def call_once(function, x, weight, shape):
    """(output, gradient of x, gradient of weight) for a fixed gradient of the output."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight, **shape.how)
    return out.detach(), *torch.autograd.grad(out, (x, weight), gradient_like(out))


def gradient_like(out):
    generator = torch.Generator(out.device).manual_seed(1)
    gradient = torch.randn(out.shape, generator=generator, device=out.device)
    return torch.empty_like(out).copy_(gradient)  # Has the layout that the next layer's backward would give it.


def make_arms(name, function, operands, shape, repeats):
    operands = [each.detach().requires_grad_() for each in operands]
    out = function(*operands, **shape.how)
    gradient = gradient_like(out)

    def repeated(call):
        def arm():
            for _ in range(repeats):
                call()

        return arm

    return {
        f"{name} forward": repeated(lambda: function(*operands, **shape.how)),
        f"{name} backward": repeated(lambda: torch.autograd.grad(out, operands, gradient, retain_graph=True)),
    }


def sum_up(rows):
    """Sum the rows of one model and precision to one per form and layout: milliseconds of all its convolutions."""
    totals = []
    for form, layout in itertools.product(FORMS, LAYOUTS):
        of_arm = [row for row in rows if (row["form"], row["layout"]) == (form, layout)]
        sums = {side: sum(row["count"] * row[side] for row in of_arm) for side in ("forward_ms", "backward_ms")}
        totals.append({key: of_arm[0][key] for key in ("model", "precision", "form", "layout")} | sums)
    base = totals[0]["forward_ms"] + totals[0]["backward_ms"]
    return [row | {"times_faster": base / (row["forward_ms"] + row["backward_ms"])} for row in totals]


if __name__ == "__main__":
    endings.run(main)
