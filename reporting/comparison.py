"""Several runs of one set-up as mean and deviation, and two set-ups as a ratio with its noise."""

import dataclasses
import math

import numpy as np

SIGNIFICANCE = 0.05
TELLS_NOTHING = 20  # An interval that ends at so many times its ratio, as two runs may have.


@dataclasses.dataclass(frozen=True)
class Sample:
    """Mean and standard deviation (of the sample, n - 1; 0.0 for n = 1) of n values."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values):
        """The Sample of those of `values` that are not None; None when all are."""
        values = [value for value in values if value is not None]
        if not values:
            return None
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), deviation, len(values))


def within_noise(new, base):
    """Whether the difference of two Samples may be chance: a t-test finds none at the 5 % level.

    Welch's test; where one of them is a single value, Student's, which takes it to scatter as the other does. None when
    both are single values, which say nothing of their noise.
    """
    if new.n == base.n == 1:
        return None
    if new.deviation == base.deviation == 0:
        return new.mean == base.mean
    from scipy.stats import ttest_ind_from_stats

    samples = (new.mean, new.deviation, new.n, base.mean, base.deviation, base.n)
    return bool(ttest_ind_from_stats(*samples, equal_var=min(new.n, base.n) == 1).pvalue > SIGNIFICANCE)


def ratio_interval(new, base):
    """(mean of `new` over that of `base`, low, high): the 95 % interval by the t-distribution of the logarithm, with
    Welch's degrees of freedom. A single value is taken to scatter as the others do; low and high are None when both
    Samples are single values, and where the mean of `new` is 0."""
    found = new.mean / base.mean
    if new.n == base.n == 1 or new.mean == 0:
        return found, None, None
    parts = [((each.deviation / each.mean) ** 2, each.n) for each in (new, base)]
    shared = max(spread for spread, n in parts if n > 1)
    errors = [((spread if n > 1 else shared) / n, n) for spread, n in parts]
    variance = sum(error for error, _ in errors)
    if variance == 0:
        return found, found, found
    from scipy.stats import t

    freedom = max(new.n, base.n) - 1  # All that is known of the scatter, where one side is a single value.
    if min(new.n, base.n) > 1:
        freedom = variance**2 / sum(error**2 / (n - 1) for error, n in errors if error)
    factor = math.exp(t.ppf(1 - SIGNIFICANCE / 2, freedom) * math.sqrt(variance))
    return found, found / factor, found * factor


def ratio_with_interval(new, base):
    """The `interval_text` of the ratio of two Samples, "1.00" of a Sample with itself; None without both."""
    if new is None or base is None or base.mean == 0:
        return None
    if new is base:
        return "1.00"
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
    note = ", within the noise" if new != base and within_noise(new, base) else ""
    return f"{new.mean - base.mean:+.1f}{note}"


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
