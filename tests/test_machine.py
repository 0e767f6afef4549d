"""What a record says of its machine: the commit, the hardware's name, and the precision that ran."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness import machine, precision

CPU = torch.device("cpu")


def test_a_commit_is_dirty_where_a_tracked_file_that_runs_depend_on_has_changed(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine._git_commit() is None
    for name in ("loop.py", "README.md"):
        (tmp_path / name).write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = machine._git_commit()
    assert len(clean) == 12
    (tmp_path / "README.md").write_text("two")
    (tmp_path / "untracked.py").write_text("two")
    assert machine._git_commit() == clean
    monkeypatch.setitem(sys.modules, "untracked", SimpleNamespace(__file__=str(tmp_path / "untracked.py")))
    assert machine._git_commit() == f"{clean}-dirty"
    monkeypatch.delitem(sys.modules, "untracked")
    (tmp_path / "loop.py").write_text("two")
    assert machine._git_commit() == f"{clean}-dirty"
    # Unpacked within another repository, whose commit says nothing.
    monkeypatch.setattr(machine, "ROOT", tmp_path / "unpacked")
    machine.ROOT.mkdir()
    assert machine._git_commit() is None


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"avx2"}, "AMD EPYC, 2 cores, AVX2"),
        ({"avx2", "avx512f"}, "AMD EPYC, 2 cores, AVX-512"),
        ({"avx2", "avx512f", "avx512_bf16"}, "AMD EPYC, 2 cores, AVX-512, bfloat16"),
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, "AMD EPYC, 2 cores, AVX-512, bfloat16, AMX"),
        ({"asimd", "bf16"}, "AMD EPYC, 2 cores, NEON, bfloat16"),
        (set(), "AMD EPYC, 2 cores"),
    ],
)
def test_a_processor_is_named_with_what_it_can_multiply(flags, name, monkeypatch):
    for limit in machine.LIMITS:
        monkeypatch.delenv(limit, raising=False)
    monkeypatch.setattr(machine, "_processor", lambda: ("AMD EPYC", flags))
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    assert machine.hardware_name(CPU) == name


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"DNNL_MAX_CPU_ISA": "avx2"}, "AVX-512, DNNL_MAX_CPU_ISA=avx2"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "AVX-512, bfloat16, ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"),
        (
            {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "ALL"},
            "AVX-512, bfloat16, AMX, ONEDNN_MAX_CPU_ISA=ALL, DNNL_MAX_CPU_ISA=AVX2",
        ),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "AVX-512, bfloat16, AMX, ATEN_CPU_CAPABILITY=avx2"),
        ({"MKL_CBWR": ""}, "AVX-512, bfloat16, AMX"),
    ],
)
def test_a_processor_whose_instructions_are_limited_is_another(limits, words, monkeypatch):
    for name in machine.LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "_processor", lambda: ("AMD EPYC", {"avx512f", "avx512_bf16", "amx_bf16"}))
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    assert machine.hardware_name(CPU) == f"AMD EPYC, 2 cores, {words}"
    assert machine.multiplies_bfloat16() == ("bfloat16" in words)
    told = machine.describe_machine(CPU)
    assert told["hardware"].endswith(words)
    assert limits.items() <= told["environment"].items()


def test_a_processor_is_named_without_its_trademarks(monkeypatch):
    told = "model name : Intel(R) Core(TM) i7\nflags : avx2\n"
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO(told))
    machine._processor.cache_clear()
    try:
        assert machine._processor() == ("Intel Core i7", {"avx2"})
    finally:
        machine._processor.cache_clear()


@pytest.mark.parametrize(
    ("capability", "allowed", "label"), [((8, 0), True, "tf32"), ((8, 0), False, "fp32"), ((7, 5), True, "fp32")]
)
def test_single_precision_on_a_gpu_is_called_what_it_is(capability, allowed, label, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert precision._label(None, SimpleNamespace(type="cuda")) == label
    assert precision._label(None, CPU) == "fp32"


def test_true_fp32_turns_tensorfloat_off_and_nothing_else_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    found = []
    for wanted in (False, True):
        label = precision.choose_precision(None, torch.device("cuda"), true_fp32=wanted).label
        found.append((label, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    assert found == [("tf32", True, True), ("fp32", False, False)]


def test_variables_that_change_times_are_told_without_folders(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so")
    monkeypatch.setenv("MALLOCATOR", "no")
    names = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY")
    for name in names:
        monkeypatch.setenv(name, "some")
    told = machine.describe_machine(CPU)["environment"]
    assert told["MALLOC_MMAP_MAX_"] == "0"
    assert {told[name] for name in names} == {"some"}
    assert told["LD_PRELOAD"] == "libjemalloc.so"
    assert "MALLOCATOR" not in told
