"""Files that are either whole or not there, and records that describe themselves."""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from harness.command_line import UserError

PACKAGES = ("torch", "torchvision", "transformers", "numpy", "nvtx")


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`; rename it to `path` when the block ends without an exception.

    The data is on the disk before the rename, so a crash leaves the old file or the new one, never a half.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as file:
            writer = _Writer(file)
            try:
                yield writer
            except Exception as error:
                raise writer.error or error from None
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


class _Writer:
    """A file that remembers why it could not be written: torch.save hides an OSError behind a RuntimeError."""

    def __init__(self, file):
        self._file, self.error = file, None

    def write(self, data):
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name):
        return getattr(self._file, name)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN and infinity are an error: JSON has no word for them."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


@contextlib.contextmanager
def output_lock(path):
    """Hold the lock file `path`, so that a second run with the same output is refused (UserError).

    The kernel drops the lock when the process dies, however it dies. The empty file itself stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing {path.with_suffix('')}; wait for it to end, or choose another output"
            ) from None
        yield


def describe_machine(device):
    """What a reader needs to judge a number: hardware, versions, commit and command. A dict of plain JSON values."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "device": device.type,
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "commit": _git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def hardware_name(device):
    """The marketing name of the GPU, or the processor's with its number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _git_commit():
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
