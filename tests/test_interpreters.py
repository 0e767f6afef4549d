"""How scripts start: without docstrings and asserts (python3 -OO), where Python leaves their folder off sys.path, and
without the seconds of importing torch if they do not need it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

# One process, since most of the time goes into torch; each script finds its own modules anew.
HELP_OF_ALL = """
import os, runpy, sys
root, *scripts = sys.argv[1:]
path = list(sys.path)
for script in scripts:
    sys.path[:], sys.argv = path, [script, "--help"]
    try:
        runpy.run_path(os.path.join(root, script), run_name="__main__")
    except SystemExit as end:
        print(script, "ended with", end.code, file=sys.stderr)
    for name, module in list(sys.modules.items()):
        file = str(vars(module).get("__file__"))
        if file.startswith(root) and "site-packages" not in file:  # .venv may lie in the root.
            del sys.modules[name]
"""


def scripts():
    """Every script that a user may start, from the root."""
    found = [path for folder in ("resnext", "SimCLS", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = [path for path in [*found, ROOT / "report.py"] if "endings.run(main)" in path.read_text(encoding="utf-8")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def test_help_of_every_script_without_docstrings_and_without_its_folder_on_the_path(tmp_path):
    assert len(scripts()) > 15
    command = [sys.executable, "-OO", "-c", HELP_OF_ALL, f"{ROOT}{os.sep}", *scripts()]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines() == [f"{script} ended with 0" for script in scripts()]


@pytest.mark.parametrize("script", ["report.py", "SimCLS/preprocess.py", "SimCLS/texts/sample_data.py"])
def test_what_computes_no_tensors_starts_without_torch(script):
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, ROOT / script], check=True)


# Modules of a room that can also be run, and what benchmarks measure.
IMPORTED = {"sample_data", "minilm", "resnext_fast"}


def test_no_script_imports_another():
    files = [path for folder in ("resnext", "SimCLS", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    names = {Path(script).stem for script in scripts()} - IMPORTED
    assert {"main", "fast", "evaluate_model"} <= names
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not found & names, path
