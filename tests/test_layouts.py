"""The choice of a layout: what is left open is measured, on copies, and a resumed run keeps what was chosen."""

import argparse
import copy
from types import SimpleNamespace

import pytest
import torch

import layouts
from harness.distributed import World
from harness.precision import choose_precision
from layouts import Layout, choose_layout, fastest, open_layouts
from models.resnext import ResNeXt

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)
pytestmark = pytest.mark.quick


def test_what_the_arguments_name_is_not_open():
    assert len(open_layouts(None, None)) == 6
    assert open_layouts(True, None) == [Layout(True, form) for form in ("groups", "separate", "dense")]
    assert open_layouts(False, "dense") == [Layout(False, "dense")]


def test_the_race_is_won_by_the_least_and_left_by_those_far_behind():
    usual, calls = {"a": 3.0, "b": 1.0, "c": 1.1}, []

    def measure(arm):
        calls.append(arm)
        # The first time of each is warm-up, and the second time of the fastest is disturbed.
        return usual[arm] + 10.0 * (calls.count(arm) == 1) + 5.0 * (arm == "b" and calls.count(arm) == 2)

    ends = iter([0.0, 0.5, layouts.SECONDS + 0.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts.time, "perf_counter", lambda: next(ends))
        assert layouts._race(list(usual), measure) == usual
    assert calls == list("abcabcabcbc")


def test_measuring_leaves_the_model_and_the_random_state_alone():
    torch.manual_seed(0)
    model = ResNeXt(2, 4)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    options = open_layouts(None, None)
    best, taken = fastest(model, options, choose_precision(None, CPU), WORLD, batch_size=2, size=32)
    assert set(taken) == {str(each) for each in options}
    assert taken[str(best)] == min(taken.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_gpu_is_measured_with_the_batch_or_what_of_it_fits_into_memory(monkeypatch):
    seen = []

    def forward(self, images):
        seen.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.sum() * self.linear.weight.sum()

    class Gpu(str):  # Stands for a torch.device.
        type = "cuda"

    monkeypatch.setattr(ResNeXt, "forward", forward)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(layouts, "SECONDS", 1e9)
    monkeypatch.setattr(layouts, "_race", lambda arms, measure: {arm: measure(arm) for arm in arms})
    world = SimpleNamespace(device=CPU, size=1, sum=lambda values: values)
    monkeypatch.setattr(torch, "rand", lambda *shape, device, generator: torch.ones(shape))
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    world.device, precision = Gpu("cpu"), choose_precision(None, CPU)
    fastest(ResNeXt(1, 4), open_layouts(True, None), precision, world, batch_size=16, size=32)
    assert seen == [16, 8, 4, 4, 4, 4, 4]


def test_a_choice_is_taken_down_and_a_resumed_run_keeps_it(monkeypatch):
    measured = []

    def measure(model, options, *rest):
        measured.append(options)
        return options[-1], {str(each): 1.0 for each in options}

    monkeypatch.setattr(layouts, "fastest", measure)
    run = SimpleNamespace(facts={}, saved_facts=dict)
    args = argparse.Namespace(channels_last=None, grouped_convolution=None, deterministic=False, batch_size=8)

    data = SimpleNamespace(train_labels=range(100), size=32)

    def choose(**changes):
        return choose_layout(None, data, argparse.Namespace(**vars(args) | changes), WORLD, None, run)

    assert choose() == Layout(False, "dense")
    assert run.facts["layout"]["milliseconds_a_picture"]["contiguous, dense"] == 1.0
    assert choose(deterministic=True) == Layout(True, "groups")
    assert choose(channels_last=False, grouped_convolution="separate") == Layout(False, "separate")
    run.saved_facts = lambda: {"layout": {"channels_last": True, "form": "dense"}}
    assert choose() == Layout(True, "dense")
    assert len(measured) == 1


def test_a_layout_is_applied():
    model = Layout(True, "separate").apply(ResNeXt(2, 4))
    convolution = model.layer1[0].conv2
    assert convolution.form == "separate"
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_milliseconds_are_those_of_a_picture_in_the_mean_over_the_processes(monkeypatch):
    seconds = {
        Layout(True, form): taken for form, taken in zip(("groups", "separate", "dense"), (3, 1, 2), strict=True)
    }
    monkeypatch.setattr(layouts, "SECONDS", 1e9)  # All of a batch can be afforded.
    monkeypatch.setattr(layouts, "_race", lambda arms, measure: seconds)
    another = torch.tensor([0.0, 1500.0, 250.0])  # Another process has taken: there separate is slow.
    world = SimpleNamespace(device=CPU, size=2, sum=lambda values: values + another)
    best, taken = fastest(ResNeXt(1, 4), list(seconds), choose_precision(None, CPU), world, batch_size=4, size=8)
    assert list(taken.values()) == [375.0, 875.0, 375.0]
    assert best == Layout(True, "groups")
