"""How far training is from what the hardware can do: the larger of the time of its arithmetic and of its bytes.

The arithmetic floor is the time that the FLOPs of an epoch take at the rate of a large matrix product; the bytes floor
is that of moving each convolution's output five times (written, read by the next, read again in backward, its gradient
written and read) at the rate of a large copy. Both rates are measured.
"""

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "", "resnext")]

import torch
from common import interleaved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.resnext import ResNeXt, parse_name


@functools.cache
def forward_work(name):
    """(FLOPs, elements of all convolutions' outputs) of one picture's forward through the model `name`."""
    elements = []
    with torch.device("meta"):
        model = ResNeXt(*parse_name(name))
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda layer, inputs, output: elements.append(output[0].numel()))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    return counter.get_total_flops(), sum(elements)


def distance(name, rate, precision, pictures, device):
    """How far training at `rate` pictures/s is from what the hardware can do: an epoch's seconds, and both floors'."""
    flops, elements = forward_work(name)
    dtype = precision.dtype or torch.float32
    matmul_rate, copy_rate = hardware_rates(dtype, device)
    floors = {
        "arithmetic_floor_seconds": 3 * flops * pictures / matmul_rate,
        "bytes_floor_seconds": 5 * elements * dtype.itemsize * pictures / copy_rate,
    }
    epoch = pictures / rate
    limits = {
        "pflop_an_epoch": 3 * flops * pictures / 1e15,
        "matmul_tflops_per_second": matmul_rate / 1e12,
        "copy_gb_per_second": copy_rate / 1e9,
        "epoch_seconds": epoch,
        **floors,
        "times_the_larger_floor": epoch / max(floors.values()),
    }
    print("  ".join(f"{key} {round(each, 3)}" for key, each in limits.items()))
    return limits


def hardware_rates(dtype, device, repeats=5):
    """(FLOP/s of a large matrix product in `dtype`, bytes/s that a large copy reads and writes), best of `repeats`."""
    size, copied = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    # Single precision on CUDA is TensorFloat-32, as the convolutions' is.
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    seconds = interleaved(
        {
            "product": synchronised(lambda: one @ other, device),
            "copy": synchronised(lambda: target.copy_(source), device),
        },
        repeats,
    )
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / min(seconds["product"]), 2 * copied / min(seconds["copy"])


def synchronised(call, device):
    def arm():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return arm
