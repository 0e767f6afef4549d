"""Choose the memory layout and the form of the grouped convolutions in which a model trains fastest, by measuring.

They must be measured: on one GPU and library release, channels last doubles the speed of a grouped convolution; on
another it is 30 times slower. On CPUs it depends on the instruction set and the dtype.
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

SECONDS = 1.0  # Approximate time for the choice; a large model may need more for a single step of each layout.
RACE_MARGIN = 1.2  # Layouts slower than the best by more than this factor are not measured again.


class Layout(NamedTuple):
    """channels_last: whether images and convolution weights are stored as NHWC. form: one of FORMS."""

    channels_last: bool
    form: str

    @property
    def memory_format(self):
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def apply(self, model):
        """Convert `model` to this layout in place, and return it."""
        set_form(model, self.form)
        return model.to(memory_format=self.memory_format)

    def __str__(self):
        return f"{'channels last' if self.channels_last else 'contiguous'}, {self.form}"


def open_layouts(channels_last, form):
    """The Layouts that the arguments allow; None allows every value."""
    layouts = (True, False) if channels_last is None else (channels_last,)
    return [Layout(*each) for each in itertools.product(layouts, FORMS if form is None else (form,))]


def choose_layout(model, data, args, world, precision, run):
    """The Layout of a run: the one its arguments name, else that of the state it resumes, else the fastest one here.

    data: the ImageData. The measurements are printed and recorded.
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
        world.say(f"layout: {layout}, {taken[str(layout)]:.3g} ms per image ({slower})")
    run.facts["layout"] = kept
    return layout


def fastest(model, layouts, precision, world, batch_size, size):
    """(the Layout with the fastest forward and backward of `model`, {str(layout): milliseconds per image}).

    batch_size: images per step of this process. size: height and width of an image. Each step takes as many images as
    time allows. It runs in the run's precision on copies of the model, so neither the model's statistics nor any random
    state changes. The processes of a job choose together.
    """
    one_each = {each.channels_last: each for each in layouts}  # The form is set again before each step.
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
        # A single image would leave a GPU idle between launches and time that; a full batch may take a CPU too long.
        first = most if world.device.type == "cuda" else 1
        step(layouts[0], first)
        # Each layout runs at least three times: the first step also allocates memory and selects algorithms.
        affordable = int(first * SECONDS / (3 * len(layouts) * step(layouts[0], first)))
        pictures = min(most, max(1, affordable))
        times = _race(layouts, lambda layout: step(layout, pictures))
        return [1e3 * times[each] / pictures for each in layouts]

    milliseconds = torch.tensor(_halved_until_it_fits(race, batch_size), device=world.device)
    milliseconds = (world.sum(milliseconds) / world.size).tolist()
    best = layouts[milliseconds.index(min(milliseconds))]
    return best, {str(layout): taken for layout, taken in zip(layouts, milliseconds, strict=True)}


def _halved_until_it_fits(measure, pictures):
    """measure(pictures), halving `pictures` while the GPU runs out of memory."""
    while True:
        try:
            return measure(pictures)
        except Exception as error:
            if pictures == 1 or not is_out_of_gpu_memory(error):
                raise
        pictures //= 2


def _race(arms, measure):
    """{arm: the lowest of the seconds that `measure(arm)` returned}; arms take turns until SECONDS have passed or only
    one is left within RACE_MARGIN. Each is timed twice before any is dropped, since other work may disturb one step."""
    deadline = time.perf_counter() + SECONDS
    for arm in arms:
        measure(arm)
    least, left = {arm: measure(arm) for arm in arms}, arms
    while True:
        for arm in left:
            least[arm] = min(least[arm], measure(arm))
        left = [arm for arm in arms if least[arm] < RACE_MARGIN * min(least.values())]
        if len(left) == 1 or time.perf_counter() > deadline:
            return least
