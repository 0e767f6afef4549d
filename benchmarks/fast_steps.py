"""The training steps of resnext_fast.py, with any of its arguments, for benchmarks to time and check."""

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

# resnext_fast.py as resnext.py trains.
ORIGINAL = (
    "--loader workers --num_workers 2 --half_precision False --channels_last False --grouped_convolution groups "
    "--compile False --keep_memory False --optimizer adam --lr 0.01 --label_smoothing 0"
)
WARM_UP = 2  # Steps after the one that is checked.


class TrainingSteps:
    """Repeats the training step of resnext_fast.py, with its arguments `args`, over full batches.

    first_pass: (logits, gradient) of the first batch before any update, for exactness.Exact. saved_bytes: saved for
    backward. peak_bytes: the peak memory of a step, including the device loader's images, the weights and the optimizer
    state; None without CUDA, and with CUDA graphs. loaded_ahead: batches that the loader's workers load ahead.
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
        # A low learning rate: only times matter, not progress.
        self.optimizer = make_optimizer(model, args.optimizer, args.lr / 100, device, self.precision.scaler)
        batches = LongEpochs(len(data.train_labels), args.batch_size, seed=0)
        loader = training_loader(args.loader, data, 0, batches, args.num_worker, device, **self.layout)
        self.loaded_ahead = loaded_ahead(loader)
        self.source = endless(loader, batches)
        self.first_pass, self.saved_bytes = self._first_pass()
        self.run(WARM_UP)
        reset_peak_memory(device)  # Only now: in the first steps cuDNN tries algorithms, some with much memory.
        self.run(1)
        # The memory of CUDA graphs is not counted as allocated.
        known = before is not None and not args.cuda_graphs
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if known else None

    def _first_pass(self):
        """((logits, gradient) of plain cross-entropy on the first batch, bytes saved for backward)"""
        images, labels = self._load()
        with self.precision.autocast(), SavedBytes(self.model) as saved:
            output = self.fast_model(images)
            loss = F.cross_entropy(output, labels)
        scaler = self.precision.scaler
        scaler.scale(loss).backward()
        gradient = observed_weight(self.model).grad / scaler.get_scale()
        # Cloned, since CUDA graphs write the next output to the same memory.
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
        """Discard the batches loaded ahead, then train `steps` steps; returns the seconds of the steps."""
        for _ in range(self.loaded_ahead):
            next(self.source)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return time.perf_counter() - start


def fastest_layout(args, device):
    """(the Layout that resnext_fast.py chooses here with its arguments `args`, {layout: milliseconds per image})"""
    precision = choose_precision(args.half_precision, device)
    model = ResNeXt(*parse_name(args.model)).to(device)
    return fastest(model, open_layouts(None, None), precision, World(0, 1, device), args.batch_size, args.size)


def random_pictures(count, side):
    """ImageData of noise, with flips, for timing; `count` 50,000 and `side` 32 make it as large as CIFAR-10."""
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (count, side, side, 3), dtype=np.uint8), draws.integers(0, 10, count)
    return ImageData(images, labels, images[:100], labels[:100], [str(label) for label in range(10)], flip=True)


def loaded_ahead(loader):
    """The most batches that a loader's worker processes load ahead; 0 without workers."""
    return loader.num_workers * (loader.prefetch_factor or 0) if isinstance(loader, DataLoader) else 0


class LongEpochs(EpochBatches):
    """EpochBatches that repeat `size` samples until an epoch is as long as CIFAR-10's; all batches are full.

    At the start of an epoch nothing is loaded ahead; with epochs of a few batches, that would slow every few steps.
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
