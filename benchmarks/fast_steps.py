"""Training steps as resnext_fast.py takes them with any of its arguments, for benchmarks to time and to check."""

import itertools
import time

import numpy as np
import torch
import torch.nn.functional as F
from exactness import observed_weight
from resnext_fast import compiled, make_optimizer
from torch import nn
from torch.utils.data import DataLoader

from harness.devices import synchronize
from harness.distributed import World
from harness.loading import EpochBatches
from harness.memory import SavedBytes, reset_peak_memory
from harness.precision import choose_precision
from image_loaders import training_loader
from images import ImageData
from layouts import Layout, fastest, open_layouts
from models.resnext import ResNeXt, parse_name

WARM_UP = 2  # Steps, besides the one that is checked.


class TrainingSteps:
    """The training step of resnext_fast.py with the arguments `args`, again and again over full batches.

    first_pass: (logits, gradient) of the first batch before any update, as exactness.Exact compares them. saved_bytes:
    for backward. peak_bytes: of what a step needs, with the pictures of the device loader, weights and the optimizer's
    state; None without CUDA, and with CUDA graphs. loaded_ahead: of its loader.
    """

    def __init__(self, args, data, device):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else None
        self.device = device
        self.precision = choose_precision(args.half_precision, device, say=lambda line: None)
        layout = Layout(args.channels_last, args.grouped_convolution)
        self.layout = {"memory_format": layout.memory_format, "dtype": self.precision.dtype or torch.float32}
        torch.manual_seed(0)
        model = ResNeXt(*parse_name(args.model), num_classes=len(data.classes)).to(device)
        self.model = layout.apply(model)
        self.fast_model = compiled(model, args, layout.channels_last) if args.compile else model
        self.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        # Times need no progress.
        self.optimizer = make_optimizer(model, args.optimizer, args.lr / 100, device, self.precision.scaler)
        batches = LongEpochs(len(data.train_labels), args.batch_size, seed=0)
        loader = training_loader(args.loader, data, 0, batches, args.num_worker, device, **self.layout)
        self.loaded_ahead = loaded_ahead(loader)
        self.source = endless(loader, batches)
        self.first_pass, self.saved_bytes = self._first_pass()
        self.run(WARM_UP)
        reset_peak_memory(device)  # Not before: cuDNN tries algorithms in the first steps, some with much memory.
        self.run(1)
        # The memory of CUDA graphs does not count as allocated.
        known = before is not None and not args.cuda_graphs
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if known else None

    def _first_pass(self):
        """(logits, gradient) of plain cross-entropy on a first batch, and the bytes saved for backward."""
        images, labels = self._load()
        with self.precision.autocast(), SavedBytes(self.model) as saved:
            output = self.fast_model(images)
            loss = F.cross_entropy(output, labels)
        scaler = self.precision.scaler
        scaler.scale(loss).backward()
        gradient = observed_weight(self.model).grad / scaler.get_scale()
        # A copy: CUDA graphs write the next output to the same memory.
        return (output.detach().clone(), gradient), saved.bytes

    def _load(self):
        images, labels = next(self.source)
        images = images.to(self.device, non_blocking=True, **self.layout)
        return images, labels.to(self.device, non_blocking=True)

    def step(self):
        images, labels = self._load()
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            output = self.fast_model(images)
            loss = self.criterion(output, labels)
        self.precision.scaler.scale(loss).backward()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()

    def run(self, steps):
        """Train `steps` steps, with no batch loaded ahead when they start; returns their seconds."""
        for _ in range(self.loaded_ahead):
            next(self.source)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return time.perf_counter() - start


def fastest_layout(args, device):
    """(the Layout that resnext_fast.py chooses here with its arguments `args`, {layout: milliseconds a picture})"""
    precision = choose_precision(args.half_precision, device)
    model = ResNeXt(*parse_name(args.model)).to(device)
    return fastest(model, open_layouts(None, None), precision, World(0, 1, device), args.batch_size, args.size)


def random_pictures(count, side):
    """ImageData of noise, with flips, as large as CIFAR-10 with `count` 50,000 and `side` 32: for what takes time."""
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (count, side, side, 3), dtype=np.uint8), draws.integers(0, 10, count)
    return ImageData(images, labels, images[:100], labels[:100], [str(label) for label in range(10)], flip=True)


def loaded_ahead(loader):
    """How many batches the worker processes of a loader have ready when they have had the time; 0 without workers."""
    return loader.num_workers * (loader.prefetch_factor or 0) if isinstance(loader, DataLoader) else 0


class LongEpochs(EpochBatches):
    """EpochBatches over `size` samples, again and again until an epoch is as long as CIFAR-10's; all are full.

    As an epoch begins, nothing is loaded ahead: epochs of a few batches would charge that to every few steps.
    """

    def __init__(self, size, batch_size, seed):
        self.samples = size
        super().__init__(max(50_000, size) // batch_size * batch_size, batch_size, seed)

    def order(self):
        return super().order() % self.samples


def endless(loader, batches):
    for epoch in itertools.count():
        batches.start(epoch)
        yield from loader
