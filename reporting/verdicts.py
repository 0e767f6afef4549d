"""Whether the rounds of a benchmark reach a target: yes, no or undecided, judged by the interval and not the median."""

import math


def median_interval(values):
    """The 95 % interval of the median of the distribution of `values`, by the sign test: [low, high], two of the
    values.

    It assumes nothing about the shape of the distribution. None for fewer than six values, whose extremes enclose the
    median in less than 95 % of cases.
    """
    values, n = sorted(values), len(values)
    # The number of values on one side of the median is distributed like the heads in n coin tosses.
    outside = [2 * sum(math.comb(n, heads) for heads in range(left + 1)) / 2**n for left in range(n // 2)]
    left_out = sum(chance <= 0.05 for chance in outside) - 1
    return None if left_out < 0 else [values[left_out], values[-1 - left_out]]


def judge(bound, limit, interval):
    """Whether a figure with that `interval` is "at least" or "at most" (`bound`) `limit`: "yes", "no" or "undecided".

    interval: (low, high), or None if there were too few rounds.
    """
    if interval is None:
        return "undecided"
    low, high = interval
    good, bad = (high <= limit, low > limit) if bound == "at most" else (low >= limit, high < limit)
    return "yes" if good else "no" if bad else "undecided"


def find_target(targets, device_type, hardware, case):
    """("at least" or "at most", limit) for `case`, or None.

    targets: TARGETS of a benchmark, {kind: {case: target}}, with cases named as in the Case column of its table. kind:
    a device's type, "cpu" or "cuda", or "cpu, bfloat16" for processors with bfloat16 instructions; where that lacks a
    case, "cpu" applies. hardware: as returned by harness.machine.hardware_name.
    """
    kinds = [f"{device_type}, bfloat16"] * (", bfloat16" in hardware) + [device_type]
    return next((targets[kind][case] for kind in kinds if case in targets.get(kind, {})), None)
