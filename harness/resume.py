"""Saved training states: what a run needs to continue exactly where it was, and how to stop so that it can."""

import contextlib
import errno
import json
import os
import signal

import torch

from harness.arguments import FLAG
from harness.endings import TERMINATING, Terminated, UserError, leave_terminal
from harness.files import as_recorded, atomic_write

FORMAT = 1


def add_arguments(parser):
    """--resume and --restart: what to do with the files of an earlier run of the same name."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", **FLAG, help="continue where a run with these arguments was interrupted or a shorter one ended")
    add("--restart", **FLAG, help="start over, and replace the files of an earlier run")


def save_state(path, arguments, **parts):
    """Write a training state to `path`, atomically.

    arguments: a dict of plain values that a resumed run must share. parts: state dicts, tensors and plain values that
    `torch.load(weights_only=True)` can read. The states of torch's random number generators are added; no others are
    used here.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random = {"cpu": torch.get_rng_state(), "cuda": cuda}
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "arguments": arguments, "random": random, "parts": parts}, file)


def read_tensors(path, **how):
    """What torch.save wrote to `path`: tensors, on the CPU, and plain values. Code in the file is never run.

    how: arguments of torch.load; with mmap=True, unused tensors are not read. OSError if the file cannot be read; any
    other exception if it is foreign or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **how)
    except OSError as error:
        if error.errno == errno.EINVAL:  # In a truncated file, torch looks for a place before the start.
            raise ValueError(f"{path} is truncated") from None
        raise


def read_state(path, **how):
    """What save_state wrote to `path`, a dict of "arguments", "random" and "parts"; None if there is no file.

    how: as for `read_tensors`. UserError if the file is not a training state or is truncated.
    """
    try:
        state = read_tensors(path, **how)
        ours = isinstance(state, dict) and state.get("format") == FORMAT
        ours = ours and {"arguments", "random", "parts"} <= state.keys()
        ours = ours and isinstance(state["arguments"], dict) and isinstance(state["parts"], dict)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the saved state {path}: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception:  # torch.load may raise any exception on a foreign file.
        ours = False
    if not ours:
        raise no_state(path)
    return state


def recorded_arguments(path, whole=True):
    """The arguments in the record of a run at `path`, a dict; None if there is no record, or if `whole` and --max_steps
    cut the run short."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        arguments = {"num_epoch": None} | record["arguments"] | {"precision": record.get("precision")}
        arguments = as_recorded(arguments, record.get("places"))
        # An epoch that was cut short has no results.
        cut_short = arguments.get("max_steps") and "loss" not in record["epochs"][-1]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
    return None if cut_short and whole else arguments


def refuse_unknown(record, weights, elsewhere):
    """UserError if the file `record` is not a record of a run, or if it is missing and one of the files `weights`
    exists."""
    if record.exists():
        unknown = [record] if recorded_arguments(record, whole=False) is None else []
    else:
        unknown = [path for path in weights if path.exists()]
    if unknown:
        raise UserError(
            f"{unknown[0]} already exists, and no record says which run it is from; move it away, choose another "
            f"{elsewhere}, or --restart to replace it"
        )


def is_interrupted(saved, finished):
    """Whether a state, as from `read_state`, is not the final one of the run with the arguments `finished`."""
    return saved is not None and not (finished and saved["parts"].get("epoch") == finished["num_epoch"])


def place_of(saved):
    """(epoch, step), from 0, at which a state continues."""
    return saved["parts"].get("epoch", 0), saved["parts"].get("step", 0)


def load_state(path, arguments):
    """The `parts` that save_state wrote, after restoring the random number generators; None if there is no file.

    UserError as for read_state, and if the state was saved with other arguments (which it names).
    """
    state = read_state(path)
    if state is None:
        return None
    check_arguments(path, state["arguments"], arguments)
    try:
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
    except (KeyError, RuntimeError, TypeError):
        raise no_state(path) from None
    return state["parts"]


def no_state(path):
    return UserError(
        f"{path} is not a complete training state of this program; delete it, or use --restart to start over"
    )


def check_arguments(path, saved, arguments):
    """UserError naming each argument in which the run of `path` differed; both are dicts of plain values."""
    was = changes(saved, arguments)
    if was:
        raise UserError(f"{path} was saved with {was}; resume with the same arguments, or delete it")


def changes(saved, arguments):
    """ "--lr 0.1 (now 0.2), ...": the differences between two dicts of plain values; "" if there are none.

    A flag that one of them lacks counts as off: it is newer than that run, or gone since.
    """
    both = sorted({*saved, *arguments})
    off = {name for name in both if not (name in saved and name in arguments) and {**saved, **arguments}[name] is False}
    changed = [name for name in both if saved.get(name) != arguments.get(name) and name not in off]
    return ", ".join(f"--{name} {saved.get(name)} (now {arguments.get(name)})" for name in changed)


class StopRequest:
    """Whether training has to stop early: `if stop: ...`.

    signal: the SIGINT, SIGTERM or SIGHUP that has arrived, or None. error: the OSError of a line that could not be
    printed, or None. enough: whether the steps of --max_steps are done.
    """

    def __init__(self):
        self.signal, self.error, self.enough = None, None, False

    def __bool__(self):
        return self.is_early or self.enough

    @property
    def is_early(self):
        """Whether training is to go on later."""
        return self.signal is not None or self.error is not None

    def leave(self, *words):
        """End the script as the signal would have, with exit code 130, 143 or 129; `words` tell the user how to
        continue. UserError if it was not a signal."""
        if self.signal is None:
            reason = f"cannot write to the standard output ({self.error.strerror})"
            raise UserError("; ".join([reason, *words])) from None
        raise KeyboardInterrupt(*words) if self.signal == signal.SIGINT else Terminated(self.signal, *words)


@contextlib.contextmanager
def stop_requests(enabled=True):
    """Within the block, the first SIGINT, SIGTERM or SIGHUP only sets the StopRequest that is yielded, so that the loop
    can finish its step and save; a second one interrupts at once.

    With enabled=False signals interrupt at once: the processes of one job would stop at different steps and wait for
    each other. They can resume from the state saved after the last epoch.
    """
    stop = StopRequest()
    if not enabled:
        yield stop
        return

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATING)}
    # Ignored signals stay ignored: a shell script's background jobs ignore SIGINT.
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    process = os.getpid()

    def request(number, frame):
        if os.getpid() != process:  # A forked data worker inherits this handler; it ends with its parent.
            return
        stop.signal = number
        leave_terminal(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
