"""ResNeXt for small images (Xie et al. 2017, "Aggregated Residual Transformations for Deep Neural Networks").

Three stages of three bottleneck blocks, 29 layers, as in pytorch-cifar (github.com/kuangliu/pytorch-cifar), with the
same parameter counts and state dict keys.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from models.grouped_convolution import GroupedConv2d

EXPANSION = 2  # Output channels of a block per channel of its grouped convolution.
BLOCKS = (3, 3, 3)
NAME = re.compile(r"resnext29_([1-9]\d{0,3})x([1-9]\d{0,3})d")


class Shortcut(nn.Conv2d):
    """The 1x1 convolution of a shortcut, [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride]."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x):
        # In channels last with few channels, oneDNN writes past its workspace when it applies the stride itself
        # (uxlfoundation/oneDNN issue 6035), and images of 48x48 crash the process.
        if self.in_channels < 16 and x.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight)
        return super().forward(x)


class Block(nn.Module):
    """1x1 convolution, grouped 3x3, 1x1, and a shortcut around the three.

    forward: [N, in_channels, H, W] -> [N, EXPANSION * cardinality * bottleneck_width, H / stride, W / stride].
    """

    def __init__(self, in_channels, cardinality, bottleneck_width, stride):
        super().__init__()
        width = cardinality * bottleneck_width
        out_channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = GroupedConv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=cardinality)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(Shortcut(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ResNeXt(nn.Module):
    """forward: float [N, 3, H, W] -> logits [N, num_classes]."""

    block = Block

    def __init__(self, cardinality, bottleneck_width, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, blocks in enumerate(BLOCKS):
            width = bottleneck_width * 2**stage
            layer = nn.Sequential()
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                layer.append(self.block(channels, cardinality, width, stride))
                channels = EXPANSION * cardinality * width
            self.add_module(f"layer{stage + 1}", layer)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.shape[2:])
        return self.linear(out.flatten(1))


def parse_name(name):
    """(cardinality, bottleneck width) of a name such as "resnext29_4x64d"; ValueError for any other."""
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is not of the form resnext29_{{cardinality}}x{{width}}d, as in resnext29_4x64d")
    return int(match[1]), int(match[2])
