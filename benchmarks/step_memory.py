#!/usr/bin/env python3
"""The memory of one training step over time, by kind of tensor, without and with recomputation.

Every tensor that an operator returns is followed from its allocation until it is freed, also on a CPU. In forward it is
an activation, either kept for backward or temporary ("passing"); in backward it is a gradient or a recomputed
activation ("redone"). report.py draws the figure from the record.
"""

import sys
import weakref
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, finish, get_parser, new_record, save

import torch
import torch.nn.functional as F

from experiment import model_name
from harness import arguments, endings
from harness.memory import LiveBytes
from harness.planning import plan_recomputation
from harness.recompute import Tape
from models.resnext import ResNeXt, parse_name
from models.resnext_checkpoint import CheckpointResNeXt

KINDS = ("kept for backward", "passing", "redone", "gradients of activations", "gradients of weights")
POINTS = 150  # The most points of the recorded curve; each is the moment with the most memory of its stretch of time.


class Lives(LiveBytes):
    """Follows each storage in one step: [kind, bytes, allocated, freed]. `clock` ticks at each allocation and free."""

    def __init__(self, model):
        super().__init__(model)
        self.lives, self.clock = [], 0
        self.in_backward = self.is_redoing = False

    def follow(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            return
        life = [self._kind(tensor), storage.nbytes(), self.clock, None]
        self.clock += 1
        self.lives.append(life)
        self._live[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, life)

    def _kind(self, tensor):
        if not self.in_backward:
            return "passing"  # begin_backward relabels those that are still alive when forward ends.
        if self.is_redoing:
            return "redone"
        return "gradients of weights" if tuple(tensor.shape) in self._shapes else "gradients of activations"

    def _free(self, key, life):
        del self._live[key]
        life[3] = self.clock
        self.clock += 1

    def begin_backward(self):
        self.in_backward = True
        for life in self.lives:
            if life[3] is None:
                life[0] = "kept for backward"

    def told_of_redoing(self):
        """A context in which tensors that harness.recompute recomputes count as "redone"."""
        redo = Tape.redo

        def told(tape, step, inputs):
            self.is_redoing = True
            try:
                return redo(tape, step, inputs)
            finally:
                self.is_redoing = False

        return mock.patch.object(Tape, "redo", told)


def follow_step(model, images, labels):
    """(the Lives of one forward and backward pass of `model`, the tick at which backward begins)"""
    lives = Lives(model)
    with lives.told_of_redoing():
        with lives:
            loss = F.cross_entropy(model(images), labels)
        lives.begin_backward()
        turn = lives.clock
        with lives:
            loss.backward()
    return lives, turn


def curve(lives):
    """([[tick, bytes of each of KINDS], ...], peak bytes without the weights' gradients).

    There are at most POINTS points, each the one with the most bytes of its stretch of ticks.
    """
    changes = [{} for _ in range(lives.clock + 1)]
    for kind, size, born, freed in lives.lives:
        for tick, change in ((born, size), (freed, -size)):
            if tick is not None:
                changes[tick][kind] = changes[tick].get(kind, 0) + change
    now, points = dict.fromkeys(KINDS, 0), []
    for tick, change in enumerate(changes[:-1]):
        for kind, size in change.items():
            now[kind] += size
        points.append([tick, *now.values()])
    stretch = -(-len(points) // POINTS)
    fullest = [max(points[first : first + stretch], key=lambda point: sum(point[1:]))
               for first in range(0, len(points), stretch)]  # fmt: skip
    return fullest, max(sum(point[1:5]) for point in points)


def main():
    parser = get_parser(__doc__, "step_memory")
    parser.add_argument("--model", type=model_name, default="resnext29_4x64d")
    parser.add_argument("--batch_size", type=arguments.positive_int, default=16)
    parser.add_argument("--budget", type=arguments.positive_share, default=0.5, help="peak of the plan over plain's")
    args = parser.parse_args()
    shape = parse_name(args.model)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, device=DEVICE)
    labels = torch.randint(10, (args.batch_size,), device=DEVICE)
    planned = CheckpointResNeXt(*shape).to(DEVICE).train()
    planned.policy = plan_recomputation(planned.rehearse(args.batch_size, timed=False), args.budget, cost="flops").redo
    models = {"plain": ResNeXt(*shape)}
    models |= {policy: CheckpointResNeXt(*shape, policy=policy) for policy in ("chain", "block")}
    models[f"budget {args.budget:g}"] = planned
    weights = sum(weight.nbytes for weight in planned.parameters())
    facts = {"model": args.model, "batch_size": args.batch_size, "weight_bytes": weights, "kinds": KINDS}
    record = new_record("step_memory", DEVICE, **facts, steps={})
    for name, model in models.items():
        lives, turn = follow_step(model.to(DEVICE).train(), images, labels)
        points, peak = curve(lives)
        held = sum(size for kind, size, *_ in lives.lives if kind == "kept for backward")
        record["steps"][name] = {"backward_begins": turn, "ends": lives.clock, "held_bytes": held, "points": points}
        print(f"{name:12} held {held / 2**20:7.1f} MiB, peak {peak / 2**20:7.1f} MiB")
        save(record, args)
    finish(record, args)


if __name__ == "__main__":
    endings.run(main)
