"""The cost of timing the phases of a training step (harness/timing.py). Target: at most 1 % of the step.

    python3 benchmarks/phase_overhead.py

One model trains, alternating between steps with phases on and off, after both have been checked to give the same loss.
The bare cost is the time of a step's phases with nothing in them, relative to the median step. If step times vary by a
percent, it says more than the ratio. Uses CUDA if available.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, ON_CUDA, check, finish, get_parser, interleaved, new_record, ratio_summary

import torch
from torch import nn

from experiment import model_name
from harness import arguments, endings
from harness.timing import PhaseTimer
from models.resnext import ResNeXt, parse_name

TARGETS = {"cpu": {"on over off": ("at most", 1.01)}, "cuda": {"on over off": ("at most", 1.01)}}
PHASES = ("data copy", "zero grad", "forward", "backward", "optimizer")


def get_args_parser():
    parser = get_parser(__doc__, "phase_overhead", rounds=200)
    # The smallest model has the shortest steps; on a GPU, though, these would consist of kernel launches alone.
    model = "resnext29_4x64d" if ON_CUDA else "resnext29_1x4d"
    parser.add_argument("--model", type=model_name, default=model)
    parser.add_argument("--batch_size", type=arguments.positive_int, default=128 if ON_CUDA else 32)
    parser.add_argument("--steps", type=arguments.positive_int, default=1, help="steps per side and round")
    return parser


def main():
    args = get_args_parser().parse_args()
    timers = {"on": PhaseTimer(DEVICE), "off": PhaseTimer(DEVICE, enabled=False)}
    losses = {name: make_steps(args, DEVICE)(timer) for name, timer in timers.items()}
    check(losses["on"].equal(losses["off"]), f"phases change the loss: {losses}")
    train = make_steps(args, DEVICE)
    arms = {name: functools.partial(train, timer) for name, timer in timers.items()}
    for arm in arms.values():
        arm()  # Warm up.
    seconds = interleaved(arms, args.rounds)
    bare = bare_seconds(DEVICE) / (statistics.median(seconds["off"]) / args.steps)
    print(f"{args.model}, batch {args.batch_size}: bare cost of the phases {100 * bare:.4f} % of a step")
    # Time with phases over time without: a cost, unlike the speed-ups of the other benchmarks.
    found = {"seconds": seconds, "ratio": ratio_summary(seconds["on"], seconds["off"]), "bare_share": bare}
    settings = {name: getattr(args, name) for name in ("model", "batch_size", "steps", "rounds")}
    finish(new_record("phase_overhead", DEVICE, settings=settings, results={"on over off": found}), args)


def make_steps(args, device):
    """Return train(phase), which takes args.steps steps under the PhaseTimer `phase` and returns the last loss.

    Successive calls train the same model. The epoch is not summarised: usually that happens once in hundreds of steps,
    but here it would in every one.
    """
    torch.manual_seed(0)
    model = ResNeXt(*parse_name(args.model)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    batch = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))

    def train(phase):
        phase.start_epoch()
        for _, (images, labels) in phase.steps([batch] * args.steps, "epoch"):
            with phase("data copy"):
                images, labels = images.to(device), labels.to(device)
            with phase("zero grad"):
                optimizer.zero_grad(set_to_none=True)
            with phase("forward"):
                loss = criterion(model(images), labels)
            with phase("backward"):
                loss.backward()
            with phase("optimizer"):
                optimizer.step()
        return loss.detach()

    return train


def bare_seconds(device, steps=2000):
    """The seconds of one step's phases with nothing in them, including its share of the epoch's summary."""
    phase = PhaseTimer(device)
    phase.start_epoch()
    start = time.perf_counter()
    for _ in phase.steps(range(steps), "epoch"):
        for name in PHASES:
            with phase(name):
                pass
    phase.end_epoch()
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    endings.run(main)
