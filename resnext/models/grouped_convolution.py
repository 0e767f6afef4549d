"""A grouped convolution in three forms that compute the same result (Xie et al. 2017, figure 3, shows that the first
two are equivalent).

groups      one convolution with `groups`
separate    one convolution per group, with their outputs concatenated
dense       one convolution without groups and with a block-diagonal weight: more FLOPs, but an ordinary convolution

Which is fastest depends on device, layout and precision: benchmarks/layout.py measures the convolutions alone,
benchmarks/fast.py whole training steps.
"""

import torch
import torch.nn.functional as F
from torch import nn


def groups(x, weight, groups, **where):
    return F.conv2d(x, weight, groups=groups, **where)


def separate(x, weight, groups, **where):
    parts = zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)
    return torch.cat([F.conv2d(part, each, **where) for part, each in parts], 1)


def dense(x, weight, groups, **where):
    each, (inside, *kernel) = len(weight) // groups, weight.shape[1:]
    blocks = weight.new_zeros(groups, each, groups, inside, *kernel)
    diagonal = torch.arange(groups, device=weight.device)
    blocks[diagonal, :, diagonal] = weight.view(groups, each, inside, *kernel)
    whole = blocks.view(groups * each, groups * inside, *kernel)
    if x.is_contiguous(memory_format=torch.channels_last):
        whole = whole.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, whole, **where)


# function(x [N, C, H, W], weight [C', C / groups, k, k], groups, and conv2d's stride and padding) -> [N, C', H', W']
FORMS = {"groups": groups, "separate": separate, "dense": dense}


class GroupedConv2d(nn.Conv2d):
    """A Conv2d without bias that runs in `form`, a key of FORMS; its weight has the shape and name of Conv2d's."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, groups):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.form = "groups"

    def forward(self, x):
        return FORMS[self.form](x, self.weight, self.groups, stride=self.stride, padding=self.padding)


def set_form(model, form):
    """Make every GroupedConv2d of `model` run in `form`."""
    for layer in model.modules():
        if isinstance(layer, GroupedConv2d):
            layer.form = form
