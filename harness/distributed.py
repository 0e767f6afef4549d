"""One process or many: what the scripts need under `torchrun`, and what they get without it."""

import contextlib
import datetime
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from harness.command_line import UserError


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        """True in the one process that prints and writes."""
        return self.rank == 0

    def say(self, *words):
        if self.is_main:
            print(*words, flush=True)

    def share(self, batch_size):
        """The pictures of a global batch that fall to one process; UserError when they cannot be shared equally."""
        if batch_size % self.size:
            raise UserError(
                f"--batch_size {batch_size} is shared out over {self.size} processes; make it a multiple of {self.size}"
            )
        return batch_size // self.size

    def wrap(self, model):
        """`model` under DistributedDataParallel when there are many processes, else as it is."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def sum(self, tensor):
        """Add `tensor` up over all processes, in place; every process gets the sum."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_buffers(self, model):
        """Give every process the main one's buffers: each has seen its own share of the pictures."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def check_equal(self, value, what):
        """UserError in every process when the int or bool `value` is not the same in all of them."""
        if self.size > 1:
            least = torch.tensor([int(value), -int(value)], device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            if least.sum() != 0:
                raise UserError(f"the processes of this job do not agree on {what}")

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_on_machine(self):
        """The block runs in one process of each machine first (it downloads, say), then in the others.

        Where it fails, that process tells why, and the others end quietly with exit code 2.
        """
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            try:
                yield
            except BaseException:
                self._all(False)
                raise
            if not self._all(True):
                sys.exit(2)
        else:
            if not self._all(True):
                sys.exit(2)
            yield

    def _all(self, good):
        """Whether `good` is true in every process."""
        if self.size == 1:
            return good
        least = torch.tensor(int(good), device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return bool(least)


@contextlib.contextmanager
def world(device=None):
    """Join the processes that torchrun started, if it did; a context that leaves them again.

    device: a torch.device to use instead of CUDA when it is there, else the CPU.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"there is no GPU {device.index}: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield World(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
