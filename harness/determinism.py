"""Bit-for-bit reproducible results: the default on a CPU; on CUDA they have to be requested."""

import os

import torch

from harness.arguments import FLAG


def add_argument(parser):
    parser.add_argument("--deterministic", **FLAG,
        help="use only algorithms that give the same bits in every run on this GPU; slower")  # fmt: skip


def apply(args):
    """Apply `--deterministic`. Call it before anything uses the GPU."""
    if args.deterministic:
        # cuBLAS reads it on first use; without it torch refuses matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
