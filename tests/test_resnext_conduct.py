"""How the ResNeXt scripts go about it: precision, loading, waiting, terminals, folders, and processes that agree."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, script_command
from launch import run_two

from experiment import ImageRun, Metrics, evaluate, get_args_parser
from harness.distributed import World
from harness.endings import UserError
from harness.epochs import Epoch
from harness.files import output_lock
from harness.loading import EpochBatches, worker_loader
from harness.machine import usable_cores
from harness.precision import choose_precision
from image_loaders import AugmentedImages
from images import load_images
from models.resnext import ResNeXt

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NAME = "resnext_0_worker_8_resnext29_1x4d_folder"


@pytest.fixture(scope="module")
def tiny(pictures):
    return ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 8,
            "--num_worker", 0, "--num_epoch", 1, "--lr", 0.002]  # fmt: skip


@pytest.mark.parametrize(("half", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_evaluation_runs_in_the_training_precision(pictures, half, dtype):
    seen = []
    model = ResNeXt(1, 4, num_classes=2)
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    data = load_images("folder", pictures)
    accuracy = evaluate(model, data, choose_precision(half, CPU), World(0, 1, CPU), 4, stop=False)
    assert set(seen) == {dtype}
    assert len(seen) == 3
    assert accuracy in {10.0 * count for count in range(11)}
    assert model.training


def test_float16_is_scaled_and_others_are_not():
    cuda = SimpleNamespace(type="cuda")
    assert choose_precision("float16", cuda).dtype == torch.float16
    assert not choose_precision("bfloat16", CPU).scaler.is_enabled()
    assert not choose_precision(None, CPU).scaler.is_enabled()
    said = []
    assert choose_precision("float16", CPU, say=said.append).label == "bf16"
    assert len(said) == 1
    assert said[0].startswith("half precision on a CPU is bfloat16")


def test_worker_loading_is_persistent_prefetched_and_pinned_for_cuda(pictures):
    dataset = AugmentedImages(load_images("folder", pictures), seed=0)
    batches = EpochBatches(44, 8, seed=0)
    loader = worker_loader(dataset, batches, 2, torch.device("cuda"))
    assert loader.persistent_workers
    assert loader.prefetch_factor >= 2
    assert loader.pin_memory
    assert not worker_loader(dataset, batches, 0, CPU).pin_memory
    loader = worker_loader(dataset, batches, 1, CPU)
    workers = []
    for epoch in range(2):
        batches.start(epoch)
        assert len(list(loader)) == 6
        workers.append([worker.pid for worker in loader._iterator._workers])
    assert workers[0] == workers[1]


def test_more_workers_than_cores_are_one_line_of_ours(pictures, recwarn):
    dataset, said = AugmentedImages(load_images("folder", pictures), seed=0), []
    for number in (usable_cores(), usable_cores() + 1):
        loader = worker_loader(dataset, EpochBatches(44, 44, seed=0), number, CPU, say=said.append)
    assert len(list(loader)) == 1
    (line,) = said
    assert line.startswith(f"--num_workers {usable_cores() + 1}: more workers than the {usable_cores()} cores here")
    assert not recwarn.list


def test_the_bar_of_a_resumed_epoch_begins_where_that_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ImageRun("resnext", "", get_args_parser("").parse_args(list(map(str, tiny))), World(0, 1, CPU))
    run.batches = EpochBatches(44, 8, seed=0)
    for done, seen in ((0, 0), (3, 24), (6, 44)):
        run.batches.start(0, done)
        bar = run.progress_bar(Epoch(run, 0, done))
        assert (bar.n, bar.total) == (seen, 44)


def test_the_bar_shows_the_running_loss_and_seldom_asks_for_it(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ImageRun("resnext", "", get_args_parser("").parse_args(list(map(str, tiny))), World(0, 1, CPU))
    metrics, clock, shown = Metrics(CPU), iter((100.0, 101.9, 102.1)), []
    for loss, label in ((1.0, 0), (3.0, 1)):
        metrics.add(torch.tensor(loss), torch.tensor([[2.0, 1.0]] * 4), torch.full((4,), label))
    bar = SimpleNamespace(disable=False, set_postfix=lambda words, refresh: shown.append(words))
    run.state = {"metrics": metrics}
    monkeypatch.setattr("experiment.time.perf_counter", lambda: next(clock))
    for _ in range(2):
        run.show_progress(bar)
    assert shown == [{"loss": "2.000", "acc": "50.00 %"}]
    run.show_progress(bar)
    assert len(shown) == 2


@pytest.mark.parametrize("broken", ["linear.weight", "bn1.running_var", "totals", None])
def test_an_epoch_after_which_no_run_could_go_on_is_not_taken_down(broken, tiny, tmp_path, monkeypatch):
    """The last gradients may be infinite where every loss was finite."""
    monkeypatch.chdir(tmp_path)
    run = ImageRun("resnext", "", get_args_parser("").parse_args(list(map(str, tiny))), World(0, 1, CPU))
    run.state = {"data": None, "model": ResNeXt(1, 4, num_classes=2), "metrics": Metrics(CPU)}
    tensors = run.state["model"].state_dict() | dict(run.state["metrics"].named_buffers())
    if broken:
        tensors[broken].view(-1)[0] = float("nan")
    run.state["optimizer"] = torch.optim.SGD(run.state["model"].parameters())
    assert run.may_go_on() == (broken is None)
    epoch = Epoch(run, 0, 6)
    epoch.timing = {"seconds": 1.0, "phases": {}, "peak_memory": None}
    if broken:
        what = "the loss became nan" if broken == "totals" else "weights became NaN or infinite"
        with pytest.raises(UserError, match=f"^{what} in epoch 1. Use a smaller --lr"):
            run.add_epoch(epoch, 50.0, 0.0)
    else:
        run.add_epoch(epoch, 50.0, 0.0)
    assert len(run.history) == (broken is None)


def test_metrics_wait_for_nothing_until_the_epoch_ends(monkeypatch):
    metrics = Metrics(CPU)

    def waits(*args):
        raise AssertionError("a step waited for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, waits)
        for loss, label in ((1.0, 0), (3.0, 1)):
            metrics.add(torch.tensor(loss), torch.tensor([[2.0, 1.0]] * 4), torch.full((4,), label))
        metrics.add(torch.tensor(9.0), torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), weight=0.0)
    assert metrics.result(World(0, 1, CPU)) == (2.0, 50.0)


def test_a_bar_on_a_terminal_and_plain_lines_when_piped(tiny, tmp_path):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # Without a width there is no bar.
    command = script_command("resnext/resnext.py", *tiny, "--num_epoch", 2, "--output_dir", tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, text=True)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 4096)
        except OSError:  # The other end was closed.
            break
    lines = process.communicate()[0].splitlines()
    os.close(parent)
    bar = shown.decode()
    assert "epoch 1/2" in bar
    assert " images" in bar
    assert "test_acc=" in bar
    assert "test_acc=" in bar
    assert [line.split(":")[0] for line in lines[3:-2]] == ["epoch 1/2", "epoch 2/2"]
    piped = subprocess.run([*command, "--restart"], capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    assert len(piped.stdout.splitlines()) == len(lines)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tiny, tmp_path):
    # A limit on the size of files stands in for a full disk: what a run keeps does not fit.
    code = "import resource, signal, sys, runpy; sys.argv = sys.argv[1:]\n" \
           "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n" \
           "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
           "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n" \
           "runpy.run_path(sys.argv[0], run_name='__main__')\n"  # fmt: skip
    command = [sys.executable, "-c", code, ROOT / "resnext/resnext.py", *tiny, "--output_dir", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert f"{NAME}.state: File too large" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.lock"]


RANKS_AGREE = """
import os, runpy, sys, torch
root, script, folder = sys.argv[1], sys.argv[2], sys.argv[3]
sys.argv = sys.argv[2:3] + sys.argv[4:]
sys.path[:0] = [script.rpartition("/")[0], root]
from harness import runs
import experiment
finish = experiment.ImageRun.finish
def spy(self, model):
    torch.save(model.state_dict(), f"{folder}/rank{os.environ['RANK']}.pt")
    return finish(self, model)
experiment.ImageRun.finish = spy
runpy.run_path(script, run_name="__main__")
"""


def weights_of_two(script, *args, folder):
    """What each of two processes has trained: their state dicts."""
    (folder / "agree.py").write_text(RANKS_AGREE)
    more = (ROOT, ROOT / script, folder, *args, "--output_dir", folder / "out")
    run_two(folder / "agree.py", *more, cwd=folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_processes_agree_and_count_every_test_picture_once(tiny, pictures, tmp_path):
    ranks = weights_of_two("resnext/resnext.py", *tiny, folder=tmp_path)
    recomputing = weights_of_two("resnext/resnext_checkpoint.py", *tiny, "--policy", "block", folder=tmp_path)
    for name, tensor in ranks[0].items():
        for other in (ranks[1], *recomputing):
            assert torch.equal(tensor, other[name]), name

    model = ResNeXt(1, 4, num_classes=2)
    model.load_state_dict(torch.load(tmp_path / "out" / f"{NAME}.pt"))
    data = load_images("folder", pictures)
    alone = evaluate(model, data, choose_precision(None, CPU), World(0, 1, CPU), 8, stop=False)
    curves = np.load(tmp_path / "out" / f"{NAME}.npz")
    assert curves["test_acc"].tolist() == [alone]
    assert json.loads((tmp_path / "out" / f"{NAME}.json").read_text())["epochs"][0]["timing"]["steps"] == 6


@pytest.mark.slow
def test_bad_data_is_told_by_one_process_of_a_job_and_without_a_traceback(tiny, tmp_path):
    more = ("--data_dir", tmp_path / "nowhere", "--output_dir", tmp_path)
    ranks = run_two("resnext/resnext.py", *tiny, *more, cwd=tmp_path, code=2)
    errors = "".join(rank.err for rank in ranks)
    assert errors.count("there is no folder") == 1
    assert "RuntimeError" not in errors


@pytest.mark.slow
def test_a_name_that_is_taken_is_told_once_by_a_job(tiny, tmp_path):
    """Only the main process has the lock, and the others end with it, quietly."""
    with output_lock(tmp_path / f"{NAME}.lock"):
        ranks = run_two("resnext/resnext.py", *tiny, "--output_dir", tmp_path, cwd=tmp_path, code=2)
    errors = "".join(rank.err for rank in ranks)
    assert errors.count("another run is writing") == 1
    assert "RuntimeError" not in errors
    assert "resnext.py: another process" not in errors


class Unshared(torch.utils.data.Dataset):
    """What no queue can take from one process to another, as a batch is where /dev/shm is full."""

    def __getitem__(self, index):
        return lambda: index


def test_a_worker_that_cannot_hand_over_a_batch_ends_the_run(capfd):
    loader = worker_loader(Unshared(), EpochBatches(4, 2, seed=0), 1, CPU, collate=list)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(iter(loader))
    assert capfd.readouterr().err == ""
