"""The job that a process belongs to: what torchrun tells it through environment variables. Without torch."""

import os
from typing import NamedTuple

from harness.endings import UserError

JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")


class Job(NamedTuple):
    """What torchrun tells a process through environment variables. is_started: whether it started this one."""

    is_started: bool
    rank: int
    local_rank: int
    size: int
    local_size: int


def read_job():
    """The Job of this process; UserError if its variables are left over from another job or inconsistent."""
    told = {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ}
    if not told:
        return Job(False, 0, 0, 1, 1)
    try:
        rank, size, local_rank, local_size = (int(told[name]) for name in JOB_VARIABLES)
        fit = 0 <= local_rank <= rank < size and local_rank < local_size <= size
        fit = fit and os.environ["MASTER_ADDR"] and 0 < int(os.environ["MASTER_PORT"]) < 2**16
    except (KeyError, ValueError):
        fit = False
    if not fit:
        told |= {name: os.environ[name] for name in MEETING_VARIABLES if name in os.environ}
        words = " ".join(f"{name}={value}" for name, value in told.items())
        raise UserError(
            f"the environment has {words}, which torchrun never sets like this; unset {', '.join(told)}, or start the "
            "script with torchrun"
        )
    return Job(True, rank, local_rank, size, local_size)


def refuse_job():
    """UserError under torchrun, for a script that would repeat all its work in each process."""
    if read_job().size > 1:
        raise UserError("this script runs in a single process; start it with python3 instead of torchrun")
