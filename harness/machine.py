"""What a reader needs to judge a measurement: the hardware, the versions and the commit."""

import contextlib
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from harness.files import ROOT, portable

UNKNOWN = "unknown"  # A commit.
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "nvtx")
# Linux's names of processor features, x86's and ARM's: the first vector extension found, and any of BFLOAT16_FLAGS.
VECTOR_INSTRUCTIONS = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
BFLOAT16_FLAGS, BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}, "bfloat16"
AMX_FLAG, AMX = "amx_bf16", "AMX"  # Instructions that multiply tiles of bfloat16.
# Variables that make the same computation faster or slower: threads and their cores, instructions, allocators.
ENVIRONMENT = re.compile(
    r"(OMP|GOMP|KMP|MKL|DNNL|ONEDNN|OPENBLAS|ATEN|MALLOC|PYTORCH|CUBLAS)_\w+"
    r"|LD_PRELOAD|GLIBC_TUNABLES|CUDA_LAUNCH_BLOCKING|NVIDIA_TF32_OVERRIDE"
)
# Those that keep libraries from instructions that the processor has. The library of the first two heeds the first.
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
LIMITS = (*ONEDNN_LIMITS, "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
# Limits of oneDNN, which multiplies bfloat16, that are below the instructions for it, and those just below AMX.
BELOW_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
BELOW_AMX = BELOW_BFLOAT16 | {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def describe_machine(device):
    """What a reader needs to judge a measurement: hardware, versions, commit and command, as a dict of plain JSON
    values."""
    import torch  # Imported here because preprocess.py uses usable_cores from this module and works without torch.

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    versions["torch"] = str(torch.__version__)  # With its build, as "+cu130"; the package's metadata may lack it.
    return {
        "device": device.type,
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
        "environment": portable({name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}),
        "versions": versions,
        "cuda": torch.version.cuda,
        "commit": _git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *portable(sys.argv[1:])]),
        "date": timestamp(),
    }


def same_pace(one, other):
    """Whether a computation takes as long in one place as in the other, as far as `describe_machine` tells."""
    return all(
        one[name] == other[name] for name in ("device", "hardware", "threads", "environment", "versions", "cuda")
    )


def timestamp():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def hardware_name(device):
    """The marketing name of the GPU; or that of the processor with its number of usable cores and its instruction sets,
    since processors of one name exist with and without them, and with LIMITS: "AMD EPYC, 2 cores, AVX-512, bfloat16".
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    name, flags = _processor()
    words = [name, f"{usable_cores()} cores"]
    words += next(([word] for flag, word in VECTOR_INSTRUCTIONS.items() if flag in flags), [])
    words += [BFLOAT16] * multiplies_bfloat16() + [AMX] * (AMX_FLAG in flags and _onednn_limit() not in BELOW_AMX)
    return ", ".join(words + [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)])


def multiplies_bfloat16():
    """Whether the processor has instructions for bfloat16 products, which may be used; without them they are several
    times slower than float32."""
    return bool(_processor()[1] & BFLOAT16_FLAGS) and _onednn_limit() not in BELOW_BFLOAT16


def _onednn_limit():
    """What limits oneDNN's instructions: the first variable that is set, even if to no name that it knows; or None."""
    return next((os.environ[name].upper() for name in ONEDNN_LIMITS if os.environ.get(name)), None)


@functools.cache
def _processor():
    """(name, set of flags) of the processor, as Linux reports them; elsewhere a name and no flags."""
    fields = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    name = fields.get("model name") or platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)", "", name), set(flags.split())  # "Intel Xeon", not "Intel(R) Xeon(R)".


def _git_commit():
    """The commit of this repository; None outside of a clone. It has "-dirty" if a tracked file that runs depend on has
    changed, or if this process has imported a file that is not tracked."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    # Figures, pages and records are the results of runs, not their input.
    results = (":!image", ":!docs", ":!*.md", ":!benchmarks/results")
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:  # Unpacked within another repository.
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(ROOT), *results)
        imported = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        untracked = git("ls-files", "--others", "--exclude-standard", "--", "*.py").splitlines()
        is_dirty = changed or any(str(ROOT / name) in imported for name in untracked)
        return git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(is_dirty)
    except (OSError, subprocess.SubprocessError):
        return None


def usable_cores():
    """The number of processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
