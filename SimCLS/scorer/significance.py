"""The uncertainty of an evaluation's means: bootstrap intervals and paired permutation tests."""

import numpy as np
from data_utils import ROUGE

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 500
SEED = 0  # For resampling: the same scores always give the same intervals.
# Systems that need no scorer. SimCLS is tested against the best of them, and against each of TESTED.
FREE = ("generator", "plain beam", "most likely", "longest", "Bayes risk", "random")
TESTED = ("generator", "plain beam", "longest", "Bayes risk")
ALONE = "SimCLS, scorer alone"
P_VALUES = {"SimCLS": "p_values", ALONE: "p_values_alone"}  # System -> key of its p-values in the record.


def summarise(systems):
    """Values for the record: "documents"; "systems" -> system -> metric -> "mean", "low", "high". If SimCLS is among
    the systems, also "strongest", the best of FREE by the mean of the three ROUGE, and "p_values" -> system -> metric,
    of SimCLS against the strongest and TESTED; if the scorer alone is, too, "p_values_alone" for it.

    systems: name -> float64 [documents, 3].
    """
    count = len(next(iter(systems.values())))
    lows, highs = bootstrap_interval(np.concatenate(list(systems.values()), axis=1))
    result = {"documents": count, "systems": {}}
    for place, (name, figures) in enumerate(systems.items()):
        columns = zip(ROUGE, figures.mean(0), lows[3 * place :], highs[3 * place :], strict=False)
        result["systems"][name] = {
            metric: {"mean": float(mean), "low": float(low), "high": float(high)} for metric, mean, low, high in columns
        }
    free = [name for name in FREE if name in systems]
    if "SimCLS" in systems and free:
        result["strongest"] = max(free, key=lambda name: systems[name].mean())
        against = {name: systems[name] for name in free if name in TESTED or name == result["strongest"]}
        result |= {key: compare(systems[name], against) for name, key in P_VALUES.items() if name in systems}
    return result


def compare(figures, against):
    """name -> metric -> p-value of `figures`, float64 [documents, 3], against each of `against`, a dict of the same."""
    p_values = permutation_test(np.concatenate([figures - each for each in against.values()], axis=1))
    return {
        name: dict(zip(ROUGE, map(float, p_values[3 * place :]), strict=False)) for place, name in enumerate(against)
    }


def bootstrap_interval(figures):
    """The 2.5th and 97.5th percentiles of the mean over bootstrap samples of the rows of `figures` [n, columns]."""
    random, count = np.random.default_rng(SEED), len(figures)
    means = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        picked = random.integers(0, count, (RESAMPLES_AT_ONCE, count))
        times = np.zeros((RESAMPLES_AT_ONCE, count))
        np.add.at(times, (np.arange(RESAMPLES_AT_ONCE)[:, None], picked), 1)
        means.append(times @ figures / count)
    return np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)


def permutation_test(differences):
    """The two-sided p-value of the mean of each column of `differences` [n, columns], by random signs of the rows."""
    random, count = np.random.default_rng(SEED), len(differences)
    observed = np.abs(differences.mean(0))
    as_far = np.ones(differences.shape[1])
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        signs = random.integers(0, 2, (RESAMPLES_AT_ONCE, count)) * 2.0 - 1
        # Allows for rounding: the same sum in another order counts as equal.
        as_far += (np.abs(signs @ differences / count) >= observed - 1e-12).sum(0)
    return as_far / (RESAMPLES + 1)
