"""Trained weights in a file: the model that they are of, and what the record beside them says of their run."""

import json
import math
from pathlib import Path

import torch

from harness.endings import UserError
from models.grouped_convolution import FORMS
from models.resnext import ResNeXt

PARTS = ("data", "layout")  # Of a record, what is used beside its arguments.
PREFIXES = ("module.", "_orig_mod.")  # Of a model in DataParallel and the like, and in torch.compile.


def read_weights(path):
    """{name: tensor on the CPU} of the file `path`: a run's .pt, or what pytorch-cifar saves. UserError when it holds
    anything else; nothing in it can run code."""
    if Path(path).is_fifo():  # To open it would wait for ever.
        raise no_weights(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a run's .pt file") from None
    except Exception:  # What torch.load raises on a foreign file is an open set.
        raise no_weights(path) from None
    if isinstance(weights, dict):
        weights = weights.get("net", weights)  # Where pytorch-cifar keeps them.
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise no_weights(path)
    for prefix in PREFIXES:
        weights = {str(name).removeprefix(prefix): value for name, value in weights.items()}
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: its weights {name} are not all finite numbers; name others")
    return weights


def no_weights(path):
    return UserError(f"{path} holds no weights of a ResNeXt-29; name the .pt file of a run")


def load_model(path):
    """The ResNeXt whose weights lie in the file `path`, on the CPU; their shapes tell which it is."""
    weights = read_weights(path)
    try:
        channels, bottleneck_width = weights["layer1.0.conv2.weight"].shape[:2]
        model = ResNeXt(channels // bottleneck_width, bottleneck_width, len(weights["linear.weight"]))
        model.load_state_dict(weights)
    except (KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError):
        raise no_weights(path) from None
    return model.eval()


def start_from(path, model, classes, say):
    """Give `model`, which tells `classes` (names) apart, the weights in the file `path`, unless that is None. Its last
    layer stays as it is where the weights are of other classes, which is said."""
    if path is None:
        return
    weights, own = read_weights(path), model.state_dict()
    there = read_record(Path(path)).get("data", {}).get("classes", classes)
    count = len(weights.get("linear.weight", ()))
    if count != len(classes) or there != classes:
        say(f"--init {path}: its {count} classes are others than the {len(classes)} here; the last layer starts anew")
        weights |= {name: own[name] for name in ("linear.weight", "linear.bias")}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"--init {path} holds no weights of this model; name another, or another --model") from None


def read_record(path):
    """The record beside the weights `path`, a dict with "arguments"; {} when there is none, UserError when it is no
    record of the ResNeXt scripts."""
    path = path.with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(part, dict) for part in (record["arguments"], *(record.get(name, {}) for name in PARTS))):
            _check_record(path, record)
            return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no record of a run; mend it, or move it away")


def _check_record(path, record):
    """UserError where one of the facts that the weights are used by makes no sense."""
    data, settings, layout = (record.get(name, {}) for name in ("data", "arguments", "layout"))
    checks = {
        "classes": (data, lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value)),
        "mean": (data, lambda value: _are_channels(value)),
        "std": (data, lambda value: _are_channels(value) and min(value) > 0),
        "size": (data, lambda value: type(value) is int and value > 0 and value % 8 == 0),
        "batch_size": (settings, lambda value: type(value) is int and value > 0),
        "half_precision": (settings, lambda value: value in (None, "float16", "bfloat16")),
        "form": (layout, lambda value: value in FORMS),
    }
    for name, (part, is_good) in checks.items():
        if name in part and not is_good(part[name]):
            raise UserError(f"{path}: its {name} is {part[name]!r}; mend it, or move the record away")


def _are_channels(value):
    """Whether `value` has a finite number for each colour."""
    is_list = isinstance(value, list) and len(value) == 3
    return is_list and all(isinstance(each, (int, float)) and math.isfinite(each) for each in value)
