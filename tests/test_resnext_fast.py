"""resnext_fast.py: its schedule and optimizer, its switches, and that it learns, stops and goes on as the others do."""

import json
import sys

import launch
import numpy as np
import pytest
import resnext_fast
import torch
import torch.nn.functional as F
from conftest import ROOT
from resnext_fast import get_fast_args_parser, make_optimizer, one_cycle, suffix
from torch.utils.flop_counter import FlopCounterMode

from models.grouped_convolution import set_form
from models.resnext import ResNeXt

pytestmark = pytest.mark.slow

SCRIPT = "resnext/resnext_fast.py"
LAYOUT = ["--channels_last", True, "--grouped_convolution", "groups"]  # Else measured, and not the same each time.
NAME = "resnext_device_8_resnext29_1x4d_folder_fast_channels_last_True_grouped_convolution_groups"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(pictures):
    """The arguments of a run of 6 steps an epoch, the last of 4 pictures."""
    return ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 8,
            "--num_epoch", 3, "--lr", 0.02, "--half_precision", False, *LAYOUT]  # fmt: skip


@pytest.fixture(scope="module")
def finished(run_script, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_script(SCRIPT, *tiny, "--output_dir", folder)
    return folder


def test_one_cycle_rises_linearly_and_falls_to_zero():
    steps = 999
    factors = np.array([one_cycle(step, steps) for step in range(steps)])
    peak = factors.argmax()
    assert factors[peak] == pytest.approx(1.0)
    assert (peak + 1) / (steps + 1) == pytest.approx(resnext_fast.WARMUP)
    assert np.diff(factors[: peak + 1]) == pytest.approx(1 / (peak + 1))
    assert np.diff(factors[peak:]) == pytest.approx(-1 / (steps - peak))
    assert 0 < factors[-1] < 0.002
    assert 0 < factors[0] < 0.01


def test_sgd_decays_neither_batch_norm_nor_biases():
    model = ResNeXt(1, 4)
    optimizer = make_optimizer(model, "sgd", 0.1, CPU, torch.amp.GradScaler("cpu", enabled=False))
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    for layer in model.modules():
        for name, weight in layer.named_parameters(recurse=False):
            spared = isinstance(layer, torch.nn.BatchNorm2d) or name == "bias"
            assert decay.pop(id(weight)) == (0.0 if spared else 5e-4)
    assert not decay
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_a_first_step_that_overflows_leaves_no_stray_momentum():
    """As loss scaling has it: fused SGD keeps memory that nothing wrote, and goes on with it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 50)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = make_optimizer(model, "sgd", 0.1, CPU, scaler)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # With both, such memory is NaN.
    try:
        for scale in (float("inf"), 1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(scale * model(torch.ones(2, 50)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize(("optimizer", "groups"), [("sgd", 2), ("muon", 3)])
def test_the_rate_of_every_step_follows_the_cycle(tiny, tmp_path, optimizer, groups):
    spy = (
        "import torch\n"
        "step = torch.optim.SGD.step\n"
        "def spy(self, *args):\n"
        "    print('rate', *(group['lr'] for group in self.param_groups)); return step(self, *args)\n"
        "torch.optim.SGD.step = spy\n"
    )
    args = [*tiny, "--optimizer", optimizer, "--output_dir", "."]
    printed = launch.run(SCRIPT, *args, cwd=tmp_path, before=spy).out
    rates = [[float(word) for word in line.split()[1:]] for line in printed.splitlines() if line.startswith("rate")]
    assert rates == [[0.02 * one_cycle(step, 18)] * groups for step in range(18)]


def test_it_learns_and_writes_what_the_others_write(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        f"{NAME}{end}" for end in (".json", ".lock", ".npz", ".pt")
    ]
    record = json.loads((finished / f"{NAME}.json").read_text())
    assert record["experiment"] == "resnext_fast"
    losses = [epoch["loss"] for epoch in record["epochs"]]
    assert losses[-1] < losses[0]
    assert record["saved_activation_bytes"] > 8 * 1024 * 64 * 4
    assert record["epochs"][0]["timing"]["steps"] == 6
    weights = torch.load(finished / f"{NAME}.pt", weights_only=True)
    assert weights.keys() == ResNeXt(1, 4, num_classes=2).state_dict().keys()


STOP = f"""
import os, signal, sys
sys.path.insert(1, {str(ROOT)!r})
from harness import loading
weight, seen = loading.EpochBatches.weight, []
def spy(self, number):
    seen.append(number)
    if len(seen) == 5: os.kill(os.getpid(), signal.SIGTERM)
    return weight(self, number)
loading.EpochBatches.weight = spy
"""


def test_stopped_in_a_step_and_resumed_is_bit_equal(run_script, tiny, finished, tmp_path):
    args = [*tiny, "--output_dir", tmp_path]
    stopped = launch.run(SCRIPT, *args, cwd=tmp_path, before=STOP)
    assert stopped.code == 143, stopped.err
    state = torch.load(tmp_path / f"{NAME}.state", weights_only=True)["parts"]
    assert (state["epoch"], state["step"]) == (0, 5)
    run_script(SCRIPT, *args, "--resume")
    for end, load in ((".pt", torch.load), (".npz", np.load)):
        ours, theirs = (load(folder / f"{NAME}{end}") for folder in (tmp_path, finished))
        assert list(ours) == list(theirs)
        assert all(np.array_equal(np.asarray(ours[key]), np.asarray(theirs[key])) for key in ours)


def test_switched_off_it_is_the_baseline(run_script, tiny, tmp_path):
    """Bit for bit: the arms that the benchmark compares differ in their techniques alone."""
    off = ["--loader", "workers", "--num_worker", 0, "--half_precision", False, "--channels_last", False,
           "--compile", False, "--optimizer", "adam", "--label_smoothing", 0]  # fmt: skip
    run_script(SCRIPT, *tiny, *off, "--output_dir", tmp_path)
    run_script("resnext/resnext.py", *tiny[: -len(LAYOUT)], "--num_worker", 0, "--output_dir", tmp_path)
    baseline = torch.load(tmp_path / "resnext_0_worker_8_resnext29_1x4d_folder.pt")
    (path,) = tmp_path.glob("*_fast_channels_last_False_*_optimizer_adam_label_smoothing_0.0.pt")
    ours = torch.load(path)
    assert all(torch.equal(baseline[name], ours[name]) for name in baseline)


def test_both_layouts_compute_the_same():
    torch.manual_seed(0)
    model = ResNeXt(2, 4).double().train()
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format).zero_grad()
        loss = F.cross_entropy(model(images.contiguous(memory_format=memory_format)), labels)
        loss.backward()
        results.append(torch.cat([loss.detach()[None], *(weight.grad.flatten() for weight in model.parameters())]))
    assert torch.allclose(*results, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("form", ["separate", "dense"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_form_of_the_grouped_convolutions_computes_the_same(form, memory_format, monkeypatch):
    convolve, calls = F.conv2d, []
    monkeypatch.setattr(F, "conv2d", lambda *args, **more: calls.append(1) or convolve(*args, **more))
    torch.manual_seed(0)
    model = ResNeXt(2, 4).double().train().to(memory_format=memory_format)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=memory_format)
    results, flops, counts = [], [], []
    for each in ("groups", form):
        set_form(model, each)
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss = F.cross_entropy(model(images), torch.arange(4))
        loss.backward()
        results.append(torch.cat([loss.detach()[None], *(weight.grad.flatten() for weight in model.parameters())]))
        flops.append(counter.get_total_flops())
        counts.append(len(calls))
        calls.clear()
    assert torch.allclose(*results, rtol=1e-6, atol=1e-12)
    # That it did run: dense does more work, and each of the nine grouped convolutions is two where they are separate.
    assert (flops[1] > flops[0]) == (form == "dense")
    assert counts == [31, 40 if form == "separate" else 31]


def test_a_form_is_an_argument_and_part_of_the_name(run_script, tiny, tmp_path):
    flags = ["--grouped_convolution", "dense", "--num_epoch", 1]
    run_script(SCRIPT, *tiny, *flags, "--output_dir", tmp_path)
    assert (tmp_path / f"{NAME.removesuffix('groups')}dense.pt").is_file()
    errors = run_script(SCRIPT, *tiny, "--grouped_convolution", "tall", code=2).stderr
    assert errors.count("\n") == 1
    assert "--grouped_convolution" in errors


@pytest.mark.parametrize("redone", [["--policy", "block"], ["--memory_budget", 0.8]], ids=["policy", "budget"])
def test_recomputation_changes_no_result(run_script, tiny, tmp_path, redone):
    """Together with all that is fast on a CPU: channels last, bfloat16, SGD."""
    args = [*tiny, "--half_precision", "bfloat16", "--num_epoch", 2, "--output_dir", tmp_path]
    run_script(SCRIPT, *args)
    printed = run_script(SCRIPT, *args, *redone).stdout
    name, other = sorted((path.stem for path in tmp_path.glob("*.pt")), key=len)
    assert other == name + {"--policy": "_block", "--memory_budget": "_budget0.8"}[redone[0]]
    plain, ours = (torch.load(tmp_path / f"{each}.pt") for each in (name, other))
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
    before, after = (json.loads((tmp_path / f"{each}.json").read_text()) for each in (name, other))
    assert after["saved_activation_bytes"] < 0.85 * before["saved_activation_bytes"]
    assert ("measured: peak" in printed) == (redone[0] == "--memory_budget")


def test_a_layout_is_measured_before_memory_is_planned_for_it(run_script, tiny, tmp_path):
    flags = ["--memory_budget", 0.8, "--max_steps", 1, "--output_dir", tmp_path]
    printed = run_script(SCRIPT, *tiny[: -len(LAYOUT)], *flags).stdout
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert len(record["layout"]["milliseconds_a_picture"]) == 6
    assert "plan: " in printed.partition("layout: ")[2]


def test_names_tell_what_was_switched(monkeypatch):
    def name(*flags):
        return suffix(get_fast_args_parser().parse_args(list(flags)))

    for able, kind in ((True, "bfloat16"), (False, None)):
        monkeypatch.setattr(resnext_fast, "multiplies_bfloat16", lambda able=able: able)
        assert get_fast_args_parser().parse_args([]).half_precision == kind
    assert name() == name("--keep_memory") == "_fast"
    assert name("--keep_memory", "False") == "_fast_keep_memory_False"
    assert name("--compile", "True", "--optimizer", "adam") == "_fast_compile_True_optimizer_adam"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert name() == "_fast"
    assert name("--compile", "False", "--label_smoothing", "0") == "_fast_compile_False_label_smoothing_0.0"
    args = get_fast_args_parser().parse_args([])
    assert args.half_precision == "bfloat16"
    assert args.compile
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9 - 2 * gpu, 0))
    assert get_fast_args_parser().parse_args([]).half_precision == "float16"  # The second is a Volta.
    # On such a machine, too, the CPU is no GPU; it has no instructions for bfloat16 here.
    args = get_fast_args_parser().parse_args(["--device", "cpu"])
    assert (args.half_precision, args.compile, suffix(args)) == (None, False, "_fast")
    assert name("--device", "cpu", "--compile", "True") == "_fast_compile_True"
    assert get_fast_args_parser().parse_args(["--device", "cuda:1", "--half_precision", "False"]).half_precision is None


def test_the_learning_rate_is_the_optimizers_own_unless_it_is_named():
    def rate(*flags):
        return get_fast_args_parser().parse_args(list(flags)).lr

    assert [rate(), *(rate("--optimizer", name) for name in ("sgd", "muon", "adam"))] == [0.1, 0.1, 0.1, 0.01]
    assert rate("--lr", "0.5", "--optimizer", "adam") == 0.5


def test_without_a_compiler_it_is_one_line_that_says_how_to_do_without(run_script, tiny, tmp_path):
    no_compiler = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    errors = run_script(SCRIPT, *tiny, "--compile", "--output_dir", tmp_path, code=2, fresh=True, **no_compiler).stderr
    (line,) = (line for line in errors.splitlines() if line.startswith("resnext_fast.py"))
    assert "torch.compile failed (" in line
    assert "No working C++ compiler found" in line
    assert "--compile False" in line
    assert "Traceback" not in errors


def test_only_full_batches_are_compiled_for(tiny, tmp_path, monkeypatch):
    """44 pictures: five batches of 8, then one of 4."""
    sizes = []

    def spy(model, *_):
        return lambda images: sizes.append(len(images)) or model(images)

    monkeypatch.setattr(resnext_fast, "compiled", spy)
    args = [*tiny, "--compile", "--num_epoch", 1, "--output_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    resnext_fast.main()
    assert sizes == [8] * 6  # The first is none of the epoch's: it compiles.


def test_compiled_it_computes_the_same(monkeypatch):
    real = torch.compile
    seen = {}

    def without_code_generation(model, dynamic, options):
        seen.update(options, dynamic=dynamic)
        return real(model, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_code_generation)
    args = get_fast_args_parser().parse_args(["--compile"])
    torch.manual_seed(0)
    model = ResNeXt(1, 4).train()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    assert torch.allclose(resnext_fast.compiled(model, args, True)(images), expected, rtol=1e-4, atol=1e-6)
    assert seen == {"force_layout_optimization": True, "triton.cudagraphs": False, "dynamic": False}
    args.max_autotune = True
    resnext_fast.compiled(model, args, True)
    assert seen["max_autotune"] is True
    assert seen["triton.cudagraphs"] is False


def test_bad_arguments_are_one_line(run_script, tiny):
    compiled = ["--policy", "nested", "--compile", "True"]
    for flags in (["--label_smoothing", 1.5], ["--optimizer", "adagrad"], compiled):
        errors = run_script(SCRIPT, *tiny, *flags, code=2).stderr
        assert errors.count("\n") == 1
        assert str(flags[0]) in errors
