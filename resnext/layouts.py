"""In which memory layout, and in which form of its grouped convolutions, a model trains fastest: measured, not known.

On one GPU and library release channels last doubles the speed of a grouped convolution, and on another it is 30 times
slower; on CPUs it depends on the instructions and the type.
"""

import copy
import itertools
import time
from typing import NamedTuple

import torch

from harness.devices import synchronize
from harness.endings import is_out_of_gpu_memory
from harness.loading import largest_batch
from models.grouped_convolution import FORMS, set_form

SECONDS = 1.0  # What the choice may take, about: a large model needs more for one step of each.
RACE_MARGIN = 1.2  # What was slower than the best by more is not measured again.


class Layout(NamedTuple):
    """channels_last: whether pictures and convolutions lie as NHWC. form: of FORMS."""

    channels_last: bool
    form: str

    @property
    def memory_format(self):
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def apply(self, model):
        """Lay `model` out so, and return it."""
        set_form(model, self.form)
        return model.to(memory_format=self.memory_format)

    def __str__(self):
        return f"{'channels last' if self.channels_last else 'contiguous'}, {self.form}"


def open_layouts(channels_last, form):
    """The Layouts that the arguments leave open; None leaves one open."""
    layouts = (True, False) if channels_last is None else (channels_last,)
    return [Layout(*each) for each in itertools.product(layouts, FORMS if form is None else (form,))]


def choose_layout(model, data, args, world, precision, run):
    """The Layout of a run: what its arguments say, what the state that it resumes has, or else what is fastest here.

    data: the ImageData. What is measured is told, and stands in the record.
    """
    options = open_layouts(args.channels_last, args.grouped_convolution)
    kept = run.saved_facts().get("layout")
    if kept:
        layout = Layout(kept["channels_last"], kept["form"])
    elif args.deterministic or len(options) == 1:
        layout, kept = options[0], options[0]._asdict()
    else:
        pictures = largest_batch(len(data.train_labels), args.batch_size, world.size)
        layout, taken = fastest(model, options, precision, world, pictures, data.size)
        kept = layout._asdict() | {"milliseconds_a_picture": taken, "measured": "not compiled"}
        slower = ", ".join(f"{name} {each:.3g}" for name, each in taken.items() if name != str(layout))
        world.say(f"layout: {layout}, {taken[str(layout)]:.3g} ms a picture ({slower})")
    run.facts["layout"] = kept
    return layout


def fastest(model, layouts, precision, world, batch_size, size):
    """(the Layout in which forward and backward of `model` take the least time, {str(layout): milliseconds a picture}).

    batch_size: of this process. size: of its pictures. As many of them as there is time for are taken at once, in the
    run's precision, on copies of the model: neither its statistics nor any random state changes. The processes of a job
    choose together.
    """
    one_each = {each.channels_last: each for each in layouts}  # The form is set for each step.
    copies = {channels_last: each.apply(copy.deepcopy(model)) for channels_last, each in one_each.items()}
    random = torch.Generator(world.device).manual_seed(0)

    def step(layout, pictures):
        trial = copies[layout.channels_last]
        set_form(trial, layout.form)
        images = torch.rand(pictures, 3, size, size, device=world.device, generator=random)
        images = images.to(precision.dtype or torch.float32, memory_format=layout.memory_format)
        synchronize(world.device)
        started = time.perf_counter()
        with precision.autocast():
            output = trial(images)
        output.float().square().mean().backward()
        trial.zero_grad(set_to_none=True)
        synchronize(world.device)
        return time.perf_counter() - started

    def race(most):
        # One picture leaves a GPU idle between launches, which would be timed; a batch may take a CPU too long.
        first = most if world.device.type == "cuda" else 1
        step(layouts[0], first)
        # Each is done twice at least: at first memory is allocated, and algorithms are chosen.
        affordable = int(first * SECONDS / (2 * len(layouts) * step(layouts[0], first)))
        pictures = min(most, max(1, affordable))
        times = _race(layouts, lambda layout: step(layout, pictures))
        return [1e3 * times[each] / pictures for each in layouts]

    milliseconds = torch.tensor(_halved_until_it_fits(race, batch_size), device=world.device)
    milliseconds = (world.sum(milliseconds) / world.size).tolist()
    best = layouts[milliseconds.index(min(milliseconds))]
    return best, {str(layout): taken for layout, taken in zip(layouts, milliseconds, strict=True)}


def _halved_until_it_fits(measure, pictures):
    """measure(pictures), of half as many where a GPU's memory is short, and so on."""
    while True:
        try:
            return measure(pictures)
        except Exception as error:
            if pictures == 1 or not is_out_of_gpu_memory(error):
                raise
        pictures //= 2


def _race(arms, measure):
    """{arm: the least of the seconds that `measure(arm)` gave}, in turns, until SECONDS are over or one is ahead."""
    deadline = time.perf_counter() + SECONDS
    for arm in arms:
        measure(arm)
    least, left = dict.fromkeys(arms, float("inf")), arms
    while True:
        for arm in left:
            least[arm] = min(least[arm], measure(arm))
        left = [arm for arm in arms if least[arm] < RACE_MARGIN * min(least.values())]
        if len(left) == 1 or time.perf_counter() > deadline:
            return least
