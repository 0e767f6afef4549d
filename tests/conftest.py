"""What the tests share: running a script as a user does, and small real data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "resnext", ROOT / "SimCLS"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from harness import torchvision_compat  # noqa: F401

# One thread a process: the tests run two at a time on two cores, and tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def script_command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


@pytest.fixture(scope="session")
def run_script():
    """run_script("resnext/resnext.py", "--seed", 1, cwd=..., code=0) -> CompletedProcess with text output."""

    def run(script, *args, cwd=None, code=0, **env):
        result = subprocess.run(
            script_command(script, *args), cwd=cwd, capture_output=True, text=True, env=os.environ | env, timeout=300
        )
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder data set of 44 training and 10 test pictures in two classes that a model can tell apart."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 22), ("test", 5)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 128, (32, 32, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder
