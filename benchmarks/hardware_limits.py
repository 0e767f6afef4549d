"""The distance of training to the hardware's limits: two lower bounds (floors) for the time of an epoch.

The arithmetic floor is the time of an epoch's FLOPs at the rate of a large matrix product or, if faster, of a dense
convolution in the run's layout, both in the run's precision. The bytes floor is the time of moving each convolution's
output five times (written, read by the next layer, read again in backward, its gradient written and read) at the rate
of a large copy. All rates are medians over many rounds, given with the lowest and the highest.
"""

import functools
import statistics

from common import interleaved

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.resnext import ResNeXt, parse_name
from reporting.comparison import number

SECONDS = 10.0  # Time of measuring the rates in turn; on a shared machine they vary by half from second to second.


@functools.cache
def forward_work(name):
    """(FLOPs, elements of all convolutions' outputs) of the forward pass of one image through the model `name`."""
    elements = []
    with torch.device("meta"):
        model = ResNeXt(*parse_name(name))
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda layer, inputs, output: elements.append(output[0].numel()))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    return counter.get_total_flops(), sum(elements)


def distance(name, rate, precision, pictures, device, memory_format):
    """The distance of training at `rate` images/s to the hardware's limits, a flat dict: the seconds of an epoch and of
    both floors, and the rates behind the floors.

    pictures: images per epoch. precision: the Precision of the run. memory_format: of its images.
    """
    flops, elements = forward_work(name)
    dtype = precision.dtype or torch.float32
    rates = hardware_rates(dtype, memory_format, device)
    fastest = {what: statistics.median(values) for what, values in rates.items()}
    floors = {
        "arithmetic_floor_seconds": 3 * flops * pictures / max(fastest["matmul"], fastest["convolution"]),
        "bytes_floor_seconds": 5 * elements * dtype.itemsize * pictures / fastest["copy"],
    }
    epoch = pictures / rate
    return {
        "precision": precision.label,
        "pflop_an_epoch": 3 * flops * pictures / 1e15,
        **stated("matmul", "tflops_per_second", rates, 1e12),
        **stated("convolution", "tflops_per_second", rates, 1e12),
        **stated("copy", "gb_per_second", rates, 1e9),
        "epoch_seconds": epoch,
        **floors,
        "times_the_larger_floor": epoch / max(floors.values()),
    }


def stated(what, unit, rates, factor):
    """The median of the rates of `what`, and their range, which shows how much other load disturbs the machine."""
    values = [each / factor for each in rates[what]]
    spread = f"{number(min(values))} to {number(max(values))}"
    return {f"{what}_{unit}": statistics.median(values), f"{what}_spread": spread}


def hardware_rates(dtype, memory_format, device):
    """{"matmul": FLOP/s of a large matrix product, "convolution": FLOP/s of a dense 3x3 convolution of images in
    `memory_format`, "copy": bytes/s read and written by a large copy}; each a list with one rate per round, the first
    two in `dtype`."""
    on_cuda = device.type == "cuda"
    size, copied, pictures, channels = (8192, 2**30, 256, 256) if on_cuda else (1024, 2**27, 16, 128)
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    images = torch.randn(pictures, channels, 16, 16, device=device).to(dtype, memory_format=memory_format)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=memory_format)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    work = {"matmul": 2 * size**3, "convolution": 2 * 9 * images.numel() * channels, "copy": 2 * copied}
    arms = {
        "matmul": lambda: one @ other,
        "convolution": lambda: F.conv2d(images, weight, padding=1),
        "copy": lambda: target.copy_(source),
    }
    # On CUDA, single-precision products use TensorFloat-32, as the convolutions do.
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    warm_up = interleaved(arms, 3)
    rounds = max(10, int(SECONDS / sum(map(min, warm_up.values()))))
    seconds = interleaved(arms, rounds)
    torch.backends.cuda.matmul.allow_tf32 = before
    return {what: [work[what] / each for each in seconds[what]] for what in arms}
