"""What the rounds of a benchmark say of a target: yes, no or undecided, by the interval and not by the median."""

import math


def median_interval(values):
    """The 95 % interval of the median that `values` were drawn from, by the sign test: [low, high], two of the values.

    It takes no shape of their distribution for granted. None for fewer than six, whose extremes do not hold the median
    in 95 of 100 cases.
    """
    values, n = sorted(values), len(values)
    # On either side of the median there are by chance as many as heads in n throws of a coin.
    outside = [2 * sum(math.comb(n, heads) for heads in range(left + 1)) / 2**n for left in range(n // 2)]
    left_out = sum(chance <= 0.05 for chance in outside) - 1
    return None if left_out < 0 else [values[left_out], values[-1 - left_out]]


def judge(bound, limit, interval):
    """Whether a figure with that `interval` is "at least" or "at most" (`bound`) `limit`: "yes", "no" or "undecided".

    interval: (low, high), or None where too few rounds give one.
    """
    if interval is None:
        return "undecided"
    low, high = interval
    good, bad = (high <= limit, low > limit) if bound == "at most" else (low >= limit, high < limit)
    return "yes" if good else "no" if bad else "undecided"


def find_target(targets, device_type, hardware, case):
    """("at least" or "at most", limit) of `case`, or None.

    targets: TARGETS of a benchmark, {kind: {case: target}}, a case named as the Case column of its table does. The kind
    is a device's type, "cpu" or "cuda"; "cpu, bfloat16" is that of processors with instructions for bfloat16, and where
    it is silent about a case, "cpu" holds. hardware: as harness.machine.hardware_name tells it.
    """
    kinds = [f"{device_type}, bfloat16"] * (", bfloat16" in hardware) + [device_type]
    return next((targets[kind][case] for kind in kinds if case in targets.get(kind, {})), None)
