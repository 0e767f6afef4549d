"""What the tests share: running a script as a user does, and small real data."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "resnext", ROOT / "SimCLS"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import launch
import tiny_inputs
from tiny_inputs import WORDS  # noqa: F401  (for tests that make texts)

from harness import torchvision_compat  # noqa: F401

# A shell that starts the tests in the background ignores Ctrl-C for them, and scripts leave ignored what they find so.
with contextlib.suppress(ValueError):  # Not in the main thread.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread a process: the tests run two at a time on two cores, and tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# They assert what a CPU gives, bit for bit; what needs a GPU is measured by the benchmarks.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def script_command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def pytest_collection_modifyitems(items):
    """`-m quick` is every test that starts no script, unless it is marked slow."""
    for item in items:
        starts_scripts = "run_script" in item.fixturenames or hasattr(item.module, "launch")
        if not starts_scripts and not item.get_closest_marker("slow"):
            item.add_marker("quick")
    # The longest test first: at the end, the other processes would wait for it.
    items.sort(key=lambda item: "notebook" not in item.module.__name__)


@pytest.fixture(scope="session")
def run_script():
    """run_script("resnext/resnext.py", "--seed", 1, cwd=..., code=0) -> CompletedProcess with text output.

    In a process of its own, but not a new interpreter, whose imports take longer than most runs: see launch.py.
    fresh: a new interpreter all the same, for `env` that libraries read when they are imported.
    """

    def run(script, *args, cwd=None, code=0, fresh=False, **env):
        if fresh:
            result = subprocess.run(
                script_command(script, *args),
                cwd=cwd,
                env=os.environ | env,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
            return result
        ended = launch.run(script, *args, cwd=cwd or os.getcwd(), **env)
        assert ended.code == code, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
        return subprocess.CompletedProcess([script, *args], ended.code, ended.out, ended.err)

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder data set of 44 training and 10 test pictures in two classes that a model can tell apart."""
    return tiny_inputs.make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Tiny text encoders in `from_pretrained` form, as users have them: {"t5" (without dropout), "bert", "roberta"}."""
    kinds = ("t5", "bert", "roberta")
    return {kind: str(tiny_inputs.make_model(tmp_path_factory.mktemp(kind), kind)) for kind in kinds}


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    """A folder of samples as preprocess.py writes them, train (44), val (12) and test (12), six candidates each."""
    return tiny_inputs.make_samples(tmp_path_factory.mktemp("samples"))
