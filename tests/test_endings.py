"""The one line that stands for an error."""

import pytest
import torch

from harness import endings
from harness.endings import explain


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
    assert endings._reason("backend='inductor' raised:\nInductorError: no gcc.\n\nSet TORCHDYNAMO_VERBOSE=1") == (
        "InductorError: no gcc"
    )


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(),
                                   RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")])  # fmt: skip
def test_a_killed_data_worker_is_one_line(error):
    assert "a process that loads data was killed" in explain(error)
