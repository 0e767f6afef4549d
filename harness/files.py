"""Files that are either complete or absent, and folders that only one run at a time writes."""

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

from harness.endings import UserError, printable

ROOT = Path(__file__).resolve().parent.parent
RECORD_FORMAT = 1  # Of the records of runs and evaluations; another one is not read.
SURROGATES = re.compile("[\\ud800-\\udfff]")  # Half characters, which a Python str can hold and UTF-8 cannot.
# errno values that mean that this file system has no locks: FUSE and older network file systems, NFS without its lock
# daemon, and folders on NFS.
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EBADF}


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file next to `path`; rename it to `path` when the block ends without an exception.

    The data is on the disk before the rename, so a crash leaves the old file or the new one, never a partial one.
    """
    path = Path(path)
    make_folder(path.parent)
    encoding = None if "b" in mode else "utf-8"
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except FileNotFoundError:  # The folder is there, but is one such as /proc.
        raise UserError(f"cannot create files in the folder {path.parent}; choose another") from None
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
    """A file that remembers why it could not be written, since torch.save hides that behind its own RuntimeError. The
    cause may be an OSError, or an exception raised from a signal: Ctrl-C, or torch's when a data worker is killed."""

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
    """Write `value` as indented JSON, atomically. NaN and infinity are errors, since JSON cannot express them."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


def write_record(path, record):
    """Write the record of a run or a benchmark: `write_json` of `portable(record)`."""
    write_json(path, portable(record))


def portable(value):
    """`value` without this machine's folders, in every string that is a path or a flag `--name=path`.

    A path inside the repository becomes relative to it; of any other only the last component is left. Paths that do not
    begin with a root or with ".." stay. value: a plain JSON value, which may also contain Paths.
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
    """{name: digest} of the paths in the dict `arguments` that `portable` shortens: it tells apart two folders with the
    same name."""
    paths = {name: value for name, value in arguments.items() if isinstance(value, (str, Path))}
    return {name: place_digest(value) for name, value in paths.items() if portable(value) != str(value)}


def is_utf8(text):
    """Whether a text, or the name of a path, a str or a Path, is valid UTF-8, which many libraries require."""
    return SURROGATES.search(str(text)) is None


def place_digest(path):
    return hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:8]


def as_recorded(arguments, digests=None):
    """The dict `arguments` as it appears in a record, with its digest added to each shortened path.

    digests: as from `places`, by default those of the arguments; a record brings its own.
    """
    digests = places(arguments) if digests is None else digests
    digests = {name: f"{portable(arguments[name])} ({digest})" for name, digest in digests.items()}
    return portable(arguments) | digests


def make_folder(folder):
    """Make the output folder and its parents; UserError if that is impossible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"the output folder {folder} is a file, or inside one; choose another") from None
    except OSError as error:
        raise UserError(f"cannot create the output folder {folder}: {error.strerror}; choose another") from None


@contextlib.contextmanager
def output_lock(path, output=None):
    """Hold the lock file `path`, so that a second run with the same output is refused (UserError).

    The system releases the lock when the process ends in any way; forked workers do not hold it. The empty file itself
    stays. If the file system has no locks, a warning says so once: an ordinary file as a lock would stay behind when a
    run is killed. output: what is written, as text; by default `path` without its suffix.
    """
    path = Path(path)
    make_folder(path.parent)
    output = output or path.with_suffix("")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(path, blocking=False, fallback_to_soft=False))
        except (OSError, NotImplementedError) as error:  # The latter is from an older filelock, without locks.
            _refuse_lock(path, output, error)
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            reason = getattr(error, "strerror", error)
            _warn_of_no_locks(f"the file system of {output} does not support locks ({reason})")
        yield


def is_locked(path):
    """Whether another run holds the lock file `path`."""
    try:
        with output_lock(path) if path.exists() else contextlib.nullcontext():
            return False
    except UserError:
        return True


def _refuse_lock(path, output, error):
    """UserError if the `error` of locking the file `path` is one that the user can fix."""
    is_there = os.path.lexists(path)
    if isinstance(error, Timeout) and is_there:
        raise UserError(f"another run is writing {output}; wait for it to end, or choose another output") from None
    # An error that names a file is from opening it.
    odd_name = isinstance(error, OSError) and error.errno in NO_LOCKS and error.filename is not None
    if isinstance(error, Timeout) or odd_name:
        raise UserError(f"cannot create the lock file {path}; choose another output") from None
    if os.path.islink(path):
        raise UserError(f"the lock file {path} is a link; remove it, or choose another output") from None
    if isinstance(error, PermissionError) and is_there:
        owner = f"which belongs to user id {path.stat().st_uid}"
        raise UserError(f"cannot use the lock file {path}, {owner}; remove it, or choose another output") from None


@contextlib.contextmanager
def staging(folder):
    """Yield a new folder inside `folder`, which is removed afterwards. The files in it get their final names there once
    all are written.

    UserError if `folder` is not a folder, or if a second run is writing it.
    """
    stage = Path(folder) / ".unfinished"
    lock = stage.with_suffix(".lock")
    with output_lock(lock, folder):
        try:
            _make_anew(stage)
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            with contextlib.suppress(OSError):  # On Windows the file is removed with the lock.
                lock.unlink()


def _make_anew(folder):
    """Make the folder, replacing what a killed run left, a file or a link; UserError if that cannot be removed."""
    with contextlib.suppress(OSError):  # It does not exist, or is a folder.
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"cannot replace {folder}; remove it, or choose another output") from None


def publish(stage, folder):
    """Move each file in `stage` to `folder`, replacing the one of the same name, with the permissions of any new file:
    safetensors gives its files to the owner only."""
    if hasattr(os, "sync"):  # Not on Windows.
        os.sync()
    for path in sorted(stage.iterdir()):
        os.chmod(path, 0o666 & ~_umask())
        os.replace(path, Path(folder) / path.name)


@functools.cache  # Once per process is enough.
def _warn_of_no_locks(reason):
    told = f"warning: {printable(reason)}; make sure that no second run writes the same output"
    print(told, file=sys.stderr, flush=True)
