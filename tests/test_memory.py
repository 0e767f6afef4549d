"""SavedBytes against a hand count and torch.profiler; and the memory that a process keeps."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn

from harness import memory
from harness.memory import SavedBytes, count_saved, peak_memory

CPU = torch.device("cpu")


def test_no_peak_memory_on_a_cpu():
    assert peak_memory(CPU) is None


def test_saved_bytes_by_hand():
    """Linear saves its input (its weight is the model's); ReLU its output, which the next Linear saves too: once."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    with SavedBytes(model) as saved:
        model(torch.randn(16, 32))
    assert saved.bytes == 4 * (16 * 32 + 16 * 64)


def test_saved_bytes_leave_out_buffers():
    """BatchNorm saves its input, and mean and deviation of each channel; the running ones are the model's."""
    model = nn.BatchNorm1d(1000)
    with SavedBytes(model) as saved:
        model(torch.randn(2, 1000, requires_grad=True))
    assert saved.bytes == 4 * (2 * 1000 + 2 * 1000)


def test_saved_bytes_count_a_view_as_its_storage_once():
    x = torch.randn(10, 10, requires_grad=True)
    with SavedBytes(nn.Identity()) as saved:
        y = x * 1.0
        y[:, :2].exp().sum() + y[:, 2:].pow(2).sum()
    # exp saves its result [10, 2]; pow a view of y, whose storage is whole.
    assert saved.bytes == 4 * (10 * 2 + 10 * 10)


@pytest.mark.parametrize("dims", [2, 3])
def test_saved_bytes_leave_out_autocasts_copies_of_weights(dims):
    """Saved are the cast input and the hidden layer, in half precision; the casts of the weights are no activations."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    images = torch.randn(16, 32) if dims == 2 else torch.randn(4, 4, 32)
    with SavedBytes(model) as saved, torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert saved.bytes == 2 * (16 * 32 + 16 * 64)
    convolution = nn.Conv2d(3, 8, 3, bias=False)
    with SavedBytes(convolution) as saved, torch.autocast("cpu", torch.bfloat16):
        convolution(torch.randn(2, 3, 16, 16))
    assert saved.bytes == 2 * (2 * 3 * 16 * 16)


def test_saved_bytes_count_what_is_made_of_a_weight_and_is_no_copy():
    model = nn.Linear(8, 8)
    with SavedBytes(model) as saved:
        model.weight.exp().sum()
    assert saved.bytes == 4 * 8 * 8


def test_saved_bytes_can_count_again():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
    saved, counts = SavedBytes(model), []
    for _ in range(3):
        with saved:
            model(torch.randn(16, 32))
        counts.append(saved.bytes)
    assert counts == [4 * (16 * 32 + 16 * 64)] * 3
    assert saved.first_time() is not saved


def test_saved_bytes_take_what_code_with_hooks_of_its_own_tells():
    model, hidden = nn.Linear(2, 2), torch.randn(100)
    with SavedBytes(model) as saved:
        count_saved(hidden)
        count_saved(hidden[:10])
        count_saved(model.weight)
    assert saved.bytes == 400


def test_saved_bytes_agree_with_the_allocator():
    """torch.profiler sees how much is allocated and not freed in forward: what is saved, and the output."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Tanh()
    )
    images = torch.randn(8, 3, 32, 32)
    with SavedBytes(model) as saved:
        output = model(images)
    del output
    with torch.profiler.profile(profile_memory=True) as profile:
        output = model(images)
    kept = sum(event.self_device_memory_usage + event.self_cpu_memory_usage for event in profile.key_averages())
    assert output.requires_grad  # It was alive when the profiler stopped; Tanh saves it. The images were there before.
    assert saved.bytes == pytest.approx(kept + images.nbytes, rel=0.01)


FAULTS = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from harness import memory

if {keep}:
    memory.keep_freed_memory()
for round in range(12):
    if round == 8:  # Until then, the heap grows around what lies in it.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**power) for power in (24, 23, 24, 23)]  # As activations: the last is the first to go.
    while held:
        held.pop()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library than glibc allocates")
def test_kept_memory_is_not_asked_for_again():
    """Each page that the system gives anew is a fault."""
    faults = {}
    for keep in (True, False):
        script = FAULTS.format(root=str(ROOT), keep=keep)
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        faults[keep] = int(result.stdout)
    assert 4 * faults[True] < faults[False]


def test_where_another_library_allocates_nothing_changes(monkeypatch):
    for found in (SimpleNamespace(), None):  # Without mallopt, as musl; and Windows, whose CDLL takes no None.
        monkeypatch.setattr(memory.ctypes, "CDLL", lambda name, found=found: found)
        memory.keep_freed_memory()
