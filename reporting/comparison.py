"""Several runs of one set-up as mean and deviation, and two set-ups as a ratio with its noise."""

import dataclasses
import math

import numpy as np

SIGNIFICANCE = 0.05
CONFIDENCE = 1 - SIGNIFICANCE / 2  # Of a t-distribution, on either side.
TELLS_NOTHING = 20  # An interval that ends at so many times its ratio, as two runs may have.


@dataclasses.dataclass(frozen=True)
class Sample:
    """Mean and standard deviation (of the sample, n - 1; 0.0 for n = 1) of n values. by_seed: {seed: value} where they
    are of runs, else empty."""

    mean: float
    deviation: float
    n: int
    by_seed: dict = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, values, seeds=None):
        """The Sample of those of `values` that are not None; None when all are. seeds: of the runs that they are of."""
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
        """The Sample of `figure`, of a Record, over `runs` with different seeds; None when it is None of all."""
        return cls.of(map(figure, runs), [run.arguments.get("seed") for run in runs])


def paired(new, base):
    """The two Samples over the seeds that both have; where there is none, as they are, but without their seeds.

    What a run does depends on its seed (which documents its first step has, how its weights begin), and runs of one
    seed were made in turn, so that runs are compared with those of their own seed.
    """
    seeds = [seed for seed in new.by_seed if seed in base.by_seed]
    if not seeds:
        return tuple(dataclasses.replace(each, by_seed={}) for each in (new, base))
    return tuple(Sample.of([each.by_seed[seed] for seed in seeds], seeds) for each in (new, base))


def within_noise(new, base):
    """Whether the difference of two Samples may be chance: a t-test finds none at the 5 % level.

    Of runs with the same seeds the paired test; else Welch's, or where one of them is a single value, Student's, which
    takes it to scatter as the other does. None when both are single values, which say nothing of their noise, and of
    two pairs whose differences are equal.
    """
    new, base = paired(new, base)
    if new.n == base.n == 1:
        return None
    from scipy.stats import t, ttest_ind_from_stats

    if new.by_seed:
        change = Sample.of(new.by_seed[seed] - base.by_seed[seed] for seed in new.by_seed)
        if change.deviation == 0:  # Two that are equal may be so by chance, as accuracies of few pictures are.
            return None if change.mean and change.n < 3 else change.mean == 0
        return bool(abs(change.mean) / (change.deviation / math.sqrt(change.n)) < t.ppf(CONFIDENCE, change.n - 1))
    if new.deviation == base.deviation == 0:
        return new.mean == base.mean
    samples = (new.mean, new.deviation, new.n, base.mean, base.deviation, base.n)
    return bool(ttest_ind_from_stats(*samples, equal_var=min(new.n, base.n) == 1).pvalue > SIGNIFICANCE)


def ratio_interval(new, base):
    """(mean of `new` over that of `base`, low, high): the 95 % interval by the t-distribution of the logarithm.

    Of runs with the same seeds it is that of the pairs; else with Welch's degrees of freedom, and a single value is
    taken to scatter as the others do. low and high are None when both Samples are single values, and where a value is
    not above 0.
    """
    new, base = paired(new, base)
    found = new.mean / base.mean
    if new.n == base.n == 1 or min([new.mean, *new.by_seed.values(), *base.by_seed.values()]) <= 0:
        return found, None, None
    variance, freedom = (_paired_variance if new.by_seed else _variance)(new, base)
    if variance == 0:
        return found, found, found
    from scipy.stats import t

    factor = math.exp(min(t.ppf(CONFIDENCE, freedom) * math.sqrt(variance), 700))  # Which a float can hold.
    return found, found / factor, found * factor


def _paired_variance(new, base):
    """(variance of the mean logarithm of the ratio of two Samples with the same seeds, degrees of freedom)."""
    logs = Sample.of(math.log(new.by_seed[seed] / base.by_seed[seed]) for seed in new.by_seed)
    return logs.deviation**2 / logs.n, logs.n - 1


def _variance(new, base):
    """The same of two Samples that are independent."""
    parts = [((each.deviation / each.mean) ** 2, each.n) for each in (new, base)]
    shared = max(spread for spread, n in parts if n > 1)
    errors = [((spread if n > 1 else shared) / n, n) for spread, n in parts]
    variance = sum(error for error, _ in errors)
    if min(new.n, base.n) == 1 or variance == 0:
        return variance, max(new.n, base.n) - 1  # All that is known of the scatter, where one side is a single value.
    return variance, variance**2 / sum(error**2 / (n - 1) for error, n in errors if error)


def ratio_with_interval(new, base):
    """The `interval_text` of the ratio of two Samples, "1.00" of a Sample with itself; None without both."""
    if new is base and new:
        return "1.00"
    new, base = paired(new, base) if new and base else (None, None)
    if base is None or base.mean == 0:
        return None
    return interval_text(*ratio_interval(new, base))


def interval_text(found, low, high):
    """ "0.76 (0.71 to 0.82)", or "0.76" where the noise is not known (low and high are None) or there is none."""
    if high is not None and high > TELLS_NOTHING * found:
        return f"{found:.2f} (too few runs)"
    exact = low is None or f"{low:.2f}" == f"{high:.2f}"
    return f"{found:.2f}" if exact else f"{found:.2f} ({low:.2f} to {high:.2f})"


def difference(new, base):
    """ "+1.3", or "-0.2, within the noise": the mean of `new` less that of `base`; None without both, and of a Sample
    with itself."""
    if new is None or base is None or new is base:
        return None
    new, base = paired(new, base)
    note = ", within the noise" if new != base and within_noise(new, base) else ""
    return f"{signed(new.mean - base.mean)}{note}"


def signed(value):
    """ "+1.3", "-0.2", or "+0.0" for what is nothing when rounded."""
    return f"{round(value, 1) + 0.0:+.1f}"


def number(value, digits=3):
    """`value` with `digits` significant digits, more where it has more before the point: 0.0012, 1.60, 104, 8934."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    rounded = round(value, _decimals(value, digits))
    # Rounding up may have won a digit: 9.996 is 10.0.
    return f"{rounded:.{_decimals(rounded, digits)}f}"


def _decimals(value, digits):
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def quantity(sample, places=None):
    """ "104", or "104 ± 2" for several values; None for None. places: decimals, by default 3 significant digits.

    The deviation ends at the digit where the mean does.
    """
    if sample is None:
        return None
    mean = number(sample.mean) if places is None else f"{sample.mean:.{places}f}"
    if sample.deviation == 0:
        return mean
    places = len(mean.partition(".")[2])
    return f"{mean} ± {sample.deviation:.{places}f}"
