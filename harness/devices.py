"""Where a script computes: the device and threads that the user requests, or what the machine has.

"mps" (Apple's GPUs) is untested; the code follows its documentation.
"""

import argparse
import re

import torch

from harness.arguments import threads
from harness.endings import UserError
from harness.job import read_job


def add_arguments(parser, default="a CUDA GPU where there is one, else the CPU"):
    """Add `--device` and `--threads` to an argument parser or group. default: describes the device used if none is
    named."""
    parser.add_argument("--device", type=device_name, metavar="cpu|cuda|cuda:1|mps",
        help=f"where the model is; by default {default}")  # fmt: skip
    parser.add_argument("--threads", type=threads, help="number of CPU threads; by default PyTorch's choice")


def widest_float(device):
    """The floating-point type for sums on `device`: float64, except on Apple's GPUs, which lack it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def device_name(text):
    """An argparse type: the name of a device of a kind that the scripts support."""
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda, mps, or a GPU such as cuda:1")
    return text


def synchronize(device):
    """Wait until a GPU has finished its queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kind(args):
    """ "cpu", "cuda" or "mps": what `--device` names, else what this machine has."""
    return args.device.partition(":")[0] if args.device else "cuda" if torch.cuda.is_available() else "cpu"


def set_threads(args):
    """Set PyTorch's number of threads to `--threads`, if given."""
    if args.threads:
        torch.set_num_threads(args.threads)


def choose(args):
    """The torch.device of this process by `--device`; UserError if it does not exist. Also applies `--threads`.

    Each process of a job has its own GPU.
    """
    set_threads(args)
    job, gpus = read_job(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = args.device or ("cuda" if gpus else "cpu")
    kind, _, number = name.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch finds no Apple GPU on this machine")
    if kind != "cuda":
        return torch.device(kind)
    if not gpus:
        raise UserError(f"--device {name}: PyTorch finds no CUDA GPU on this machine; leave it out to use the CPU")
    if number and job.local_size > 1:
        raise UserError(
            f"--device {name}: this job has {job.local_size} processes; --device cuda gives each its own GPU"
        )
    index = int(number or job.local_rank)
    if index >= gpus:
        raise UserError(f"--device {name}: there is no GPU {index}; this machine has {gpus}, numbered from 0")
    return torch.device("cuda", index)
