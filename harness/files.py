"""Files that are either whole or not there, and folders that one run at a time writes."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from harness.endings import UserError

ROOT = Path(__file__).resolve().parent.parent
SURROGATES = re.compile("[\\ud800-\\udfff]")  # Halves of letters, which Python holds and UTF-8 has none of.
# errno values that mean: this file system has no locks. So say FUSE and older network ones, NFS without its daemon, and
# its folders.
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EBADF}


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`; rename it to `path` when the block ends without an exception.

    The data is on the disk before the rename, so a crash leaves the old file or the new one, never a half.
    """
    path = Path(path)
    make_folder(path.parent)
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
    """A file that remembers why it could not be written: torch.save hides that behind a RuntimeError of its own. It may
    be an OSError, or what a signal raises meanwhile: Ctrl-C, or torch when a data worker is killed."""

    def __init__(self, file):
        self._file, self.error = file, None

    def write(self, data):
        try:
            return self._file.write(data)
        except BaseException as error:
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


def write_record(path, record):
    """Write a record of a run or a benchmark: `write_json` of what `portable` leaves of it."""
    write_json(path, portable(record))


def portable(value):
    """`value` without the folders of this machine, in every string that is a path, or a flag's `--name=path`.

    A path below the repository is told from there, and any other by its last name alone. Paths that do not begin with
    a root or with ".." stay. value: a plain JSON value, in which there may be Paths, too.
    """
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(each) for each in value]
    if not isinstance(value, (str, Path)):
        return value
    word = str(value)
    flag, equals, name = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(name)
    if not path.is_absolute() and path.parts[:1] != ("..",):
        return word
    path = Path(os.path.abspath(path))
    return flag + equals + (path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name or name)


def places(arguments):
    """{name: digest} of the `arguments`, a dict, that `portable` cuts: it tells two folders of one name apart."""
    paths = {name: value for name, value in arguments.items() if isinstance(value, (str, Path))}
    return {name: place_digest(value) for name, value in paths.items() if portable(value) != str(value)}


def is_utf8(text):
    """Whether a text, or the name of a path, a str or a Path, is UTF-8: many libraries take no other."""
    return SURROGATES.search(str(text)) is None


def place_digest(path):
    return hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:8]


def as_recorded(arguments, digests=None):
    """`arguments`, a dict, as a record has them, with the digest of its place beside each path that is cut.

    digests: as from `places`, by default those of the arguments; a record has its own.
    """
    digests = places(arguments) if digests is None else digests
    digests = {name: f"{portable(arguments[name])} ({digest})" for name, digest in digests.items()}
    return portable(arguments) | digests


def make_folder(folder):
    """Make the output folder, and those that it lies in; UserError when there can be none."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"the output folder {folder} is a file, or lies in one; name another") from None
    except OSError as error:
        raise UserError(f"cannot make the output folder {folder}: {error.strerror}; name another") from None


@contextlib.contextmanager
def output_lock(path, output=None):
    """Hold the lock file `path`, so that a second run with the same output is refused (UserError).

    The system drops the lock when the process dies, however it dies, and workers that are forked do not have it. The
    empty file itself stays. Where the file system has no locks, a warning says so, once: a file in the place of a lock
    would be left behind by a killed run. output: what is written, in words; by default `path` without its suffix.
    """
    path = Path(path)
    make_folder(path.parent)
    output = output or path.with_suffix("")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(path, blocking=False, fallback_to_soft=False))
        except (OSError, NotImplementedError) as error:  # The second is an older filelock's, where there are no locks.
            _refuse_lock(path, output, error)
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            reason = getattr(error, "strerror", error)
            _warn_of_no_locks(f"the file system of {output} has no locks ({reason})")
        yield


def _refuse_lock(path, output, error):
    """UserError when the `error` of locking the file `path` is one that the user can put right."""
    is_there = os.path.lexists(path)
    if isinstance(error, Timeout) and is_there:
        raise UserError(f"another run is writing {output}; wait for it to end, or choose another output") from None
    # What names a file is of opening it.
    odd_name = isinstance(error, OSError) and error.errno in NO_LOCKS and error.filename is not None
    if isinstance(error, Timeout) or odd_name:
        raise UserError(f"cannot make the lock file {path}; choose another output") from None
    if os.path.islink(path):
        raise UserError(f"the lock file {path} is a link; remove it, or choose another output") from None
    if isinstance(error, PermissionError) and is_there:
        owner = f"of the user with the id {path.stat().st_uid}"
        raise UserError(f"cannot use the lock file {path}, {owner}; remove it, or choose another output") from None


@contextlib.contextmanager
def staging(folder):
    """Yield a new folder inside `folder` for files that get their names there when all are written, and is then gone.

    UserError when `folder` is none, and when a second run is writing it.
    """
    stage = Path(folder) / ".unfinished"
    lock = stage.with_suffix(".lock")
    with output_lock(lock, folder):
        try:
            _make_anew(stage)
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            with contextlib.suppress(OSError):  # On Windows, where it goes with the lock.
                lock.unlink()


def _make_anew(folder):
    """Make the folder, in place of what a killed run has left, or of a file or a link; UserError when that stays."""
    with contextlib.suppress(OSError):  # It is not there, or a folder.
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"{folder} is in the way; remove it, or choose another output") from None


def publish(stage, folder):
    """Give each file in `stage` its name in `folder`, in place of the one that has it, and the rights of any new file:
    safetensors leaves its own to the owner alone."""
    if hasattr(os, "sync"):  # Not on Windows.
        os.sync()
    for path in sorted(stage.iterdir()):
        os.chmod(path, 0o666 & ~_umask())
        os.replace(path, Path(folder) / path.name)


@functools.cache  # Once a process is enough.
def _warn_of_no_locks(reason):
    print(f"warning: {reason}; see to it that no second run writes the same output", file=sys.stderr, flush=True)
