"""How a script ends.

Bad input ends with one line on stderr (what is wrong, where, what to do) and exit code 2. SIGINT, SIGTERM and SIGHUP
end with 130, 143 and 129, after the script's `finally` blocks have run.
"""

import contextlib
import errno
import os
import re
import signal
import stat
import sys
import traceback

# SIGHUP, which not every system has: the terminal has closed.
TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
KILLED_WORKER = "DataLoader worker (pid"  # How torch's message begins.


class UserError(Exception):
    """An error that the user can fix; its text is the one line that they see."""


class Terminated(BaseException):
    """One of TERMINATING, `number`, arrived. Like KeyboardInterrupt it is not an Exception, so that nothing swallows it
    by accident."""

    def __init__(self, number, *words):
        super().__init__(*words)
        self.number = number


def printable(text):
    """`text`, such as the name of a file or a class, with escapes for line breaks and other control characters."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def run(main):
    """Call `main()` and end the process the way a shell user expects.

    UserError, a full disk, an unwritable folder, an exhausted GPU, a model that cannot be compiled, and the end of
    another process of the job end with one line and exit code 2; SIGINT with 130; SIGTERM with 143; SIGHUP, sent when
    the terminal closes, with 129. Any other exception is a bug here and keeps its traceback, as all do with
    TRACEBACK=1.
    """
    # The caller may want it to survive a signal, as nohup does.
    heeded = [number for number in (signal.SIGINT, *TERMINATING) if signal.getsignal(number) != signal.SIG_IGN]
    for number in heeded:
        if number != signal.SIGINT:  # Which Python raises as KeyboardInterrupt.
            signal.signal(number, _terminate)
    _print_what_can_be_printed()
    usual = sys.unraisablehook
    sys.unraisablehook = lambda told: None if _is_echo_of_loader(told) else usual(told)
    try:
        try:
            main()
        finally:
            _set_action(heeded, signal.SIG_IGN)  # A second Ctrl-C must not interrupt the line that tells of the first.
            # When a data worker is killed, torch raises wherever the process is; not while it ends.
            if hasattr(signal, "SIGCHLD"):  # Not on Windows.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except KeyboardInterrupt as error:
        _end(130, "; ".join(["interrupted", *error.args]))
    except Terminated as error:
        _end(128 + error.number, "; ".join(["terminated", *error.args]))
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); redirect stdout so that the flush at exit is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get("TRACEBACK"):
            raise
        _end(2, line)
    finally:
        code = _exit_code(sys.exc_info()[1])
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()  # os._exit does not.
        # Python's exit takes a while. A signal cuts it short, without a traceback and with the exit code that is due.
        _set_action(heeded, lambda *_: os._exit(code))


def _exit_code(error):
    """That of a process which `error` ends, or None if nothing was raised."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return int(error is not None)


def _set_action(signals, action):
    for number in signals:
        signal.signal(number, action)


def _print_what_can_be_printed():
    """Characters that the terminal's encoding lacks, and file names that are not text, are escaped instead of raising
    an error; output to a stream that was closed at the start (`>&-`) is discarded."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _is_echo_of_loader(told):
    """Whether this is torch's DataLoader failing to shut down after failing to start, or reporting a killed worker
    again while its first report ends the loop: both follow an error that the user is told of."""
    half_made = isinstance(told.exc_value, AttributeError) and "_MultiProcessingDataLoaderIter" in repr(told.object)
    return half_made or str(told.exc_value).startswith(KILLED_WORKER)


def is_out_of_gpu_memory(error):
    """Whether an exception says that a GPU is out of memory."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _OUT_OF_GPU_MEMORY)


