"""--dry_run: what a run would take, and that nothing is written."""

import re
import shutil
from types import SimpleNamespace

import launch
import pytest
import torch
from data_utils import SampleSet, tokenize_samples
from model import load_scorer
from run_description import describe_prospects
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiment import get_args_parser
from harness.distributed import World
from harness.memory import SavedBytes
from images import load_images
from models.resnext import ResNeXt
from scorer.scorer_run import ScorerRun
from texts.samples import read_sample, sample_files

CPU = torch.device("cpu")
TINY = "--dataset folder --model resnext29_1x4d --batch_size 8 --num_worker 0 --num_epoch 3 --lr 0.002"


@pytest.mark.parametrize("more", [["--save_every", 0], ["--batch_size", 44, "--resume"]])
def test_a_dry_run_tells_its_steps_and_writes_nothing(pictures, tmp_path, more):
    ended = launch.run("resnext/resnext.py", *TINY.split(), "--data_dir", pictures, *more, "--dry_run", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert list(tmp_path.iterdir()) == []
    *_, steps, last = ended.out.splitlines()
    counts = (
        ("6 steps", "3") if "--save_every" in more else ("1 steps", "1")
    )  # An epoch of one step has no warm-up after it.
    assert steps.startswith(f"{counts[0]} per epoch, ")
    assert f"(the median of {counts[1]}); 3 epochs with evaluation would take about " in steps
    assert last == "--dry_run: nothing was written"


def prospects(pictures, policy=None, plan=None):
    """(the numbers in describe_prospects' lines, the model, the first line) for steps of 100 ms, forward 40 ms."""
    args = get_args_parser("").parse_args(TINY.split())
    args.policy, model = policy, ResNeXt(1, 4, num_classes=2)
    optimizer = torch.optim.Adam(model.parameters())
    functional.cross_entropy(model(torch.zeros(2, 3, 32, 32)), torch.zeros(2, dtype=torch.long)).backward()
    optimizer.step()
    phases = {"step": 100.0, "forward": 40.0}
    phases = {
        name: {"count": 3, "device_ms": None, "host_ms": {"median": ms, "total": 1e3}} for name, ms in phases.items()
    }
    run = SimpleNamespace(
        args=args, facts={"precision": "fp32", "parameters": 9} | ({"plan": plan} if plan else {}),
        seconds={"start_up_seconds": 2.0}, world=World(0, 1, CPU),
        state={"data": load_images("folder", pictures), "model": model, "optimizer": optimizer},
    )  # fmt: skip
    lines = describe_prospects(run, {"phases": phases, "peak_memory": None})
    numbers = [float(number) for line in lines for number in re.findall(r"(?<![\w.:])\d+(?:\.\d+)?(?![\d:])", line)]
    return numbers, model, lines[0]


def test_a_dry_run_foretells_flops_memory_and_seconds(pictures):
    found, model, first = prospects(pictures)
    assert first.startswith("9 parameters; about ")
    images, mib = torch.zeros(8, 3, 32, 32), 2**20
    with FlopCounterMode(display=False) as counter, SavedBytes(model) as saved:
        model(images)
    parameters = sum(weight.numel() for weight in model.parameters())
    _, gflop, kept, peak, others, steps, step, count, epochs, seconds = found[:10]
    assert gflop == pytest.approx(3 * counter.get_total_flops() / 1e9, rel=1e-3)
    assert kept == pytest.approx(saved.bytes / mib, abs=0.06)
    assert peak >= kept
    assert others == pytest.approx(16 * parameters / mib, abs=0.06)  # Weights, gradients and two moments.
    assert (steps, step, count, epochs) == (6, 0.1, 3, 3)
    assert seconds == round(3 * (44 * 0.1 + 10 * 0.04) / 8 + 2)


def test_a_dry_run_foretells_what_a_policy_and_a_plan_keep(pictures):
    plain, block = (prospects(pictures, policy)[0] for policy in (None, "block"))
    planned = prospects(pictures, plan={"redo": ["stem.relu1"]})[0]
    assert block[2] < planned[2] < plain[2]
    assert block[1] > plain[1]
    nested, _, first = prospects(pictures, "nested")
    assert first.startswith("9 parameters; at least ")
    assert nested[1] == plain[1]


def test_a_dry_run_of_the_scorer_counts_no_backward_through_frozen_layers(encoders, sample_folder):
    scorer, encoding, _ = load_scorer(encoders["bert"], total_len=60, max_len=20)
    samples = [read_sample(path) for path in sample_files(sample_folder / "val")[:2]]
    batch = SampleSet(tokenize_samples(samples, encoding, 16), encoding, "cpu").batch([0, 1])
    run = SimpleNamespace(
        facts={"precision": "fp32"}, world=World(0, 1, CPU),
        state={"scorer": scorer, "metrics": SimpleNamespace(last_batch=batch)},
    )  # fmt: skip
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        scorer(batch)
    fused = FlopCounterMode(display=False)
    with fused, torch.no_grad():
        scorer(batch)
    assert fused.get_total_flops() < counter.get_total_flops()  # It does not count the attention.
    forward, whole = counter.get_total_flops(), ScorerRun._flops(run)
    assert whole == pytest.approx(3 * forward, rel=0.05)
    scorer.recompute_activations()
    redone = ScorerRun._flops(run)
    assert whole < redone <= whole + forward
    scorer.freeze_layers(1)
    assert forward < ScorerRun._flops(run) < redone
    assert all(weight.grad is None for weight in scorer.parameters())


def test_a_dry_run_of_the_scorer_writes_nothing(sample_folder, encoders, tmp_path):
    shutil.copytree(sample_folder, tmp_path / "samples", ignore=shutil.ignore_patterns("*.tokens"))
    (tmp_path / "samples" / "train" / "provenance.json").write_text('{"digest": "a", "cand_num": 6}')
    before = sorted(tmp_path.rglob("*"))
    words = "--dataset samples --num_workers 0 --batch_size 4 --accumulate_step 3 --num_epoch 2 --eval_freq 1"
    words += " --total_len 60 --max_len 20 --resume -l --max_num 4 --dry_run"
    ended = launch.run("SimCLS/main.py", *words.split(), "--model_type", encoders["bert"], cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert sorted(tmp_path.rglob("*")) == before
    assert "warning: of 6 candidates a document, --max_num 4 are used" in ended.out
    figures, steps, last = ended.out.splitlines()[-3:]
    assert re.fullmatch(
        r"32,064 parameters; about [\d.]+ GFLOP per step, .* [1-9][\d.]* MiB kept from forward .*", figures
    )
    assert re.fullmatch(
        r"11 steps and 4 updates per epoch, \S+ s per step \(the median of 3\); 2 epochs with 4 validations .*", steps
    )
    assert last == "--dry_run: nothing was written"
