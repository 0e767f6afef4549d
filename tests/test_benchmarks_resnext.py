"""The benchmarks of ResNeXt, run as a user runs them with tiny sizes: they check, measure and write whole records."""

import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from run_records import read_table

sys.path.append(str(ROOT / "benchmarks"))

import fast
import fast_steps
import layout
import memory
import memory_steps

from harness.endings import UserError
from harness.loading import EpochBatches, worker_loader
from layouts import Layout
from models.resnext import ResNeXt, parse_name
from models.resnext_checkpoint import CheckpointResNeXt
from reporting import benchmarks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYOUT = Layout(True, "groups")


def record_of(run_script, script, path, *args):
    printed = run_script(f"benchmarks/{script}.py", *args, "--output", path).stdout
    record = json.loads(path.read_text())
    assert record["benchmark"] == script
    assert record["machine"]["versions"]["torch"] == torch.__version__
    return record, printed


def test_loading(run_script, pictures, tmp_path):
    record, printed = record_of(run_script, "loading", tmp_path / "record.json", "--dataset", "folder", "--data_dir",
                                pictures, "--batch_size", 16, "--rounds", 2, "--threads", 1)  # fmt: skip
    assert record["largest_difference"] <= 1e-6
    assert record["pictures"] == 44
    assert len(record["seconds"]["original"]) == 2
    assert record["ratios"]["device loader, channels_last, 1 thread"]["low"] > 0
    assert "original: " in printed
    assert [row["n"] for row in read_table(benchmarks.render({"here": [record]}))] == ["2", "2"]


def test_layout(run_script, tmp_path):
    record, _ = record_of(run_script, "layout", tmp_path / "record.json", "--models", "resnext29_2x4d",
                          "--batch_size", 2, "--rounds", 1, "--precision", "fp32")  # fmt: skip
    assert [(row["form"], row["layout"]) for row in record["totals"]] == [
        (form, place) for form in ("groups", "separate", "dense") for place in ("NCHW", "NHWC")
    ]
    # Five shapes: one in the first stage, and in each other the first, which strides, and the rest.
    assert sum(row["count"] for row in record["by_shape"]["rows"]) == 9 * 6
    assert len(record["by_shape"]["rows"]) == 5 * 6


@pytest.mark.parametrize("form", layout.FORMS.values())
@pytest.mark.parametrize("stride", [1, 2])
def test_forms_of_a_grouped_convolution_are_one(form, stride):
    torch.manual_seed(0)
    shape = layout.Shape(12, 3, 8, stride)
    x, weight = torch.randn(2, 12, 8, 8, dtype=torch.float64), torch.randn(12, 4, 3, 3, dtype=torch.float64)
    expected = layout.call_once(layout.FORMS["groups"], x, weight, shape)
    for ours, right in zip(layout.call_once(form, x, weight, shape), expected, strict=True):
        assert torch.allclose(ours, right)


def test_memory(run_script, tmp_path):
    arms = ["chain", "torch.utils.checkpoint", "budget 0.5", "compile 0.5", "budget held as compile 0.5",
            "budget peak as compile 0.5"]  # fmt: skip
    args = ["--model", "resnext29_2x16d", "--batch_size", 2, "--steps", 1, "--rounds", 1, "--timed_batch_size", 2]
    record, printed = record_of(run_script, "memory", tmp_path / "record.json", *args, "--policies", *arms)
    rows = {row["policy"]: row for row in record["rows"]}
    assert rows.keys() == {"plain", *arms}
    assert (record["steps"], record["rounds"]) == (1, 1)
    compiled = rows["compile 0.5"]
    assert compiled["share"] <= 0.51
    assert compiled["bytes"] < compiled["peak_bytes"] < rows["plain"]["peak_bytes"]
    assert rows["budget 0.5"]["peak_share"] <= 0.5
    assert rows["budget held as compile 0.5"]["share"] <= compiled["share"]
    assert rows["budget peak as compile 0.5"]["peak_share"] <= compiled["peak_share"]
    assert rows["torch.utils.checkpoint"]["share"] < 0.35
    assert rows["torch.utils.checkpoint"]["extra"] > 0.2
    assert rows["chain"]["extra"] == 0
    assert all(row["peak_bytes"] >= row["bytes"] for row in rows.values())
    timed = {row["policy"]: row for row in record["training"]}
    assert timed.keys() == rows.keys()
    chain = timed["chain"]
    assert 0 < chain["step_low"] <= chain["step_times_plain"] <= chain["step_high"]
    assert (chain["batch_size"], chain["precision"]) == (2, "fp32")
    assert chain["peak_share"] == rows["chain"]["peak_share"]
    assert chain["predicted_step"] > 1
    text = benchmarks.render_tables({"here": [record]}, "memory")
    assert [row["policy"] for row in read_table(text, 1)] == list(timed)
    assert "Activation memory and recomputation: resnext29_2x16d" in printed
    errors = run_script("benchmarks/memory.py", "--policies", "chains", code=2).stderr
    assert "'chains' is unknown; choose from plain, torch.utils.checkpoint, chain" in errors


