"""Several runs of one set-up as mean and deviation, and two set-ups as a ratio with its noise."""

import dataclasses
import math

import numpy as np

CONFIDENCE = 0.975  # Quantile of the t-distribution for a two-sided interval.
TELLS_NOTHING = 20  # An interval that extends to this multiple of its ratio, as from two runs, is not shown.


@dataclasses.dataclass(frozen=True)
class Sample:
    """Mean and standard deviation (sample, n - 1; 0.0 for n = 1) of n values. by_seed: {seed: value} if the values come
    from runs, else empty."""

    mean: float
    deviation: float
    n: int
    by_seed: dict = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, values, seeds=None):
        """The Sample of the `values` that are not None; None if all are. seeds: of the runs that the values come
        from."""
        values = list(values)
        by_seed = {} if seeds is None else dict(zip(seeds, values, strict=True))
        by_seed = {seed: value for seed, value in by_seed.items() if value is not None}
        values = [value for value in values if value is not None]
        if not values:
            return None
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), deviation, len(values), by_seed)

    @classmethod
    def over(cls, runs, figure):
        """The Sample of `figure`, a function of a Record, over `runs` with different seeds; None if it is None for
        all."""
        return cls.of(map(figure, runs), [run.arguments.get("seed") for run in runs])


def paired(new, base):
    """The two Samples restricted to the seeds that both have; if there are none, unchanged but without their seeds.

    A run depends on its seed (which documents its first step has, how its weights start), and runs with the same seed
    were made in turn. So runs are compared with those of the same seed.
    """
    seeds = [seed for seed in new.by_seed if seed in base.by_seed]
    if not seeds:
        return tuple(dataclasses.replace(each, by_seed={}) for each in (new, base))
    return tuple(Sample.of([each.by_seed[seed] for seed in seeds], seeds) for each in (new, base))


def within_noise(new, base):
    """Whether the difference of two Samples may be chance: whether its 95 % interval includes 0. None if the noise is
    unknown."""
    _, low, high = difference_interval(new, base)
    return None if low is None else low <= 0 <= high


def difference_interval(new, base):
    """(mean of `new` minus that of `base`, low, high): the 95 % interval from the t-distribution.

    For runs with the same seeds, it is the interval of the pairs. Otherwise it uses Welch's degrees of freedom, and a
    single value is assumed to scatter like the others. low and high are None if both Samples are single values, which
    say nothing about their noise, and for two pairs with equal differences.
    """
    new, base = paired(new, base)
    found = new.mean - base.mean
    if new.n == base.n == 1:
        return found, None, None
    if new.by_seed:
        change = Sample.of(new.by_seed[seed] - base.by_seed[seed] for seed in new.by_seed)
        # Two differences may be equal by chance, as those of accuracies on few images are.
        if change.deviation == 0 != change.mean and change.n < 3:
            return found, None, None
        variance, freedom = change.deviation**2 / change.n, change.n - 1
    else:
        variance, freedom = _variance(*((each.deviation, each.n) for each in (new, base)))
    half = _half_width(variance, freedom)
    return found, found - half, found + half


def ratio_interval(new, base):
    """(mean of `new` over that of `base`, low, high): the 95 % interval from the t-distribution of the logarithm.

    Pairs and single values are treated as in `difference_interval`; the mean of pairs is that of their logarithms.
    low and high are None if both Samples are single values, or if any value is not above 0.
    """
    new, base = paired(new, base)
    found = new.mean / base.mean
    if new.n == base.n == 1 or min([new.mean, *new.by_seed.values(), *base.by_seed.values()]) <= 0:
        return found, None, None
    if new.by_seed:
        logs = Sample.of(math.log(new.by_seed[seed] / base.by_seed[seed]) for seed in new.by_seed)
        found, variance, freedom = math.exp(logs.mean), logs.deviation**2 / logs.n, logs.n - 1
    else:
        variance, freedom = _variance(*((each.deviation / each.mean, each.n) for each in (new, base)))
    if variance == 0:
        return found, found, found
    factor = math.exp(min(_half_width(variance, freedom), 700))  # Within a float's range.
    return found, found / factor, found * factor


def _variance(*samples):
    """(variance of the difference of two independent means, degrees of freedom). samples: (deviation, n) of each."""
    shared = max(deviation for deviation, n in samples if n > 1)
    errors = [((deviation if n > 1 else shared) ** 2 / n, n) for deviation, n in samples]
    variance, counts = sum(error for error, _ in errors), [n for _, n in samples]
    if min(counts) == 1 or variance == 0:
        return variance, max(counts) - 1  # Only the other side's scatter is known.
    return variance, variance**2 / sum(error**2 / (n - 1) for error, n in errors if error)


def _half_width(variance, freedom):
    """Half of the 95 % interval of a mean."""
    if variance == 0:
        return 0.0
    from scipy.stats import t

    return t.ppf(CONFIDENCE, freedom) * math.sqrt(variance)


def ratio_with_interval(new, base):
    """The `interval_text` of the ratio of two Samples; "1.00" for a Sample and itself; None without both."""
    if new is base and new:
        return "1.00"
    new, base = paired(new, base) if new and base else (None, None)
    if base is None or base.mean == 0:
        return None
    return interval_text(*ratio_interval(new, base))


def interval_text(found, low, high):
    """ "0.76 (0.71 to 0.82)", or "0.76" if the noise is unknown (low and high are None) or zero."""
    if high is not None and high > TELLS_NOTHING * found:
        return f"{found:.2f} (too few runs)"
    exact = low is None or f"{low:.2f}" == f"{high:.2f}"
    return f"{found:.2f}" if exact else f"{found:.2f} ({low:.2f} to {high:.2f})"


def difference(new, base):
    """ "+1.3", or "-0.2, within the noise": the mean of `new` minus that of `base`; None without both, or for a Sample
    and itself."""
    if new is None or base is None or new is base:
        return None
    new, base = paired(new, base)
    note = ", within the noise" if new != base and within_noise(new, base) else ""
    return f"{signed(new.mean - base.mean)}{note}"


def signed(value):
    """ "+1.3", "-0.2", or "+0.0" for what rounds to zero."""
    return f"{round(value, 1) + 0.0:+.1f}"


def number(value, digits=3):
    """`value` with `digits` significant digits, but all digits before the decimal point: 0.0012, 1.60, 104, 8934."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    rounded = round(value, _decimals(value, digits))
    # Rounding up may have added a digit: 9.996 becomes 10.0.
    return f"{rounded:.{_decimals(rounded, digits)}f}"


def _decimals(value, digits):
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def quantity(sample, places=None):
    """ "104", or "104 ± 2" for several values; None for None. places: decimals, by default 3 significant digits.

    The deviation has as many decimals as the mean.
    """
    if sample is None:
        return None
    mean = number(sample.mean) if places is None else f"{sample.mean:.{places}f}"
    if sample.deviation == 0:
        return mean
    places = len(mean.partition(".")[2])
    return f"{mean} ± {sample.deviation:.{places}f}"
