"""The notebook runs to its end from a folder that is no clone's, on few documents; and its outputs are its own."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import numpy
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from reporting.pages import NOTEBOOK
from texts import sample_data


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The notebook alone in a folder with a blank in its name, and small texts."""
    folder = tmp_path / "else where"
    folder.mkdir()
    shutil.copy(ROOT / NOTEBOOK, folder)
    paths = sorted(Path(numpy.__file__).parent.glob("lib/_*.py"))
    pairs = list(sample_data.without_repeats(pair for path in paths for pair in sample_data.file_pairs(path)))
    assert len(pairs) > 100
    with open(folder / "texts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("abstract", "title"), *pairs])
    settings = {"OPTIMISE_MODELS": ROOT, "DATA": "texts.csv", "ENCODER": ROOT / "SimCLS" / "demo", "PERCENT": 25}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    return folder


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook, command):
    """What the cell that holds `command` has printed."""
    cell = next(cell for cell in code_cells(notebook) if command in cell.source)
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_the_notebook_runs_anywhere_and_its_scorer_learns(copy):
    notebook = nbformat.read(copy / Path(NOTEBOOK).name, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(copy)}}, coalesce_streams=True).execute()
    table = printed(notebook, "evaluate_model.py")
    for system in ("generator", "SimCLS", "random", "worst", "best"):
        assert system in table, table
    assert "accuracy" in printed(notebook, "evaluate.py model_history")
    assert "Test accuracy, %" in printed(notebook, "--compare")
    # It has learned, though so few documents say nothing about others: at a wild rate all scores end up equal.
    *_, last = json.loads((copy / "cache" / "notebook" / "notebook.json").read_text())["epochs"]
    equal_scores = 0.01 * 8 * 7 / 2
    assert last["loss"] < 0.7 * equal_scores


@pytest.mark.parametrize(("given", "line"), [(None, "not below a clone of Optimise-Models: set"), ("gone", "^set")])
def test_a_notebook_that_finds_no_repository_says_what_to_set(given, line, tmp_path, monkeypatch):
    source = code_cells(nbformat.read(ROOT / NOTEBOOK, as_version=4))[0].source
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTIMISE_MODELS", raising=False)
    if given:
        monkeypatch.setenv("OPTIMISE_MODELS", given)
    with pytest.raises(SystemExit, match=f"{line} OPTIMISE_MODELS to its folder$"):
        exec(source, {})


def test_the_committed_outputs_are_of_the_committed_cells_and_name_no_folder():
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert "SimCLS" in printed(notebook, "evaluate_model.py")
    assert "SimCLS_demo_8" in printed(notebook, "gen_candidate.py")
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        texts = output.get("text", "") + json.dumps({k: v for k, v in output.get("data", {}).items() if "text" in k})
        assert not re.search(r"(?<![\w.<])/(home|tmp|root|work|usr|opt|Users)/", texts), texts
    assert os.path.expanduser("~") == "/" or os.path.expanduser("~") not in json.dumps(notebook)
    assert sys.prefix not in json.dumps(notebook)