def test_live_bytes_follow_what_is_freed():
    model = torch.nn.Linear(5, 5)
    with memory.LiveBytes(model) as live:
        one = torch.zeros(1000)
        view = one[10:]
        assert live.now == 4000
        other = one + 1
        assert live.now == live.peak == 8000
        del one, view
        assert live.now == 4000
        del other
        torch.zeros(5, 5)  # Of a weight's shape.
        torch.zeros(10)  # Less than there was: the peak stays.
    assert (live.now, live.peak) == (0, 8000)


def test_followed_in_backward_alone_the_peak_is_the_same():
    """As compiled models are: forward adds nothing to the peak but what it saves."""
    torch.manual_seed(0)
    model = ResNeXt(2, 8).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    whole, from_saved = (memory.peak_bytes(model, images, labels, is_compiled) for is_compiled in (False, True))
    assert from_saved == pytest.approx(whole, rel=0.01)
    with memory.SavedBytes(model) as saved:
        F.cross_entropy(model(images), labels)
    assert from_saved > saved.bytes


@pytest.mark.parametrize("limit", [100, 128, 129, 300, 1000, 5000])
@pytest.mark.parametrize("free_for", [200, 700, 1100, 9000])
def test_the_largest_batch_is_found(monkeypatch, limit, free_for):
    """However far the memory that seems to be free is from what fits."""
    tried = []

    def steps(make, args, device, batch_size):
        tried.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError
        return SimpleNamespace(peak_bytes=1000 + 10 * batch_size)

    monkeypatch.setattr(memory_steps, "AdamSteps", steps)
    monkeypatch.setattr(memory_steps.gc, "collect", lambda: None)  # It takes half a second here.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 + 10 * free_for, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    assert memory_steps.largest_that_fits(None, None, None) == min(limit // 128 * 128, memory_steps.LARGEST_BATCH)
    if abs(limit - free_for) < 128:
        assert len(tried) <= 5


def test_a_claim_that_does_not_hold_is_told():
    row = {"policy": "budget 0.394", "share": 0.3, "bytes": 100, "predicted_bytes": 100, "extra": 0.1,
           "peak_share": 0.39, "peak_bytes": 200, "predicted_peak_bytes": 200}  # fmt: skip
    claims = functools.partial(memory.broken_claims, rows={}, model="resnext29_4x64d", device=CPU)
    assert claims(row) == []
    bad = row | {"peak_share": 0.4, "predicted_bytes": 104, "predicted_peak_bytes": 190, "extra": 0.11}
    assert claims(bad) == [
        "recomputes 11.00 % of the FLOPs, over 10.10 %",
        "its held bytes are not as predicted: off by 4.0 %",
        "its peak share is 0.400, over 0.394",
        "its peak bytes are not as predicted: off by 5.0 %",
    ]
    hidden = {"policy": "compile 0.5", "share": 0.5, "bytes": 100, "extra": 0.1, "peak_share": None, "peak_bytes": None}
    assert claims(hidden) == []  # Nobody knows the peak of Inductor's code on a CPU.
    assert len(claims(bad, model="resnext29_2x16d")) == 3  # The FLOPs are a claim of the large model.
    compiled = {"compile 0.25": {"share": 0.25, "peak_share": 0.7, "extra": 0.1}}
    like = row | {"policy": "budget held as compile 0.25", "share": 0.249}
    assert claims(like, rows=compiled) == []
    worse = claims(like | {"share": 0.3, "extra": 0.11}, rows=compiled)
    assert worse == ["recomputes 11.00 % of the FLOPs, over 10.01 %", "its held share is 0.300, over 0.250"]


