"""Argument types, and the parser that they are for."""

import argparse

import pytest
import torch

from harness import arguments, machine
from harness.arguments import LARGEST_LEARNING_RATE, LEAST_LEARNING_RATE, learning_rate, threads, workers
from harness.precision import add_half_precision


@pytest.mark.parametrize(("cores", "names"), [(1, ("resnext_1_worker_128", "simcls_1_worker")),
                                              (8, ("resnext_2_worker_128", "simcls_4_worker"))])  # fmt: skip
def test_the_default_of_workers_is_within_the_cores_and_named(cores, names, monkeypatch):
    import experiment
    from scorer import scorer_arguments

    monkeypatch.setattr(arguments, "usable_cores", lambda: cores)
    found = [script.run_name(script.get_args_parser("").parse_args([])) for script in (experiment, scorer_arguments)]
    assert tuple(found) == names


def test_workers_are_bounded_by_the_usable_cores():
    most = max(64, 8 * machine.usable_cores())
    assert [workers("0"), workers(str(most)), threads("1")] == [0, most, 1]
    with pytest.raises(argparse.ArgumentTypeError, match=f"'0' is not a whole number from 1 to {most}$"):
        threads("0")
    for text in (str(most + 1), "100000", "-1", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"is not a whole number from 0 to {most}$"):
            workers(text)


def test_a_learning_rate_fits_into_float32():
    assert learning_rate("0.01") == 0.01
    assert learning_rate("1e37") == LARGEST_LEARNING_RATE
    assert learning_rate("1e-12") == LEAST_LEARNING_RATE
    for text in ("0", "-1", "1e-13", "1e-300", "1.1e37", "1e38", "inf", "nan", "fast"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number from 1e-12 to 1e\+37$"):
            learning_rate(text)


def test_at_the_least_learning_rate_a_tiny_weight_still_changes():
    weight = torch.nn.Parameter(torch.full([1], 1e-5))
    optimizer = torch.optim.Adam([weight], lr=LEAST_LEARNING_RATE)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() < torch.tensor(1e-5).item()


@pytest.mark.parametrize("kind", ["positive_int", "seed", "workers", "threads", "positive_float", "learning_rate"])
def test_numbers_are_of_plain_digits(kind):
    read = getattr(arguments, kind)
    assert read("16") == read("+16") == read("016") == 16
    for text in ("３２", "1_6", "١", "1\u00a0", "²"):  # The digits of other scripts, and a space of theirs.
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            read(text)


@pytest.mark.parametrize("unnamed", ["float16", "bfloat16", "auto"])
def test_half_precision_that_names_no_type_is_the_scripts_own(unnamed):
    parser = arguments.OneLineParser()
    add_half_precision(parser, "autocast", unnamed)
    for words in ([], ["True"], ["yes"], ["1"], ["auto"]):
        assert parser.parse_args(["--half_precision", *words]).half_precision == unnamed, words
    assert parser.parse_args(["--half_precision", "fp16"]).half_precision == "float16"
    assert parser.parse_args(["--half_precision", "False"]).half_precision is None
    assert parser.parse_args([]).half_precision is None


def test_help_shows_the_defaults_that_say_something():
    parser = arguments.OneLineParser()
    parser.add_argument("--size", type=int, default=7, help="of it")
    parser.add_argument("--name", help="what it is called")
    parser.add_argument("--loud", action="store_true", help="be heard")
    text = parser.format_help()
    assert "of it (default: 7)" in text
    assert text.count("default") == 1


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_largest_learning_rate_does_not_end_the_optimizer(kind, foreach):
    weight = torch.nn.Parameter(torch.ones(3))
    if kind == "adam":
        optimizer = torch.optim.Adam([weight], lr=LARGEST_LEARNING_RATE, weight_decay=5e-4, foreach=foreach)
    else:
        optimizer = torch.optim.SGD([weight], lr=LARGEST_LEARNING_RATE, momentum=0.9, nesterov=True, foreach=foreach)
    for _ in range(3):
        weight.grad = torch.ones(3)
        optimizer.step()
