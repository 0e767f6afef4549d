"""What a benchmark times has been checked before: a side that computes something slightly else is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_inputs
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import layout
import loading
import rouge
import scorer_step


def refused(monkeypatch, benchmark, *args):
    """What the benchmark says as it refuses to time its sides."""
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, *map(str, args)])
    monkeypatch.setattr(benchmark, "new_record", lambda *_, **facts: pytest.fail("the sides were taken for equal"))
    with pytest.raises(AssertionError) as found:
        benchmark.main()
    return str(found.value)


def test_a_form_of_a_convolution_that_is_off_by_a_thousandth(monkeypatch):
    right = layout.FORMS["dense"]
    monkeypatch.setitem(layout.FORMS, "dense", lambda *operands, **how: 1.001 * right(*operands, **how))
    arguments = layout.get_args_parser().parse_args(["--batch_size", "2", "--precision", "fp32", "--rounds", "1"])
    with pytest.raises(AssertionError, match="^dense NCHW fp32 .*: off by 1.0e-03$"):
        layout.measure(layout.Shape(8, 2, 4, 1), arguments, torch.device("cpu"))


@pytest.mark.parametrize("change", [lambda number: 1 / 255, lambda number: float("nan") if number else 0.0])
def test_a_loader_whose_images_are_one_level_of_grey_off_or_nan_from_the_second_batch_on(monkeypatch, pictures, change):
    right = loading.DeviceImages.__iter__

    def wrong(self):
        for number, (images, labels) in enumerate(right(self)):
            yield images + change(number), labels

    monkeypatch.setattr(loading.DeviceImages, "__iter__", wrong)
    told = refused(monkeypatch, loading, "--dataset", "folder", "--data_dir", pictures, "--batch_size", 8)
    assert told.startswith("the device loader is off by ")


def test_scores_that_differ_in_the_ninth_digit(monkeypatch, tmp_path):
    table, right = tiny_inputs.make_table(tmp_path / "texts.csv"), rouge.score
    monkeypatch.setattr(rouge, "score", lambda *texts: np.array(right(*texts)) + 1e-9)
    told = refused(monkeypatch, rouge, "--data", table, "--documents", 3, "--num_workers", 1)
    assert told == "our scores differ from rouge-score's"


def test_no_largest_difference_leaves_out_a_nan(monkeypatch):
    monkeypatch.setattr(rouge, "difference", lambda number: number)
    assert np.isnan(rouge.largest_difference([0.0, float("nan"), 0.0], 1))
    arms = {}
    for name, loss in {"ours": 1.0, "original": 1.0, "published": float("nan")}.items():
        losses = (loss for _ in range(1))
        optimizer = SimpleNamespace(zero_grad=lambda: None)
        arms[name] = SimpleNamespace(losses=lambda losses=losses: losses, steps_an_update=1, optimizer=optimizer)
        arms[name].follow, arms[name].order = lambda order: None, None
    assert np.isnan(scorer_step.largest_difference(arms))


def test_losses_of_a_scorer_that_differ_in_the_fourth_digit(monkeypatch, tmp_path):
    right, table = scorer_step.ranking_loss, tmp_path / "texts.csv"
    words = tiny_inputs.WORDS * 60
    rows = [
        f"{' '.join(words[place : place + 60])} {place},{words[place]} {place}" for place in range(scorer_step.UPDATE)
    ]
    table.write_text("\n".join(["abstract,title", *rows]))
    monkeypatch.setattr(scorer_step, "ranking_loss", lambda *scores, **how: 1.0001 * right(*scores, **how))
    told = refused(monkeypatch, scorer_step, "--data", table, "--updates", 1, "--layers", 1, "--heads", 1)
    assert told == "the arms' losses differ"
