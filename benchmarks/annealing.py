"""Simulated annealing over all recomputation plans, by which benchmarks/memory.py checks the planner."""

import math
import random

from harness.planning import describe, simulate

HOTTEST, COLDEST = 0.03, 3e-5  # Temperatures, as a share of the plain step's FLOPs.


def anneal(timeline, limits, tries):
    """The fewest recomputed FLOPs, as a share of the plain step's, of any plan found within `limits`; infinity if none
    was found.

    Each move changes whether one step is recomputed. A costlier plan is accepted with a probability that falls with the
    extra cost and over time. Exceeding a limit adds to the cost. limits: {"held" or "peak": share of the plain step's}.
    """
    generator, names = random.Random(0), list(timeline.steps)
    plain = describe(timeline, frozenset())
    plain_bytes = plain.plain_bytes, plain.plain_peak_bytes
    allowed = [limits.get(what, math.inf) * size for what, size in zip(("held", "peak"), plain_bytes, strict=True)]
    flops = {name: step.flops / plain.plain_flops for name, step in timeline.steps.items()}

    def cost_of(redo):
        over = [max(0, size / limit - 1) for size, limit in zip(simulate(timeline, redo), allowed, strict=True)]
        return sum(map(flops.get, redo)) + sum(over), not any(over)

    redo = frozenset(names)
    now, fits = cost_of(redo)
    best = now if fits else math.inf
    for index in range(tries):
        other = redo ^ {generator.choice(names)}
        cost, fits = cost_of(other)
        best = min(best, cost) if fits else best
        temperature = HOTTEST * (COLDEST / HOTTEST) ** (index / tries)
        if cost <= now or generator.random() < math.exp((now - cost) / temperature):
            redo, now = other, cost
    return best
