"""The order in which samples are seen, and how worker processes load them.

Order and randomness depend only on (seed, epoch, index): a run has the same batches with any number of workers or
processes, and a resumed run needs no saved loader.
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
    """The number of samples per process in a full batch: of `batch_size`, or all `samples`, split over `processes`."""
    return max(1, min(batch_size, samples) // processes)


class EpochBatches(torch.utils.data.Sampler):
    """A batch sampler over `size` samples, shuffled anew in each epoch, that yields lists of (epoch, index).

    The dataset's `__getitem__` takes such a pair, so that even a persistent worker knows the epoch. Each of world_size
    processes gets its share of every global batch of `batch_size`. The last batch of an epoch may be smaller. If it has
    fewer samples than there are processes, those without one get a placeholder of weight 0.
    """

    def __init__(self, size, batch_size, seed, rank=0, world_size=1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def start(self, epoch, first=0):
        """Choose the epoch that the next iteration yields, starting at batch number `first`."""
        self.epoch, self.first = epoch, first

    def __len__(self):
        return -(-self.size // self.batch_size) - self.first

    def samples_from(self, first):
        """The number of samples, over all processes, in the batches from number `first` on."""
        return max(0, self.size - first * self.batch_size)

    def ends_update(self, number):
        """Whether the weights are updated after batch `number`; a run can stop only after an update."""
        return True

    def order(self):
        """This epoch's permutation of the sample indices, int64 [size]."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.size)

    def batches(self):
        """Yield this process's sample indices of each batch, int64 [n] with n >= 1."""
        order = self.order()
        for start in range(self.first * self.batch_size, self.size, self.batch_size):
            batch = order[start : start + self.batch_size]
            share = batch[self.rank :: self.world_size]
            yield share if len(share) else batch[:1]

    def __iter__(self):
        for batch in self.batches():
            yield [(self.epoch, int(index)) for index in batch]

    def weight(self, number):
        """The factor for this process's mean loss over batch `number` that makes the mean over the processes the mean
        over the global batch; 1.0 if the shares are equal."""
        batch = min(self.batch_size, self.size - number * self.batch_size)
        share = len(range(self.rank, batch, self.world_size))
        return share * self.world_size / batch


def worker_loader(dataset, batches, num_workers, device, collate=None, say=print):
    """A DataLoader over `dataset` in the order of the EpochBatches `batches`: pinned memory for CUDA, persistent
    workers, four batches prefetched by each. collate: makes a batch from a list of samples; None stacks tensors. say:
    receives the warning about more workers than cores."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # PyTorch's version is printed twice, and is long.
    if num_workers > usable_cores():
        say(f"--num_workers {num_workers}: more workers than the {usable_cores()} cores here; they will share them")
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
    # Ctrl-C reaches the whole process group, but only the main process decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    # A thread here passes tensors to the main process. If that one ends meanwhile, it reports why; the worker stays
    # silent.
    usual = sys.excepthook
    sys.excepthook = lambda kind, *more: None if issubclass(kind, ConnectionError) else usual(kind, *more)
    # If that thread has no room for a batch, the queue would only report and drop it, and the main process would wait
    # forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))
