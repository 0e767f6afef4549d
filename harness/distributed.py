"""One process or many: what the scripts need under `torchrun`, and what they get without it."""

import contextlib
import datetime
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from harness.endings import UserError

# Of the collectives of training: a process that has not come by then hangs.
TRAINING_TIMEOUT = datetime.timedelta(minutes=10)
# Of waiting for a process that works alone: it may download, or tokenize a large data set.
PATIENCE = datetime.timedelta(days=1)
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class World(NamedTuple):
    """patient: the process group, of gloo, in which processes wait for one that works alone; None for one process."""

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
            tqdm.write(" ".join(map(str, words)))  # Above a progress bar that is there.
            sys.stdout.flush()

    def check_divisible(self, batch_size):
        """UserError when a global batch cannot be shared out equally over the processes."""
        if batch_size % self.size:
            raise UserError(
                f"--batch_size {batch_size} is shared out over {self.size} processes; make it a multiple of {self.size}"
            )

    def wrap(self, model):
        """`model` under DistributedDataParallel when there are many processes, else as it is."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            # Training reads no buffer; `broadcast_buffers` gives the main process's to all before they are used.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # No second copy of all gradients.
        )

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
        """Wait until every process has come here, as long as `patient` does."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def main_first(self):
        """A context: the block runs in the main process first, then in the others.

        Where it fails, that process tells why, and the others end quietly with exit code 2.
        """
        return self._first(self.is_main)

    def first_on_machine(self):
        """As `main_first`, but with one process of each machine before its others: it downloads, say."""
        return self._first(read_job().local_rank == 0)

    @contextlib.contextmanager
    def _first(self, is_first):
        if is_first:
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # The others are gone: still, the reason is told.
                    self._all(False)
                raise
        if not self._all(True):
            sys.exit(2)
        if not is_first:
            yield

    def _all(self, good):
        """Whether `good` is true in every process. Waits as long as `patient` does."""
        if self.size == 1:
            return good
        least = torch.tensor(int(good))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.patient)
        return bool(least)


def refuse_job():
    """UserError under torchrun, for a script that would do all its work in each process."""
    if read_job().size > 1:
        raise UserError("this script works in one process; start it with python3 in the place of torchrun")


class Job(NamedTuple):
    """What torchrun tells a process by environment variables. is_started: whether it started this one."""

    is_started: bool
    rank: int
    local_rank: int
    size: int
    local_size: int


def read_job():
    """The Job of this process; UserError when some of its variables are left over from another, or make no sense."""
    told = {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ}
    if not told:
        return Job(False, 0, 0, 1, 1)
    try:
        rank, size, local_rank, local_size = (int(told[name]) for name in JOB_VARIABLES)
        fit = 0 <= local_rank <= rank < size and local_rank < local_size <= size
        fit = fit and os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        fit = False
    if not fit:
        words = " ".join(f"{name}={value}" for name, value in told.items())
        raise UserError(
            f"the environment has {words}, which torchrun did not set so; unset {', '.join(told)}, or start the script "
            "by torchrun"
        )
    return Job(True, rank, local_rank, size, local_size)


@contextlib.contextmanager
def world(device):
    """Join the processes that torchrun started, if it did; a context that leaves them again.

    device: the torch.device of this process, as `devices.choose` gives it.
    """
    job = read_job()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not job.is_started:
        yield World(0, 1, device)
        return
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", timeout=TRAINING_TIMEOUT, device_id=device if on_cuda else None
    )
    yield World(job.rank, job.size, device, dist.new_group(backend="gloo", timeout=PATIENCE))
    # Not after an error: NCCL would wait for the others, which may wait for this process.
    dist.destroy_process_group()
