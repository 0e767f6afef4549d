"""Whether a training step computes what it should: its first logits and a gradient, against those of a float64 run.

The loss at initialisation would not tell: it is ln 10 for whatever is computed. How far a type's rounding may move
logits and gradient is not guessed, either: the float64 run is done again with pictures, weights and what each layer
returns, forward and backward, rounded to that type. Steps in float16 and bfloat16 are as far off as that tells, to a
few percent.
"""

import copy
import functools

from common import check

import torch
import torch.nn.functional as F

from image_loaders import training_loader
from models.resnext import ResNeXt, parse_name

ALLOWED = 1.75  # Times as far as the simulated rounding. Even one missing ReLU is farther off than this in bfloat16.
# TensorFloat-32 has the digits of float16. So single precision is held to these, too: on a CPU BatchNorm sums channels
# last in one go, and is 100 times as far off as in the contiguous layout.
ROUNDED_TO = {"fp32": torch.float16, "tf32": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}
LOSS_SCALE = 2.0**16  # So that gradients do not vanish in float16; it scales them without rounding.


def observed_weight(model):
    """The parameter whose gradient is compared.

    One near the end, behind the last block: gradients farther down, through more BatchNorms, are noise in bfloat16.
    """
    return model.layer3[2].conv3.weight


class Exact:
    """Logits and gradient of the model `name` in float64, with the weights of seed 0, for a first batch as the
    original's way loads it.

    batches: the EpochBatches that the steps to be checked begin with, too.
    """

    def __init__(self, name, data, batches, device):
        images, self._labels = next(iter(training_loader("workers", data, 0, batches, 0, device)))
        self._images, self._labels = images.double().to(device), self._labels.to(device)
        torch.manual_seed(0)
        self._model = ResNeXt(*parse_name(name), num_classes=len(data.classes)).double().to(device)
        self._right = first_pass(self._model, self._images, self._labels)
        self.tolerances = functools.cache(self._tolerances)

    def check(self, name, precision, found):
        """AssertionError unless (logits [n, classes], gradient), `found` by the steps `name` in a precision of
        ROUNDED_TO, are those of float64 but for its rounding."""
        errors, allowed = self._errors(found), self.tolerances(ROUNDED_TO[precision])
        for what, error, most in zip(("logits", "gradient"), errors, allowed, strict=True):
            check(error <= most, f"{name}: its {what} are {error:.1e} from those in float64, {most:.1e} allowed")
        return errors

    def _errors(self, found):
        """Of logits and gradient, over what their rows differ by: pictures have much in common at initialisation."""
        pairs = zip(found, self._right, strict=True)
        return [float((ours.double() - right).norm() / (right - right.mean(0)).norm()) for ours, right in pairs]

    def _tolerances(self, dtype):
        model = copy.deepcopy(self._model)
        for layer in model.modules():
            if not any(layer.children()):
                layer.register_forward_hook(lambda layer, args, output: Rounded.apply(output, dtype))
        for weight in model.parameters():
            weight.data = weight.data.to(dtype).double() if weight.ndim > 1 else weight.data
        found = first_pass(model, self._images.to(dtype).double(), self._labels)
        return [ALLOWED * error for error in self._errors(found)]


def first_pass(model, images, labels):
    """(logits, gradient of observed_weight) of `model` in float64."""
    logits = model(images)
    (gradient,) = torch.autograd.grad(LOSS_SCALE * F.cross_entropy(logits, labels), observed_weight(model))
    return logits.detach(), gradient / LOSS_SCALE


class Rounded(torch.autograd.Function):
    """The nearest numbers of another type, of a tensor and of its gradient."""

    @staticmethod
    def forward(context, x, dtype):
        context.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(context, gradient):
        return gradient.to(context.dtype).to(gradient.dtype), None
