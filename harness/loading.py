"""In which order samples are seen, and how worker processes load them.

Order and randomness are functions of (seed, epoch, index) alone: the same run has the same batches with any number of
workers or processes, and a resumed run needs no saved loader.
"""

import multiprocessing.queues
import os
import signal
import sys
import warnings

import numpy as np
import torch
from torch.utils.data import DataLoader

from harness.machine import usable_cores


def largest_batch(samples, batch_size, processes):
    """How many samples a process has in a batch of `batch_size` over all `processes`, of which there are `samples`."""
    return max(1, min(batch_size, samples) // processes)


class EpochBatches(torch.utils.data.Sampler):
    """A batch sampler over `size` samples, shuffled anew each epoch, that yields lists of (epoch, index).

    The dataset's `__getitem__` takes such a pair, so that even a persistent worker knows the epoch. With world_size
    processes each gets its share of every global batch of `batch_size`. The last batch of an epoch may be smaller.
    Where it is too small for every process to have a sample, the ones without get a stand-in of weight 0.
    """

    def __init__(self, size, batch_size, seed, rank=0, world_size=1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def start(self, epoch, first=0):
        """Choose the epoch that the next iteration yields, from batch number `first` on."""
        self.epoch, self.first = epoch, first

    def __len__(self):
        return -(-self.size // self.batch_size) - self.first

    def samples_from(self, first):
        """How many samples, over all processes, the batches from number `first` on hold."""
        return max(0, self.size - first * self.batch_size)

    def ends_update(self, number):
        """Whether the weights are updated after batch `number`: between updates no run can stop."""
        return True

    def order(self):
        """This epoch's permutation of the sample numbers, int64 [size]."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.size)

    def batches(self):
        """Yield this process's sample numbers of each batch, int64 [n] with n >= 1."""
        order = self.order()
        for start in range(self.first * self.batch_size, self.size, self.batch_size):
            batch = order[start : start + self.batch_size]
            share = batch[self.rank :: self.world_size]
            yield share if len(share) else batch[:1]

    def __iter__(self):
        for batch in self.batches():
            yield [(self.epoch, int(index)) for index in batch]

    def weight(self, number):
        """What this process's mean loss over batch `number` must be multiplied by, so that the mean over the processes
        is the mean over the global batch; 1.0 whenever the shares are equal."""
        batch = min(self.batch_size, self.size - number * self.batch_size)
        share = len(range(self.rank, batch, self.world_size))
        return share * self.world_size / batch


def worker_loader(dataset, batches, num_workers, device, collate=None, say=print):
    """A DataLoader over `dataset` in the order of the EpochBatches `batches`: pinned memory for CUDA, persistent
    workers, four batches ahead of each. collate: makes a batch of a list of samples; None stacks tensors. say: takes
    the line that tells of more workers than cores."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # Twice, and at length.
    if num_workers > usable_cores():
        say(f"--num_workers {num_workers}: more processes than the {usable_cores()} cores here; they take turns")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker):
    # Ctrl-C reaches the whole process group; the main process alone decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    # A thread here hands tensors to the main process; when that ends in between, it tells why, and not this.
    usual = sys.excepthook
    sys.excepthook = lambda kind, *more: None if issubclass(kind, ConnectionError) else usual(kind, *more)
    # Where that thread has no place for a batch, the queue would only say so and drop it: the main process would wait
    # for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))
