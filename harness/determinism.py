"""Results that are the same, bit for bit, in every run: on a CPU they are; on CUDA they have to be asked for."""

import os

import torch

from harness.arguments import FLAG


def add_argument(parser):
    parser.add_argument("--deterministic", **FLAG,
        help="use algorithms alone that give the same bits in every run on this GPU; slower")  # fmt: skip


def apply(args):
    """Do what `--deterministic` asks for. To be called before anything has used the GPU."""
    if args.deterministic:
        # cuBLAS reads it when it is first used; without it torch refuses its matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
