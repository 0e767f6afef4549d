"""Trained weights in a file: the model that they are of, and what the record beside them says of their run."""

import json
from pathlib import Path

import torch

from harness.arguments import LEAST_DEVIATION
from harness.endings import UserError
from models.grouped_convolution import FORMS
from models.resnext import ResNeXt
from reporting.shapes import NUMBER, TEXT, WHOLE, each, fault, is_number, maybe

# What the record of weights says of their use, as far as it says it.
CHANNELS = ("three numbers", lambda value: isinstance(value, list) and len(value) == 3 and all(map(is_number, value)))
DEVIATIONS = (f"three numbers of at least {LEAST_DEVIATION:g}",
              lambda value: CHANNELS[1](value) and min(value) >= LEAST_DEVIATION)  # fmt: skip
SIDE = ("a multiple of 8", lambda value: WHOLE[1](value) and value % 8 == 0)
DATASET = ("a known data set", lambda value: value in ("cifar10", "digits", "folder"))
HALF = ("float16 or bfloat16", lambda value: value in ("float16", "bfloat16"))
RECORD = {
    "arguments": {"batch_size": maybe(WHOLE), "half_precision": maybe(HALF), "dataset": maybe(DATASET),
                  "data_dir": maybe(TEXT)},
    "epochs": maybe(each(list, {"test_acc": maybe(NUMBER)})),
    "machine": maybe({"hardware": maybe(TEXT)}),
    "precision": maybe(TEXT),
    "data": maybe({"classes": maybe(each(list, TEXT)), "mean": maybe(CHANNELS), "std": maybe(DEVIATIONS),
                   "size": maybe(SIDE)}),
    "layout": maybe({"form": maybe(("a known form", lambda value: value in [*FORMS]))}),
}  # fmt: skip
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
    layer = weights.get("linear.weight", torch.zeros(0))
    count = len(layer) if layer.ndim else 0
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
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        record = None
    wrong = fault(record, RECORD)
    if wrong:
        raise UserError(f"{path} is no record of a run ({wrong}); mend it, or move it away")
    return _without_null(record)


def _without_null(value):
    """A dict, and those in it, without what is null, which says as little as what is not there."""
    if not isinstance(value, dict):
        return value
    return {name: _without_null(part) for name, part in value.items() if part is not None}
