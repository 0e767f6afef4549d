"""Trained weights in a file: the model that they belong to, and what the record next to them says of their run."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from harness.arguments import LEAST_DEVIATION
from harness.endings import UserError, printable
from harness.resume import read_tensors
from harness.shapes import NUMBER, TEXT, WHOLE, each, fault, maybe
from models.grouped_convolution import FORMS
from models.resnext import ResNeXt
from picture_files import LARGEST


def _three_numbers(least):
    def valid(value):
        return fault(value, each(list, NUMBER)) is None and len(value) == 3 and least <= min(value) <= max(value) <= 1

    return f"three numbers from {least:g} to 1", valid


def _all_differ(value):
    return fault(value, each(list, TEXT)) is None and len(set(value)) == len(value)


# What the record may say that is needed to use the weights.
SIDE = (f"a multiple of 8 up to {LARGEST}", lambda value: WHOLE[1](value) and value % 8 == 0 and value <= LARGEST)
DATASET = ("a known data set", lambda value: value in ("cifar10", "digits", "folder"))
HALF = ("float16 or bfloat16", lambda value: value in ("float16", "bfloat16"))
RECORD = {
    "arguments": {"batch_size": maybe(WHOLE), "half_precision": maybe(HALF), "dataset": maybe(DATASET),
                  "data_dir": maybe(TEXT)},
    "epochs": maybe(each(list, {"test_acc": maybe(NUMBER)})),
    "machine": maybe({"hardware": maybe(TEXT)}),
    "precision": maybe(TEXT),
    "data": maybe({"classes": maybe(("a list of different names", _all_differ)), "mean": maybe(_three_numbers(0)),
                   "std": maybe(_three_numbers(LEAST_DEVIATION)), "size": maybe(SIDE)}),
    "weights_digest": maybe(TEXT),
    "init": maybe({"weights_digest": maybe(TEXT)}),
    "layout": maybe({"form": maybe(("a known form", lambda value: value in [*FORMS]))}),
}  # fmt: skip
PREFIXES = ("module.", "_orig_mod.")  # Added by DataParallel and the like, and by torch.compile.


def read_weights(path):
    """{name: tensor on the CPU} from the file `path`: a run's .pt, or what pytorch-cifar saves. UserError if it holds
    anything else; it cannot run code."""
    if Path(path).is_fifo():  # Opening it would wait forever.
        raise no_weights(path)
    try:
        weights = read_tensors(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; choose the .pt file of a run") from None
    except Exception:  # torch.load may raise any exception on a foreign file.
        raise no_weights(path) from None
    if isinstance(weights, dict):
        weights = weights.get("net", weights)  # Where pytorch-cifar keeps the weights.
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise no_weights(path)
    for prefix in PREFIXES:
        weights = {str(name).removeprefix(prefix): value for name, value in weights.items()}
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: the weights {name} contain NaN or infinity; choose another")
    return weights


def weights_digest(path):
    """A hash of a weights file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def no_weights(path):
    return UserError(f"{path} has no ResNeXt-29 weights; choose the .pt file of a run")


def load_model(path):
    """The ResNeXt whose weights are in the file `path`, on the CPU; their shapes determine the model."""
    weights = read_weights(path)
    try:
        channels, bottleneck_width = weights["layer1.0.conv2.weight"].shape[:2]
        model = ResNeXt(channels // bottleneck_width, bottleneck_width, len(weights["linear.weight"]))
        model.load_state_dict(weights)
    except (KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError):
        raise no_weights(path) from None
    return model.eval()


def start_from(path, model, classes, say):
    """Load the weights in the file `path` into `model`, which distinguishes `classes` (names). If the weights are for
    other classes, or that is uncertain, the last layer keeps its own weights, with a message.

    Returns what the run's record says of it: the file's digest, whether the record beside it is of other weights, and
    whether the last layer is new.
    """
    weights, own = read_weights(path), model.state_dict()
    record = read_record(Path(path))
    digest, is_foreign = weights_digest(path), is_of_other_weights(record, path)
    there = None if is_foreign else record.get("data", {}).get("classes")
    layer = weights.get("linear.weight", torch.zeros(0))
    count = len(layer) if layer.ndim else 0
    is_new = is_foreign or count != len(classes) or there not in (None, classes)
    if is_foreign:
        warn_of_other_weights(path, "the last layer starts from random weights")
    elif is_new:
        say(
            f"--init {path}: trained on {count} other classes than the {len(classes)} here; the last layer starts from "
            "random weights"
        )
    elif there is None:
        say(f"--init {path}: no record gives its {count} classes; assuming that they are those here")
    if is_new:
        weights |= {name: own[name] for name in ("linear.weight", "linear.bias")}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"--init {path} does not fit this model; choose another, or another --model") from None
    return {"weights_digest": digest, "record_of_other_weights": is_foreign, "new_last_layer": is_new}


def check_start(path, facts):
    """UserError if the weights in the file `path` are not those that a run with `facts`, from its record or state,
    started from. The file may be gone: nothing of it is needed any more."""
    known = facts.get("init", {}).get("weights_digest")
    if known and Path(path).is_file() and weights_digest(path) != known:
        raise UserError(
            f"--init {path} has other weights than those that the run to resume started from; put the old ones back, "
            "or --restart starts from these"
        )


def is_of_other_weights(record, path):
    """Whether the record beside the weights `path` says that it is of others."""
    return record.get("weights_digest") not in (None, weights_digest(path))


def warn_of_other_weights(path, consequence):
    """Print a warning on stderr that the record beside the weights `path` is of others, and what follows from that."""
    if os.environ.get("RANK", "0") == "0":  # Each process of torchrun loads them.
        record = Path(path).with_suffix(".json")
        told = printable(f"warning: {record} is the record of other weights than {path}; {consequence}")
        print(told, file=sys.stderr)


def read_record(path):
    """The record next to the weights `path`, a dict with "arguments"; {} if there is none; UserError if it is not a
    record of the ResNeXt scripts."""
    path = path.with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        record = None
    wrong = fault(record, RECORD)
    if wrong:
        raise UserError(f"{path} is not a record of a run ({wrong}); correct it, or move it away")
    return _without_null(record)


def _without_null(value):
    """A dict, and those in it, without null values, which mean the same as missing ones."""
    if not isinstance(value, dict):
        return value
    return {name: _without_null(part) for name, part in value.items() if part is not None}