def test_an_arm_that_is_wrong_or_fails_says_so_and_costs_no_other():
    class Wrong(ResNeXt):
        def forward(self, x):
            return super().forward(1.01 * x)

    class Failing(ResNeXt):
        def forward(self, x):
            raise RuntimeError("the compiler is ill\nand tells much")

    def make(kind, batch_size, precision):
        torch.manual_seed(0)
        return kind(1, 4).train()

    kinds = {"plain": ResNeXt, "wrong": Wrong, "failing": Failing, "plain again": ResNeXt}
    kinds["block"] = functools.partial(CheckpointResNeXt, policy="block")
    arms = {name: functools.partial(make, kind) for name, kind in kinds.items()}
    args = memory.get_args_parser().parse_args(["--batch_size", "2", "--timed_batch_size", "2", "--steps", "1"])
    rows = {row["policy"]: row for row in memory.count_all(arms, args, CPU, {})}
    assert list(rows) == list(kinds)
    assert rows["wrong"]["missed"].startswith("gradients off by ")
    assert rows["failing"] == {"policy": "failing", "missed": "the compiler is ill"}
    assert "missed" not in rows["plain"] | rows["plain again"]
    timed = {row["policy"]: row for row in memory_steps.train_all(arms, arms["plain"], args, CPU, {}, {})}
    assert timed["failing"] == rows["failing"]
    assert timed["plain again"]["step_times_plain"] > 0
    # Of the plain model, though that is no arm.
    (alone,) = memory_steps.train_all({"block": arms["block"]}, arms["plain"], args, CPU, {}, {})
    assert alone["saved_share"] == timed["block"]["saved_share"] < 0.5 < timed["plain again"]["saved_share"] == 1
    with pytest.raises(RuntimeError, match="ill"):
        list(memory.count_all({"plain": arms["failing"]}, args, CPU, {}))


@pytest.fixture(scope="module")
def fast_record(run_script, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    args = ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 4, "--steps", 9,
            "--rounds", 1]  # fmt: skip
    techniques = ["--techniques", "loading on the device", "channels last", "dense convolutions"]
    return record_of(run_script, "fast", folder / "record.json", *args, *techniques)


def test_fast(fast_record, pictures):
    record, printed = fast_record
    names = ["original", "loading on the device", "channels last", "dense convolutions", "resnext_fast.py"]
    rows = {row["technique"]: row for row in record["ablation"]}
    assert list(rows) == names
    chosen = min(record["layout_milliseconds"], key=record["layout_milliseconds"].get)
    assert [row["carried"] for row in rows.values()] == [
        True, True, chosen.startswith("channels last"), chosen.endswith("dense"), True
    ]  # fmt: skip
    assert rows["original"]["times_original"] == rows["original"]["times_original_low"] == 1.0
    # What is said of resnext_fast.py is said of the row that trains as it does, however fast the others were.
    fast_row, (limits,) = rows["resnext_fast.py"], record["limits"]
    assert limits["epoch_seconds"] == pytest.approx(44 / fast_row["pictures_per_second"])
    assert record["ratios"]["resnext_fast.py over the original"]["median"] == fast_row["times_original"]
    assert limits["times_the_larger_floor"] > 0
    text = benchmarks.render_tables({"here": [record]}, "fast")
    assert f": resnext29_1x4d, {pictures.name} (44 images), " in text
    assert [row["technique"] for row in read_table(text)] == names
    assert float(read_table(text, 1)[0]["epoch, s"]) == pytest.approx(limits["epoch_seconds"], rel=0.01)
    assert "Training speed, technique by technique: resnext29_1x4d" in printed


def test_a_row_that_computes_something_else_is_not_timed(monkeypatch, pictures):
    def steps(args, data, device):
        wrong = args.loader == "device"
        return SimpleNamespace(first_pass=wrong, loaded_ahead=0, precision=SimpleNamespace(label="fp32"))

    class Judge:
        def __init__(self, *args):
            pass

        def check(self, name, precision, found):
            assert not found, name
            return 0.0, 0.0

    monkeypatch.setattr(fast, "TrainingSteps", steps)
    monkeypatch.setattr(fast, "Exact", Judge)
    args = fast.get_args_parser().parse_args(["--dataset", "folder", "--data_dir", str(pictures), "--batch_size", "4"])
    rows = [fast.Row("original", ["--loader", "workers"]), fast.Row("other", ["--loader", "device"])]
    with pytest.raises(AssertionError, match="^other"):
        fast.checked_steps(rows, fast.load_images("folder", pictures), args, CPU)


