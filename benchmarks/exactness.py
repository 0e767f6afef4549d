"""Checks that training steps are correct: compares the first logits and one gradient with those of a float64 run.

The loss at initialisation would show nothing: it is about ln 10 whatever is computed. The error that a dtype's rounding
may cause is simulated, not guessed: the float64 run is repeated with the images, the weights and every layer's outputs
and gradients rounded to that dtype. Correct steps in float16 and bfloat16 have this error, to within a few percent.
"""

import copy
import functools

from common import check

import torch
import torch.nn.functional as F

from image_loaders import training_loader
from models.resnext import ResNeXt, parse_name

ALLOWED = 1.75  # Times the error of the simulated rounding. In bfloat16, even one missing ReLU causes more than this.
# TensorFloat-32 has as many mantissa bits as float16. fp32 has the same bound: on a CPU, BatchNorm sums a channels-last
# tensor sequentially, with 100 times the error of the contiguous layout.
ROUNDED_TO = {"fp32": torch.float16, "tf32": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}
LOSS_SCALE = 2.0**16  # Keeps float16 gradients from underflowing; a power of two scales without rounding.


def observed_weight(model):
    """The parameter whose gradient is compared.

    It is in the last block: the gradients of earlier layers, through more BatchNorms, are noise in bfloat16.
    """
    return model.layer3[2].conv3.weight


class Exact:
    """Logits and gradient of the model `name` in float64, with the weights of seed 0, for the first batch, loaded as
    the original loads it.

    batches: EpochBatches equal to those of the steps to be checked.
    """

    def __init__(self, name, data, batches, device):
        images, self._labels = next(iter(training_loader("workers", data, 0, batches, 0, device)))
        self._images, self._labels = images.double().to(device), self._labels.to(device)
        torch.manual_seed(0)
        self._model = ResNeXt(*parse_name(name), num_classes=len(data.classes)).double().to(device)
        self._right = first_pass(self._model, self._images, self._labels)
        self.tolerances = functools.cache(self._tolerances)

    def check(self, name, precision, found):
        """Raise AssertionError unless `found` equals the float64 result up to the rounding of `precision`.

        name: of the steps. precision: a key of ROUNDED_TO. found: (logits [n, classes], gradient). Returns the relative
        errors [of the logits, of the gradient].
        """
        errors, allowed = self._errors(found), self.tolerances(ROUNDED_TO[precision])
        for what, error, most in zip(("logits", "gradient"), errors, allowed, strict=True):
            check(error <= most, f"{name}: its {what} are {error:.1e} from those in float64, {most:.1e} allowed")
        return errors

    def _errors(self, found):
        """The errors of logits and gradient, relative to how much their rows vary: at initialisation, the rows of
        different images have a large part in common."""
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
    """Rounds a tensor, and in backward its gradient, to another dtype; both keep their own dtype."""

    @staticmethod
    def forward(context, x, dtype):
        context.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(context, gradient):
        return gradient.to(context.dtype).to(gradient.dtype), None
