"""What the SimCLS stages share: lines of a file, work shared out to processes, progress."""

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
    order mark before the first is no part of it.

    Raises UserError that names the file, and the line where its bytes are not UTF-8.
    """
    try:
        # A socket cannot be opened by that name.
        with sys.stdin.buffer if Path(path) == STANDARD_INPUT and sys.stdin else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
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

    At most a few chunks of items are read ahead, so memory stays bounded however many there are. An exception of
    `function` is raised here. A worker that is killed is a UserError, and workers die with this process.

    chunk: items that travel to a worker together. Workers are forked: what this process keeps in modules, they have.
    """
    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, chunk)), [])
    if workers == 1:
        for part in chunks:
            yield from map(function, part)
        return
    # They need nothing of the main script's imports, either, which take seconds.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker)
    waiting = collections.deque()
    try:
        for part in chunks:
            with _signals_wait():  # The first call forks.
                waiting.append(pool.submit(_map_chunk, function, part))
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed; is memory short? Try fewer --num_workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _map_chunk(function, part):
    return [function(item) for item in part]


@contextlib.contextmanager
def _signals_wait():
    """Signals of the block come after it, and those of a worker that is forked in it when it is ready for them: until
    then it has this process's handlers, which would swallow the SIGTERM that ends it when another worker is killed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker():
    # Ctrl-C reaches the whole group of processes: the parent alone speaks, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def progress(items, total, label):
    """Yield `items`; a bar on a terminal, else a line on stderr for each tenth of the work."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label)
        return
    tenth = 0
    for done, item in enumerate(items, 1):
        yield item
        if done * 10 // total > tenth:
            tenth = done * 10 // total
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