def explain(error):
    """The one line for an error that the user can fix, or None for a bug here."""
    text = _words_of(error)
    if isinstance(error, UserError):
        return text
    # A lock between processes needs space in /dev/shm; its error names no file.
    no_lock = isinstance(error, OSError) and error.filename is None and _passed_through(error, "synchronize")
    if no_lock or any(words in text for words in _NO_SHARED_MEMORY):
        return (
            "the worker processes are out of shared memory (/dev/shm; in a container, --shm-size enlarges it) or of "
            "open files (ulimit -n); use --num_workers 0 (1 for preprocess.py), "
            "which needs neither; --resume continues from the last saved state"
        )
    no_process = isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM)
    if "can't start new thread" in text or (no_process and _passed_through(error, "multiprocessing")):
        return (
            "cannot start more processes or threads (ulimit -u, or the limit of a container); use fewer --num_workers"
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"cannot open or write {error.filename or 'the output'}: {error.strerror}; {_DISK_ERRORS[error.errno]}"
    # Libraries not written in Python, and worker processes, report these only as text.
    number = re.search(r"[\[(](?:os error|Errno) (\d+)[\])](?:[^']*: '([^']*)')?", text)
    if number and int(number[1]) in _DISK_ERRORS:
        what = f"cannot open or write {number[2] or 'the output'}"
        return f"{what}: {os.strerror(int(number[1]))}; {_DISK_ERRORS[int(number[1])]}"
    # Of torch.save: the file became no longer, or shorter than what was written.
    if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return "cannot write the output: the disk is full or has failed; free some space and run the same command again"
    if is_out_of_gpu_memory(error):
        return (
            "the GPU is out of memory; use a smaller --batch_size, add --half_precision, or recompute activations "
            "(docs/techniques/recomputation.md)"
        )
    is_short = isinstance(error, MemoryError) or re.match(r"Caught \w*MemoryError in", str(error))
    if is_short or "DefaultCPUAllocator: can't allocate memory" in text:
        return "the machine is out of memory; use a smaller --batch_size, a smaller model, or smaller images (--size)"
    if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.", "triton.")):
        return (
            f"torch.compile failed ({_reason(text)}); install a C++ compiler if there is none, or use --compile False; "
            "TRACEBACK=1 shows where it failed"
        )
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):
        reason, remedy = _reason(text), "start all of them, and check MASTER_ADDR"
        if "EADDRINUSE" in text:
            reason, remedy = "the port is already in use", "set MASTER_PORT to a free one"
        place = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
        return f"the processes of this job cannot meet at {place} ({reason}); {remedy}"
    if "RANK" in os.environ and any(words in text for words in _PEER_IS_GONE):
        return "another process of this job has ended; its own message says why"
    # The latter is raised when a worker is killed while a tensor is taken from it.
    broken = isinstance(error, (ConnectionError, EOFError)) and _passed_through(error, "multiprocessing")
    if text.startswith(KILLED_WORKER) or broken:
        return (
            "a worker process was killed, perhaps for lack of memory, of /dev/shm, or of open files (ulimit -n); use "
            "fewer --num_workers, or 0; --resume continues from the last saved state"
        )
    return None


def _passed_through(error, module):
    """Whether `error` was raised through a function of `module` or its submodules."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module in name.split(".") for name in names)


def _words_of(error):
    """str(error); for an error from a worker process that DataLoader raised again, the original message."""
    text = str(error)
    if not re.match(r"Caught \w+ in \w+ worker process", text):
        return text
    # It contains a traceback, whose last unindented line begins with the error's type.
    return re.findall(r"^[\w.]+(?:: (.*))?$", text, re.MULTILINE)[-1]


def _reason(text):
    """The first informative line of an error; of a compiler's, the lines before it only name its stages."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.endswith("raised:")]
    return (telling or lines or ["no reason given"])[0].rstrip(".")


# PyTorch's own allocator raises OutOfMemoryError; everything else on the GPU reports it only as text.
_OUT_OF_GPU_MEMORY = (
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# Torch's messages if a worker has no room for a batch, or the main process no descriptor to receive it.
_NO_SHARED_MEMORY = (
    "shared memory(shm)",
    "shared memory object",
    "out of shared memory",
    "file </torch_",
    "received 0 items of ancdata",
    "Too many open files",
)
# From gloo and NCCL, if the process that they wait for has ended.
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exit")
_DISK_ERRORS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EFBIG: "choose an output folder that can hold larger files",
    errno.EISDIR: "it is a folder; move it away, or choose another output folder",
    errno.ENOTDIR: "part of the path is a file; choose another output folder",
    errno.ELOOP: "its links form a loop; choose another output folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk has failed; choose another",
    errno.ESTALE: "the file server has lost the file; run the same command again",
    errno.EROFS: "choose an output folder on a writable file system",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
}


def _terminate(number, frame):
    leave_terminal(number)
    raise Terminated(number)


def leave_terminal(number):
    """After a SIGHUP the terminal is gone: discard further output, which would otherwise end the script."""
    if number == getattr(signal, "SIGHUP", None):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def signals_end_at_once():
    """A context for calls that wait outside of Python, which runs no handler before they return: in it, signals that
    are heeded have the system's own action, which ends the process with the same code, but without a line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATING)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    _set_action(handlers, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(code, line):
    # Of a torchrun job's processes, one reports a signal, but each reports its own error.
    name = os.path.basename(sys.argv[0])
    is_first = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    lines = {sys.stdout: "", sys.stderr: f"{name}: {printable(line)}\n" * (is_first or code == 2)}
    for stream, text in lines.items():
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # Its disk is full, or its reader has gone: the code still tells how the script ended.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
