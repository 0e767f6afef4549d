"""Which arithmetic a run uses, and what it is really called."""

import argparse
import dataclasses
import functools

import torch

from harness.machine import multiplies_bfloat16

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}  # By a Precision's label.
NO_INSTRUCTIONS = "; this CPU has no bfloat16 instructions: it saves memory but takes longer"


def half_precision_type(text, unnamed="float16"):
    """An argparse type for `--half_precision [float16|bfloat16|True|False]`; None means single precision.

    unnamed: the result if no type is named.
    """
    text = text.lower()
    if text in ("false", "none", "no", "0"):
        return None
    names = dict.fromkeys(("true", "yes", "1", "auto"), unnamed)
    names |= {"float16": "float16", "fp16": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16"}
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is neither float16 nor bfloat16")
    return names[text]


def add_half_precision(parser, help, unnamed="float16", **more):
    """Add `--half_precision` to an argument parser or group.

    unnamed: its value if no type is named; "auto" for a script that chooses by the model. more: further arguments of
    `add_argument`.
    """
    kind, options = functools.partial(half_precision_type, unnamed=unnamed), {"metavar": "float16|bfloat16"} | more
    parser.add_argument("--half_precision", type=kind, nargs="?", const=unnamed, help=help, **options)


@dataclasses.dataclass
class Precision:
    """label: "fp32", "tf32", "fp16" or "bf16"; dtype: the autocast dtype, or None; scaler: a GradScaler, enabled only
    for float16."""

    label: str
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    device_type: str

    def autocast(self):
        """The context in which forward runs (Micikevicius et al. 2018, "Mixed Precision Training")."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)


def choose_precision(half_precision, device, true_fp32=False, say=print):
    """The Precision of a run on `device`.

    half_precision: None, "float16", "bfloat16", or "auto", which means float16. On a CPU float16 becomes bfloat16, the
    only half precision that CPUs may be fast in, and `say` reports it. true_fp32: disables TensorFloat-32 for
    convolutions and matrix products.
    """
    if half_precision and device.type == "cpu":
        slow = NO_INSTRUCTIONS * (not multiplies_bfloat16())
        if slow or half_precision != "bfloat16":
            say(f"half precision on a CPU is bfloat16{slow}")
        half_precision = "bfloat16"
    if device.type == "cuda" and true_fp32:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    dtype = {None: None, "auto": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}[half_precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Precision(_label(dtype, device), dtype, scaler, device.type)


def explain_half_precision(label, device):
    """Whether a run with the Precision `label` on `device` uses half precision, and why, as text."""
    slow = device.type == "cpu" and not multiplies_bfloat16()
    if label in HALF:
        return f"half precision on ({label}{', slow on this CPU' * slow})"
    return f"half precision off ({'slow on this CPU' if slow else '--half_precision'})"


def _label(dtype, device):
    if dtype is not None:
        return next(label for label, each in HALF.items() if each == dtype)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return "fp32"
