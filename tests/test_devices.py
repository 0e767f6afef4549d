"""--device and --threads: what is there is used, and what is not is one line."""

import argparse

import pytest
import torch

from experiment import Metrics
from harness import devices
from harness.distributed import World
from harness.endings import UserError
from scorer import scorer_arguments

TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def choose(*words):
    parser = argparse.ArgumentParser()
    devices.add_arguments(parser)
    return devices.choose(parser.parse_args(words))


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_a_gpu():
    assert choose() == choose("--device", "cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(UserError, match=f"^--device {name}: PyTorch finds no .* on this machine"):
            choose("--device", name)


def test_with_gpus(two_gpus, monkeypatch):
    assert choose() == choose("--device", "cuda") == torch.device("cuda", 0)
    assert choose("--device", "cuda:1") == torch.device("cuda", 1)
    assert choose("--device", "cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="^--device cuda:2: there is no GPU 2; this machine has 2"):
        choose("--device", "cuda:2")
    for name, value in (TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert choose() == choose("--device", "cuda") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="^--device cuda:0: this job has 2 processes"):
        choose("--device", "cuda:0")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:1", "xla", ""])
def test_a_name_of_no_device(name):
    with pytest.raises(argparse.ArgumentTypeError, match="is not cpu, cuda, mps, or a GPU such as cuda:1"):
        devices.device_name(name)


def test_threads(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose("--threads", "3")
    choose()
    assert chosen == [3]


def test_threads_of_a_scorer_on_a_gpu(two_gpus, monkeypatch):
    import main

    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    args = scorer_arguments.get_args_parser("").parse_args(["--cuda", "--gpuid", "1", "--threads", "3"])
    assert main.choose_device(args) == torch.device("cuda", 1)
    assert chosen == [3]


def test_sums_need_no_float64_where_there_is_none(monkeypatch):
    assert devices.widest_float("mps") == torch.float32
    assert devices.widest_float(torch.device("cpu")) == torch.float64
    monkeypatch.setattr(devices, "widest_float", lambda device: torch.float32)
    monkeypatch.setattr(torch.Tensor, "double", None)
    cpu = torch.device("cpu")
    metrics = Metrics(cpu)
    metrics.add(torch.tensor(1.5), torch.tensor([[2.0, 1.0]] * 4), torch.zeros(4, dtype=torch.long))
    assert metrics.totals.dtype == torch.float32
    assert metrics.result(World(0, 1, cpu)) == (1.5, 100.0)


def test_the_kind_of_device_is_the_one_named_or_the_best_there_is(two_gpus, monkeypatch):
    def kind(name):
        return devices.kind(argparse.Namespace(device=name))

    assert [kind(name) for name in (None, "cuda:1", "cpu", "mps")] == ["cuda", "cuda", "cpu", "mps"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kind(None) == "cpu"
