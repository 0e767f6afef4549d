"""The benchmarks of ResNeXt, run as a user runs them with tiny sizes: they check, measure and write whole records."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import fast
import layout
import memory

from models.resnext import ResNeXt

CPU = torch.device("cpu")


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
    assert "pictures/s against" in printed


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
    expected = layout.call_once(layout.groups, x, weight, shape)
    for ours, right in zip(layout.call_once(form, x, weight, shape), expected, strict=True):
        assert torch.allclose(ours, right)


def test_memory(run_script, tmp_path):
    record, _ = record_of(run_script, "memory", tmp_path / "record.json", "--model", "resnext29_2x16d",
                          "--batch_size", 2, "--compile_backend", "none", "--steps", 1, "--rounds", 1,
                          "--timed_batch_size", 2)  # fmt: skip
    rows = {row["policy"]: row for row in record["rows"]}
    assert rows["budget 0.5"]["share"] <= 0.5
    assert rows["torch.utils.checkpoint"]["share"] < 0.35
    assert rows["torch.utils.checkpoint"]["extra"] > 0.2
    assert rows["chain"]["extra"] == 0
    assert rows["chain"]["peak_bytes"] < 0.8 * rows["plain"]["peak_bytes"]
    assert all(row["peak_bytes"] >= row["bytes"] for row in rows.values())
    assert {row["policy"] for row in record["training"]["rows"]} == set(rows)


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
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("limit", [100, 128, 129, 1000, 5000])
def test_the_largest_batch_is_found(monkeypatch, limit):
    def trainer(make, args, device, batch_size):
        if batch_size > limit:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "Trainer", trainer)
    assert memory.largest_batch(None, None, None) == limit // 128 * 128


@pytest.fixture(scope="module")
def fast_record(run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    args = ["--model", "resnext29_1x4d", "--batch_size", 32, "--rounds", 2, "--techniques", "loading on the device",
            "channels last", "bfloat16", "--fast_epochs", 1, "--seeds", 0, 1, "--run_dir", folder / "runs"]  # fmt: skip
    return record_of(run_script, "fast", folder / "record.json", *args)


def test_fast(fast_record):
    record, printed = fast_record
    names = ["original", "loading on the device", "channels last", "bfloat16"]
    assert [row["technique"] for row in record["ablation"]] == names
    assert [row["carried"] for row in record["ablation"]] == [True, True, True, False]
    assert record["ratios"]["over the original"]["original"]["median"] == 1.0
    assert record["limits"]["times_the_larger_floor"] > 0
    (accuracy,) = record["accuracy"]
    assert accuracy["seeds"] == 2
    assert accuracy["test_acc_deviation"] is not None
    assert "not carried on" in printed


def test_work_of_the_published_model_is_what_it_is_known_to_be():
    flops, elements = fast.forward_work("resnext29_4x64d")
    assert flops == pytest.approx(2 * 4.228e9, rel=1e-3)
    # What autograd saves of a plain run holds at least these: 50.5 MiB a picture.
    assert 0.4 * 50.5 < elements * 4 / 2**20 < 50.5


def test_on_cuda_everything_is_on_and_the_half_precision_of_the_original_is_an_arm(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = fast.make_rows(fast.get_args_parser().parse_args([]), torch.device("cuda"))
    carried = {row.label: row.carried for row in rows}
    assert carried["original, float16"] is False
    assert all(carried[name] for name in ("loading on the device", "channels last", "bfloat16", "torch.compile"))
    last = [row for row in rows if row.carried][-1].args
    assert (last.loader, last.half_precision, last.optimizer) == ("device", "bfloat16", "sgd")
    assert last.compile
    assert ResNeXt(*fast.parse_name(last.model)).linear.in_features == 2048


def test_seconds_until_an_accuracy():
    epochs = [{"timing": {"seconds": 2.0}, "test_acc": accuracy} for accuracy in (50.0, 94.0, 93.0)]
    assert fast.seconds_until(94.0, epochs) == 4.0
    assert fast.seconds_until(95.0, epochs) is None
