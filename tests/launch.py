"""Scripts in processes of their own that start in a tenth of a second.

Most of a short run is the import of torch and transformers. A server imports them once, and every run is a fork of it:
the script runs as `__main__` with its own arguments, folder, environment, streams and session, and imports this
repository's modules anew. It is killed, stopped and waited for as any process. tests/conftest.py's `script_command`
is for what depends on the imports themselves, in a new interpreter.
"""

import array
import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUEST_BYTES = 1 << 20
PATIENCE = 300  # Seconds, after which something hangs, however busy the machine.


class Script:
    """A running script: `Script("SimCLS/main.py", "--dataset", folder, cwd=folder)`.

    before: Python code that runs first in its process, to bring a fault about. env: more environment variables.
    """

    def __init__(self, script, *args, cwd, before="", **env):
        self.name = str(script)
        self._streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 (as below)
        read, write = os.pipe()
        self._status = open(read, "rb", buffering=0)  # noqa: SIM115 (open as long as this object)
        request = {"script": str(ROOT / script), "args": list(map(str, args)), "cwd": str(cwd), "before": before}
        message = json.dumps(request | {"env": env}).encode()
        descriptors = [*(stream.fileno() for stream in self._streams), write]
        socket.send_fds(_server(), [message], descriptors)
        os.close(write)
        self.pid = int(self._read_status(PATIENCE))
        self.code = None

    def _read_status(self, timeout):
        if not select.select([self._status], [], [], timeout)[0]:
            raise TimeoutError(f"{self.name} gave no sign for {timeout} s: {self.err}")
        return self._status.readline()

    def running(self):
        """Whether it has not ended yet."""
        return self.code is None and not select.select([self._status], [], [], 0)[0]

    def wait(self, timeout=PATIENCE):
        """The exit code, negative for a signal; TimeoutError, after killing it, when it takes longer."""
        if self.code is None:
            try:
                self.code = int(self._read_status(timeout))
            except TimeoutError:
                self.kill()
                raise
        return self.code

    def kill(self, number=signal.SIGKILL):
        """Send a signal; that it has ended already is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def out(self):
        return self._text(0)

    @property
    def err(self):
        return self._text(1)

    def _text(self, number):
        # pread leaves alone the position that the script's own descriptor shares.
        stream = self._streams[number].fileno()
        return os.pread(stream, os.fstat(stream).st_size, 0).decode(errors="replace")

    def relatives(self):
        """The ids of the running processes of its session: itself, its workers, and theirs."""
        return relatives(self.pid)


def relatives(session):
    """The ids of the running processes of a session, which has the id of the process that began it."""
    return [pid for pid, _, found in _processes() if found == session]


def children(parent):
    return [pid for pid, found, _ in _processes() if found == parent]


def run(script, *args, cwd, timeout=PATIENCE, **more):
    """The Script after it has ended."""
    process = Script(script, *args, cwd=cwd, **more)
    process.wait(timeout)
    return process


JOB = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def run_two(script, *args, cwd, code=0, **more):
    """The two processes of a job, after they have ended: as torchrun starts them, but not in new interpreters."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    job = JOB | {"MASTER_PORT": str(port)}
    ranks = [Script(script, *args, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **job, **more)
             for rank in range(2)]  # fmt: skip
    for rank in ranks:
        assert rank.wait() == code, rank.err
    return ranks


def wait_until(condition, timeout, step=0.005):
    """Whether `condition()` came true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


def _processes():
    """(pid, parent, session) of every process that has not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state not in "ZX":
                yield int(path.parent.name), int(parent), int(session)


@functools.cache
def _server():
    """The socket to the server, which ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())]
    subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | environment)
    theirs.close()
    if not select.select([ours], [], [], PATIENCE)[0] or ours.recv(16) != b"ready":
        raise RuntimeError("the server of tests/launch.py did not start")
    return ours


# ------------------------------------------------------------------------------------------------ in the server


def serve(connection):
    kept = _preload()  # noqa: F841 (what is un-registered when it is collected)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    connection.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES, array.array("i", [0] * 3).itemsize * 3)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            _keep(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _preload():
    """Import what takes long, and forget the modules of this repository."""
    sys.path.insert(0, str(ROOT))
    from harness import torchvision_compat  # isort: split

    import accelerate  # noqa: F401
    import nltk.tokenize.punkt  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch.utils.flop_counter  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401
    import transformers

    # They are imported when they are first asked for.
    for name in ("AutoModelForSeq2SeqLM", "AutoModelForTextEncoding", "AutoTokenizer", "BertModel", "Seq2SeqTrainer"):
        getattr(transformers, name)
    for name in ("T5ForConditionalGeneration", "T5EncoderModel", "PreTrainedTokenizerFast", "set_seed"):
        getattr(transformers, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "harness"]:
        del sys.modules[name]
    # Not what else lies below ROOT: run.sh's environment does.
    own = (ROOT, ROOT / "tests")
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() not in own]
    return torchvision_compat


def _keep(request, out, err, status):
    """Start the script in a child, and tell its id and, when it has ended, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(request, out, err)
    os.write(status, b"%d\n" % pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # Whoever asked was killed.
        os.write(status, b"%d\n" % code)
    os._exit(0)


def _become(request, out, err):
    """Run the script as the interpreter would. In the end no object is torn down, which would take a second."""
    os.setsid()
    with open(os.devnull) as nothing:
        for number, descriptor in enumerate((nothing.fileno(), out, err)):
            os.dup2(descriptor, number)
    os.close(out)
    os.close(err)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    script = request["script"]
    sys.argv = [script, *request["args"]]
    sys.path.insert(0, str(Path(script).parent))
    code = 0
    try:
        exec(request["before"], {})
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