def test_epochs_are_long_and_all_batches_full():
    batches = fast.LongEpochs(44, 8, seed=0)
    shares = list(batches.batches())
    assert len(shares) == 50_000 // 8
    assert all(len(share) == 8 for share in shares)
    counts = np.bincount(np.concatenate(shares), minlength=44)
    assert counts.max() - counts.min() <= 1
    assert len(list(fast.LongEpochs(60_000, 8, seed=0).batches())) == 60_000 // 8


def test_work_of_the_published_model_is_what_it_is_known_to_be():
    flops, elements = fast.forward_work("resnext29_4x64d")
    assert flops == pytest.approx(2 * 4.228e9, rel=1e-3)
    # What autograd saves of a plain run holds at least these: 50.5 MiB a picture.
    assert 0.4 * 50.5 < elements * 4 / 2**20 < 50.5


def test_on_cuda_everything_is_on_and_the_half_precision_of_the_original_is_an_arm(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fast, "ON_CUDA", True)
    rows = fast.make_rows(fast.get_args_parser().parse_args([]), torch.device("cuda"), LAYOUT)
    assert fast.fast_row(rows, fast.get_args_parser().parse_args([]), LAYOUT).label == "label smoothing"
    carried = {row.label: row.carried for row in rows}
    assert carried["original, float16"] is False
    assert all(carried[name] for name in ("loading on the device", "channels last", "bfloat16", "torch.compile"))
    last = [row for row in rows if row.carried][-1].args
    assert (last.loader, last.half_precision, last.optimizer) == ("device", "bfloat16", "muon")
    assert last.compile
    assert ResNeXt(*parse_name(last.model)).linear.in_features == 2048


@pytest.mark.parametrize("model", ["resnext29_2x16d", "resnext29_4x64d"])
@pytest.mark.parametrize("device", ["cpu", "cpu, bfloat16", "cuda"])
def test_targets_of_fast_are_of_cases_that_it_records(model, device):
    targets = fast.TARGETS[device]
    cases = [f"{model}, resnext_fast.py over the original" + end for end in ("", " in float16")]
    expected = {
        ("cpu", "resnext29_2x16d"): [1.5],
        ("cpu, bfloat16", "resnext29_2x16d"): [2.4],
        ("cuda", "resnext29_4x64d"): [5.0, 3.5],
    }
    assert [targets[case][1] for case in cases if case in targets] == expected.get((device, model), [])


def test_a_timed_round_pays_for_its_loading():
    """What the workers have loaded before the round starts is no help: none of it is trained on in the round."""
    training, trained_on = object.__new__(fast.TrainingSteps), []
    training.device, training.loaded_ahead, training.source = CPU, 8, iter(range(100))
    training.step = lambda: trained_on.append(next(training.source))
    training.run(1)
    training.run(2)
    assert trained_on == [8, 17, 18]


def test_what_the_workers_load_ahead():
    batches = EpochBatches(400, 1, seed=0)
    numbers = torch.utils.data.TensorDataset(torch.zeros(400), torch.zeros(400))
    assert fast_steps.loaded_ahead(worker_loader(numbers, batches, 2, CPU)) == 8
    assert fast_steps.loaded_ahead(worker_loader(numbers, batches, 0, CPU)) == 0


def test_a_round_shorter_than_what_is_loaded_ahead_is_refused():
    fast.check_enough_steps(9, 8)
    fast.check_enough_steps(1, 0)
    with pytest.raises(UserError, match="--steps 8: .* 8 batches"):
        fast.check_enough_steps(8, 8)


def test_the_peak_is_taken_after_the_warm_up(monkeypatch, pictures):
    """cuDNN tries its algorithms in the first steps, some with much memory: no such step comes after the reset."""
    order = []
    monkeypatch.setattr(fast_steps, "reset_peak_memory", lambda device: order.append("reset"))
    step = fast_steps.TrainingSteps.step
    monkeypatch.setattr(fast_steps.TrainingSteps, "step", lambda self: order.append("step") or step(self))
    flags = ["--dataset", "folder", "--data_dir", str(pictures), "--model", "resnext29_1x4d", "--batch_size", "4"]
    row = fast.Row("any", [*flags, "--channels_last", "True", "--grouped_convolution", "groups"])
    fast_steps.TrainingSteps(row.args, fast.load_images("folder", pictures), CPU)
    assert order == ["step"] * fast_steps.WARM_UP + ["reset", "step"]
