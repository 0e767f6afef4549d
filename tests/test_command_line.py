"""Argument types, and the one line that stands for an error."""

import argparse
import os

import pytest
import torch

from harness import command_line
from harness.command_line import LARGEST_LEARNING_RATE, explain, learning_rate, workers


@pytest.mark.parametrize(("cores", "most"), [(2, 64), (8, 64), (96, 768)])
def test_workers_are_bounded_by_the_usable_cores(cores, most, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert [workers("0"), workers(str(most))] == [0, most]
    for text in (str(most + 1), "100000", "-1", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"is not a whole number from 0 to {most}$"):
            workers(text)


def test_a_learning_rate_fits_into_float32():
    assert learning_rate("0.01") == 0.01
    assert learning_rate("1e37") == LARGEST_LEARNING_RATE
    for text in ("0", "-1", "1.1e37", "1e38", "inf", "nan", "fast"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number above 0 and at most 1e\+37$"):
            learning_rate(text)


def test_help_shows_the_defaults_that_say_something():
    parser = command_line.OneLineParser(formatter_class=command_line.HelpWithDefaults)
    parser.add_argument("--size", type=int, default=7, help="of it")
    parser.add_argument("--name", help="what it is called")
    parser.add_argument("--loud", action="store_true", help="be heard")
    text = parser.format_help()
    assert "of it (default: 7)" in text
    assert text.count("default") == 1


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_largest_learning_rate_does_not_end_the_optimizer(kind, foreach):
    weight = torch.nn.Parameter(torch.ones(3))
    if kind == "adam":
        optimizer = torch.optim.Adam([weight], lr=LARGEST_LEARNING_RATE, weight_decay=5e-4, foreach=foreach)
    else:
        optimizer = torch.optim.SGD([weight], lr=LARGEST_LEARNING_RATE, momentum=0.9, nesterov=True, foreach=foreach)
    for _ in range(3):
        weight.grad = torch.ones(3)
        optimizer.step()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_gpu_without_memory_is_one_line(error):
    line = explain(error)
    assert line.startswith("the GPU is out of memory; use a smaller --batch_size, add --half_precision")
    assert "\n" not in line


def test_other_errors_of_a_gpu_keep_their_traceback():
    assert explain(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


def test_a_lost_peer_is_told_in_one_line_within_a_job_alone(monkeypatch):
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5361")
    monkeypatch.delenv("RANK", raising=False)
    assert explain(error) is None
    monkeypatch.setenv("RANK", "1")
    assert explain(error) == "another process of this job has ended; its own line says why"


def test_a_compiler_that_fails_is_one_line_with_its_reason():
    from torch._inductor.exc import InvalidCxxCompiler

    line = explain(InvalidCxxCompiler())
    assert "No working C++ compiler found" in line
    assert "--compile False" in line
    assert "\n" not in line
    assert command_line._reason("backend='inductor' raised:\nInductorError: no gcc.\n\nSet TORCHDYNAMO_VERBOSE=1") == (
        "InductorError: no gcc"
    )


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(),
                                   RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")])  # fmt: skip
def test_a_killed_data_worker_is_one_line(error):
    assert "a process that loads data was killed" in explain(error)
