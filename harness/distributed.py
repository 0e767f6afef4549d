"""One process or many: what the scripts need under `torchrun`, and the equivalents without it."""

import contextlib
import datetime
import os
import socket
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from harness.endings import UserError, signals_end_at_once
from harness.job import MEETING_VARIABLES, read_job

# For training collectives: a process that has not arrived by then hangs.
TRAINING_TIMEOUT = datetime.timedelta(minutes=10)
# For waiting for a process that works alone: it may download, or tokenize a large data set.
PATIENCE = datetime.timedelta(days=1)
# One a second: in a cluster, the main machine's name may become known after this process starts.
TRIES_FOR_ADDRESS = 30


class World(NamedTuple):
    """patient: the gloo process group for waiting for a process that works alone; None for a single process."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None

    @property
    def is_main(self):
        """True in the one process that prints and writes."""
        return self.rank == 0

    def say(self, *words):
        if self.is_main:
            tqdm.write(" ".join(map(str, words)))  # Prints above a progress bar, if there is one.
            sys.stdout.flush()

    def check_divisible(self, batch_size):
        """UserError if a global batch cannot be split equally over the processes."""
        if batch_size % self.size:
            raise UserError(
                f"--batch_size {batch_size} cannot be split equally over {self.size} processes; choose a multiple of "
                f"{self.size}"
            )

    def wrap(self, model):
        """`model` under DistributedDataParallel if there are several processes, else unchanged."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            # Training does not read buffers; `broadcast_buffers` synchronizes them before they are used.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # No second copy of all gradients.
        )

    def sum(self, tensor):
        """Sum `tensor` over all processes, in place; every process gets the sum."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_buffers(self, model):
        """Give every process the main one's buffers, since each has seen its own share of the images."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def check_equal(self, value, what):
        """UserError in every process if the int or bool `value` is not the same in all of them."""
        if self.size > 1:
            least = torch.tensor([int(value), -int(value)], device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            if least.sum() != 0:
                raise UserError(f"the processes of this job do not agree on {what}")

    def barrier(self):
        """Wait until every process has arrived, with the timeout of `patient`."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def main_first(self):
        """A context: the block runs in the main process first, then in the others.

        If it fails there, that process reports why, and the others end silently with exit code 2.
        """
        return self._first(self.is_main)

    def first_on_machine(self):
        """Like `main_first`, but on each machine one process runs before its others, for example to download."""
        return self._first(read_job().local_rank == 0)

    @contextlib.contextmanager
    def _first(self, is_first):
        if is_first:
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # If the others are gone, the reason is still reported.
                    self._all(False)
                raise
        if not self._all(True):
            sys.exit(2)
        if not is_first:
            yield

    def _all(self, good):
        """Whether `good` is true in every process. Waits with the timeout of `patient`."""
        if self.size == 1:
            return good
        least = torch.tensor(int(good))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.patient)
        return bool(least)


@contextlib.contextmanager
def world(device):
    """Join the processes that torchrun started, if any, and leave them when the context ends.

    device: the torch.device of this process, from `devices.choose`.
    """
    job = read_job()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not job.is_started:
        yield World(0, 1, device)
        return
    with signals_end_at_once():
        patient = _meet(device)
    yield World(job.rank, job.size, device, patient)
    # Not after an error: NCCL would wait for the others, which may be waiting for this process.
    dist.destroy_process_group()


def _find_address(address, port):
    """UserError if the name `address` is still unknown after some tries: torch would try until the timeout."""
    for left in reversed(range(TRIES_FOR_ADDRESS)):
        try:
            socket.getaddrinfo(address, port)
            return
        except (socket.gaierror, UnicodeError) as error:  # The latter of what cannot be a name.
            if not left or isinstance(error, UnicodeError):
                raise UserError(
                    f"the processes of this job cannot meet at {address}, port {port} (there is no such address: "
                    f"{error}); correct MASTER_ADDR"
                ) from None
        time.sleep(1)


def _meet(device):
    """Wait for the other processes of the job, and join them: the group `World.patient`. Where they cannot meet,
    `endings.explain` has the line for torch's error."""
    _find_address(*(os.environ[name] for name in MEETING_VARIABLES))
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", timeout=TRAINING_TIMEOUT, device_id=device if on_cuda else None
    )
    return dist.new_group(backend="gloo", timeout=PATIENCE)
