"""What a candidate is chosen by: the scorer's score, and beside it the generator's likelihood of the candidate and its
agreement with the others (texts.scoring). How much these count is fitted on validation.

A candidate's log-probability is divided by a power of its number of tokens: 1 gives the mean a token, 0 the sum.
"""

import numpy as np
import torch
from model import load_weights, read_description, score_samples

from harness.devices import widest_float
from harness.files import write_json
from texts import provenance
from texts.scoring import mean_score

TERMS = ("likelihood", "agreement")  # Beside the score.
POWERS = (1.0, 0.5, 0.0)
LARGEST_WEIGHT = 100.0  # A weight with which the scorer hardly counts any more.


def combine(scores, likelihood, agreement, weights):
    """By what a candidate is chosen, float64 [..., candidates]: the scorer's scores, and the TERMS by their weights.

    scores, agreement: float [..., candidates]; likelihood: float [..., candidates, 2], log-probabilities and numbers of
    tokens. A term without weight may be None. weights: as from `fit`.
    """
    if weights["likelihood"]:
        scores = scores + weights["likelihood"] * per_token(likelihood, weights["power"])
    if weights["agreement"]:
        scores = scores + weights["agreement"] * agreement
    return scores


def per_token(likelihood, power):
    """Log-probabilities, each divided by its number of tokens ** power, float64 [..., candidates]."""
    log_probs, tokens = np.moveaxis(np.asarray(likelihood, dtype=np.float64), -1, 0)
    return log_probs / tokens**power


def fit(scorer, samples, args, precision, world):
    """The weights of `regress` for the scores of `scorer` among the SampleSet `samples`, which has ROUGE. Each process
    scores its share."""
    judged = []
    numbers = np.argsort(samples.document_lengths, kind="stable")[world.rank :: world.size]
    for part, _, scores, _ in score_samples(scorer, samples, numbers, 2 * args.batch_size, world.device, precision):
        for number, own in zip(part, scores.cpu().double().numpy(), strict=True):
            likelihood, agreement = (samples.figures(name, number) for name in TERMS)
            rouge = mean_score(samples.figures("rouge", number))
            judged.append((own[: len(rouge)], likelihood, agreement, rouge))

    def total(sums):
        there = torch.from_numpy(sums).to(world.device, widest_float(world.device))
        return world.sum(there).cpu().double().numpy()

    return regress(judged, total)


def regress(judged, total=lambda sums: sums):
    """How much the TERMS count beside a scorer: least squares of ROUGE by all of them, within documents.

    Gives what `combine` takes: for each term its weight, which is its slope by that of the score, and "power"; and, to
    be read, "slopes" and "errors": of each term the ROUGE that a unit of it is worth beside the others, and the
    standard error of that, documents being independent and their candidates not (Liang and Zeger 1986). A term whose
    slope is within its error does not count. "gain" is what choosing so adds to the mean ROUGE here. (That it be above
    0 is not asked: among a few hundred documents it is mostly noise, and asking for it made choices worse.)

    judged: for each document of this process (scores float64 [candidates], likelihood [candidates, 2] or None,
    agreement [candidates], ROUGE float64 [candidates]). total: sums an array over the processes.
    """
    size = 1 + len(TERMS)
    moments = np.zeros((len(judged), len(POWERS), size + 1, size + 1))  # Of score, TERMS and ROUGE, about their means.
    for own, (scores, likelihood, agreement, rouge) in zip(moments, judged, strict=True):
        for place, power in enumerate(POWERS):
            likely = np.zeros(len(scores)) if likelihood is None else per_token(likelihood, power)
            table = np.stack([scores, likely, agreement, rouge])
            table = table - table.mean(1, keepdims=True)
            own[place] = table @ table.T
    sums = total(moments.sum(0))
    fits = [_slopes(each, range(size)) for each in sums]
    # Of the powers by which the more likely candidates are the better ones, that which leaves least unexplained.
    left = [
        each[size, size] - each[size, :size] @ slopes if slopes[1] > 0 else np.inf
        for each, slopes in zip(sums, fits, strict=True)
    ]
    best = int(np.argmin(np.round(left, 12)))
    slopes, own = fits[best], moments[:, best]
    residuals = own[:, :size, size] - own[:, :size, :size] @ slopes
    inverse = np.linalg.pinv(sums[best][:size, :size])
    errors = np.sqrt(np.diag(inverse @ total(residuals.T @ residuals) @ inverse))
    kept = [0, *(place for place in range(1, size) if slopes[place] > errors[place])]
    by_score, *by_terms = _slopes(sums[best], kept).clip(min=0)
    scale = max(by_score, max(by_terms) / LARGEST_WEIGHT) or 1.0
    weights = {name: float(slope / scale) for name, slope in zip(TERMS, by_terms, strict=True)}
    weights["power"] = POWERS[best]
    gains = [
        rouge[combine(scores, likelihood, agreement, weights).argmax()] - rouge[scores.argmax()]
        for scores, likelihood, agreement, rouge in judged
    ]
    gain, documents = total(np.array([sum(gains, 0.0), len(gains)]))
    told = {name: dict(zip(TERMS, map(float, each[1:]), strict=True))
            for name, each in {"slopes": slopes, "errors": errors}.items()}  # fmt: skip
    return weights | told | {"gain": float(gain / documents)}


def _slopes(moments, kept):
    """Those of ROUGE by the columns `kept` of the moments [columns + 1, columns + 1], float64 [columns]; else 0."""
    slopes, kept = np.zeros(len(moments) - 1), list(kept)
    slopes[kept] = np.linalg.pinv(moments[np.ix_(kept, kept)]) @ moments[kept, -1]
    return slopes


def fitted_to(path):
    """The weights that `fit_best` fitted to the scorer in the file `path`; None where there are none, as for a run's
    model.bin, which lies beside the description of its scorer.bin."""
    description = read_description(path) or {}
    fitted = description.get("weights")
    if not fitted and description.get("likelihood"):  # Of before agreement counted.
        older = description["likelihood"]
        fitted = older | {"likelihood": older["weight"], "agreement": 0.0}
    if not fitted:
        return None
    digest = provenance.digest_files([path])
    return fitted if fitted.get("scorer_digest", digest) == digest else None


def fit_best(run, scorer, description, samples, args, precision, world):
    """Fit the weights to the best scorer of a ScorerRun that is at its end, and keep them in its scorer.json and in the
    record."""
    if run.stop.enough:  # --max_steps cut it short.
        return
    path = run.folder / "scorer.bin"
    world.barrier()  # The main process has written them.
    load_weights(path, scorer, description)
    fitted = fit(scorer, samples, args, precision, world)
    run.facts["weights"] = fitted = fitted | {"scorer_digest": provenance.digest_files([path])}
    if world.is_main:
        write_json(path.with_name("scorer.json"), description | {"weights": fitted})
    names = {"likelihood": f"log-probability / tokens^{fitted['power']:g}", "agreement": "agreement with the others"}
    for name, words in names.items():
        run.say(
            f"beside the score counts {words} with weight {fitted[name]:.3g}; a unit of it is worth "
            f"{100 * fitted['slopes'][name]:.2f} ± {100 * fitted['errors'][name]:.2f} ROUGE"
        )
    run.say(f"so weighted, choices on validation change by {100 * fitted['gain']:+.2f} ROUGE (mean of the three)")
