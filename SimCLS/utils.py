"""Shared by the SimCLS stages: reading lines, mapping over worker processes, and progress."""

import codecs
import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from harness.endings import UserError

STANDARD_INPUT = Path("/dev/stdin")
STOPS = (signal.SIGINT, signal.SIGTERM)


def read_lines(path):
    """Yield the lines of a UTF-8 text file without their newline; only \\n ends a line (never \\x85 or U+2028). A byte
    order mark at the start is skipped.

    UserError, naming the file and line, if it cannot be read, is not UTF-8, or has other line ends.
    """
    try:
        # If standard input is a socket, it cannot be opened by name.
        with sys.stdin.buffer if Path(path) == STANDARD_INPUT and sys.stdin else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if number == 1 and line.startswith(b"\x1f\x8b"):
                    raise UserError(f"{path} is compressed; decompress it first (gzip -d)")
                if b"\0" in line:  # UTF-16 of English without a byte order mark is valid UTF-8, with a NUL per letter.
                    raise UserError(f"{path}, line {number}: a NUL byte, as in UTF-16; save the file as UTF-8")
                if b"\r" in line.rstrip(b"\r\n"):
                    raise UserError(
                        f"{path}, line {number}: a line end of CR only; save the file with LF or CRLF line ends"
                    )
                try:
                    yield line.removesuffix(b"\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
                    ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def map_in_order(function, items, workers, chunk):
    """Yield `function(item)` for each item, in order, computed by `workers` processes (1: by this one).

    At most a few chunks of items are read ahead, so memory is bounded. An exception of `function` is raised here.
    UserError if a worker is killed. Workers end with this process.

    chunk: items per task. Workers are forked, so they inherit this process's module state.
    """
    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, chunk)), [])
    if workers == 1:
        for part in chunks:
            yield from map(function, part)
        return
    # Forking also saves the main script's imports, which take seconds.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker)
    waiting = collections.deque()
    try:
        for part in chunks:
            with _signals_wait():  # submit may fork.
                waiting.append(pool.submit(_map_chunk, function, part))
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for lack of memory; use fewer --num_workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _map_chunk(function, part):
    return [function(item) for item in part]


@contextlib.contextmanager
def _signals_wait():
    """Defer signals until after the block; a worker forked in it defers them until it is ready. Until then it has this
    process's handlers, which would swallow the SIGTERM that ends it when another worker is killed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker():
    # Ctrl-C reaches the whole process group; only the parent reacts, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def progress(items, total, label):
    """Yield `items`, with a progress bar on a terminal, or else a line on stderr for each tenth of the work."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label)
        return
    tenth = 0
    for done, item in enumerate(items, 1):
        yield item
        if done * 10 // total > tenth:
            tenth = done * 10 // total
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
