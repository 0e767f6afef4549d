"""Bad input to the ResNeXt scripts: one line that says what is wrong, exit code 2, nothing written."""

import runpy
import sys

import pytest
import torch
from conftest import ROOT

SMALL = [
    "--dataset",
    "folder",
    "--model",
    "resnext29_1x4d",
    "--batch_size",
    "8",
    "--num_worker",
    "0",
    "--num_epoch",
    "1",
]

BAD_ARGUMENTS = [
    (["--num_worker", "-1"], "--num_worker: '-1' is not a whole number of at least 0"),
    (["--num_epoch", "0"], "--num_epoch: '0' is not"),
    (["--num_epoch", "1.5"], "--num_epoch: '1.5' is not"),
    (["--batch_size", "0"], "--batch_size: '0' is not"),
    (["--batch_size", "-8"], "--batch_size: '-8' is not"),
    (["--lr", "0"], "--lr: '0' is not a number above 0"),
    (["--lr", "nan"], "--lr: 'nan' is not"),
    (["--lr", "inf"], "--lr: 'inf' is not"),
    (["--seed", "-1"], "--seed: '-1' is not"),
    (["--seed", str(10**20)], "is not a whole number from 0 to 2**63 - 1"),
    (["--max_steps", "0"], "--max_steps: '0' is not"),
    (["--model", "resnet50"], "--model: 'resnet50' is not of the form resnext29_"),
    (["--model", "resnext29_0x4d"], "is not of the form"),
    (["--dataset", "imagenet"], "--dataset: invalid choice"),
    (["--loader", "gpu"], "--loader: invalid choice"),
    (["--half_precision", "int8"], "'int8' is neither float16 nor bfloat16"),
    (["--true_fp32", "maybe"], "'maybe' is neither True nor False"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    (["--data_dir", "nowhere"], "there is no folder nowhere/train"),
]
BAD_CHECKPOINT_ARGUMENTS = [
    (["--memory_budget", "0"], "--memory_budget: '0' is not a number above 0 and at most 1"),
    (["--memory_budget", "1.1"], "--memory_budget: '1.1' is not"),
    (["--memory_budget", "0.01"], "cannot be met; the least that this model can keep is"),
    (["--policy", "all"], "--policy: invalid choice"),
    (["--policy", "block", "--memory_budget", "0.5"], "not allowed with argument"),
]


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """fails(script, *args) -> the one line on stderr of a script that ends with exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "resnext"), *sys.path])

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        errors = capsys.readouterr().err
        assert end.value.code == 2, errors
        assert errors.count("\n") == 1, errors
        return errors

    return run


def results(folder):
    return [path for path in folder.rglob("*") if path.suffix in (".pt", ".npz", ".json", ".state", ".tmp")]


@pytest.mark.parametrize(
    ("args", "line"), BAD_ARGUMENTS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_arguments(fails, pictures, tmp_path, args, line):
    assert line in fails("resnext/resnext.py", *SMALL, "--data_dir", pictures, *args)
    assert not results(tmp_path)


@pytest.mark.parametrize(
    ("args", "line"), BAD_CHECKPOINT_ARGUMENTS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_checkpoint_arguments(fails, pictures, tmp_path, args, line):
    assert line in fails("resnext/resnext_checkpoint.py", *SMALL, "--data_dir", pictures, *args)
    assert not results(tmp_path)


def test_no_cifar10_and_no_network(fails, monkeypatch, tmp_path):
    from torchvision.datasets import CIFAR10

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(CIFAR10, "__init__", offline)
    line = fails("resnext/resnext.py", "--data_dir", tmp_path)
    assert "--dataset digits" in line
    assert "--data_dir" in line


def test_output_is_a_file(fails, pictures, tmp_path):
    (tmp_path / "taken").write_text("mine")
    line = fails("resnext/resnext.py", *SMALL, "--data_dir", pictures, "--output_dir", "taken")
    assert "output folder taken is a file" in line
    assert (tmp_path / "taken").read_text() == "mine"


class Mark:
    """Pickled, it makes a file when it is loaded by a loader that runs code."""

    def __reduce__(self):
        return (open, ("the-pickle-ran", "w"))


@pytest.mark.parametrize("content", ["truncated", "foreign", "format", "hostile", "empty", "text", "dot", "K"])
def test_resume_from_what_is_no_state(fails, pictures, tmp_path, content):
    state = tmp_path / "model_history" / "resnext_0_worker_8_resnext29_1x4d_folder.state"
    state.parent.mkdir()
    if content == "truncated":
        torch.save({"format": 1, "weights": torch.zeros(1000)}, state)
        state.write_bytes(state.read_bytes()[:-1000])
    elif content == "foreign":
        torch.save({"model": torch.zeros(3)}, state)
    elif content == "format":
        torch.save({"format": 1}, state)
    elif content == "hostile":
        torch.save({"format": 1, "arguments": Mark()}, state)
    else:
        state.write_text({"empty": "", "text": "no state at all", "dot": ".rubbish", "K": "Krubbish"}[content])
    before = state.read_bytes()
    line = fails("resnext/resnext.py", *SMALL, "--data_dir", pictures, "--resume")
    assert "is not a whole training state" in line
    assert state.read_bytes() == before
    assert not (tmp_path / "the-pickle-ran").exists()
