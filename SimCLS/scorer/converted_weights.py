"""Half precision without converting weights again and again.

Autocast converts a linear layer's weights at every call. It keeps the converted ones, until the forward pass ends, only
of weights that learn. So frozen layers, and in evaluation all layers, would be converted for each group of texts of
each batch. Here they are converted once, and again when their weights have changed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from search.products import product


def convert_once(module):
    """Let every linear layer in `module` keep its converted weights while it does not learn. Without autocast, and in
    layers that learn, nothing changes."""
    for linear in module.modules():
        if type(linear) is nn.Linear:
            linear.forward = ConvertedOnce(linear)


class ConvertedOnce:
    """The forward of `linear`. x: float [..., in]; returns [..., out], in autocast's type if that is on."""

    def __init__(self, linear):
        self.linear = linear
        self.multiply = self.made_of = None

    def __call__(self, x):
        weight, bias = self.linear.weight, self.linear.bias
        learns = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
        if learns or not torch.is_autocast_enabled(x.device.type):
            self.multiply = self.made_of = None  # The converted copy would only hold memory.
            return F.linear(x, weight, bias)
        dtype = torch.get_autocast_dtype(x.device.type)
        made_of = dtype, weight.data_ptr(), weight._version, None if bias is None else bias._version
        if self.made_of != made_of:
            biases = [] if bias is None else [bias.detach().to(dtype)]
            self.multiply, self.made_of = product(weight.detach().to(dtype), biases=biases), made_of
        return self.multiply(x.to(dtype))
