"""The generator's own likelihood of a candidate beside the scorer's score: how much it counts is fitted on validation.

A candidate's log-probability is divided by a power of its number of tokens: 1 gives the mean a token, 0 the sum.
"""

import numpy as np
import torch
from model import load_weights, read_description, score_samples

from harness.devices import widest_float
from harness.files import write_json
from texts import provenance
from texts.scoring import mean_score

POWERS = (1.0, 0.5, 0.0)
MOST = 100.0  # A weight with which the scorer hardly counts any more.


def combine(scores, likelihood, fitted):
    """By what a candidate is chosen, float64 [..., candidates]: the scorer's scores, and the likelihood by its weight.

    scores: float [..., candidates]; likelihood: float [..., candidates, 2], log-probabilities and numbers of tokens.
    fitted: {"weight", "power"} as from `fit`.
    """
    return scores + fitted["weight"] * per_token(likelihood, fitted["power"])


def per_token(likelihood, power):
    """Log-probabilities, each divided by its number of tokens ** power, float64 [..., candidates]."""
    log_probs, tokens = np.moveaxis(np.asarray(likelihood, dtype=np.float64), -1, 0)
    return log_probs / tokens**power


def fit(scorer, samples, args, precision, world):
    """The {"weight", "power", "slope", "error", "gain"} of `regress` for the scores of `scorer` among the SampleSet
    `samples`; None where samples have no likelihoods. Each process scores its share."""
    if samples.likelihood(0) is None:
        return None
    judged = []
    numbers = np.argsort(samples.document_lengths, kind="stable")[world.rank :: world.size]
    for part, _, scores, _ in score_samples(scorer, samples, numbers, 2 * args.batch_size, world.device, precision):
        for number, own in zip(part, scores.cpu().double().numpy(), strict=True):
            rouge = mean_score(samples.rouge(number))
            judged.append((own[: len(rouge)], samples.likelihood(number), rouge))

    def total(sums):
        there = torch.from_numpy(sums).to(world.device, widest_float(world.device))
        return world.sum(there).cpu().double().numpy()

    return regress(judged, total)


def regress(judged, total=lambda sums: sums):
    """How much likelihood counts beside a scorer: least squares of ROUGE by both, within documents.

    "weight" and "power" are as `combine` takes them. "slope" is the ROUGE that a unit of the likelihood is worth beside
    the score, "error" its standard error, documents being independent and their candidates not (Liang and Zeger 1986).
    The weight is the slope by that of the score; it is 0 where the slope is within its error, or choosing so adds
    nothing here. "gain" is the mean ROUGE that it adds.

    judged: for each document of this process (scores float64 [candidates], likelihood [candidates, 2], ROUGE float64
    [candidates]). total: sums an array over the processes.
    """
    moments = np.zeros((len(judged), len(POWERS), 3, 3))  # Of score, likelihood and ROUGE, about their means.
    for own, (scores, likelihood, rouge) in zip(moments, judged, strict=True):
        for place, power in enumerate(POWERS):
            table = np.stack([scores, per_token(likelihood, power), rouge])
            table = table - table.mean(1, keepdims=True)
            own[place] = table @ table.T
    sums = total(moments.sum(0))
    slopes = [np.linalg.pinv(each[:2, :2]) @ each[:2, 2] for each in sums]
    # Of the powers by which the more likely candidates are the better ones, that which leaves least unexplained.
    left = [
        each[2, 2] - each[2, :2] @ slope if slope[1] > 0 else np.inf for each, slope in zip(sums, slopes, strict=True)
    ]
    best = int(np.argmin(np.round(left, 12)))
    by_score, slope = slopes[best]
    own = moments[:, best]
    residuals = own[:, :2, 2] - own[:, :2, :2] @ slopes[best]
    inverse = np.linalg.pinv(sums[best][:2, :2])
    error = np.sqrt((inverse @ total(residuals.T @ residuals) @ inverse)[1, 1])
    weight = slope / max(by_score, slope / MOST) if slope > error else 0.0
    fitted = {"weight": float(weight), "power": POWERS[best], "slope": float(slope), "error": float(error)}
    gains = [
        rouge[combine(scores, likelihood, fitted).argmax()] - rouge[scores.argmax()]
        for scores, likelihood, rouge in judged
    ]
    gain, documents = total(np.array([sum(gains, 0.0), len(gains)]))
    if gain <= 0:
        fitted["weight"] = 0.0
    return fitted | {"gain": max(0.0, float(gain / documents))}


def fitted_to(path):
    """The weight of the likelihood that `fit_best` fitted to the weights in the file `path`; None where there is none,
    as for a run's model.bin, which lies beside the description of its scorer.bin."""
    fitted = (read_description(path) or {}).get("likelihood")
    if not fitted:
        return None
    digest = provenance.digest_files([path])
    return fitted if fitted.get("scorer_digest", digest) == digest else None


def fit_best(run, scorer, description, samples, args, precision, world):
    """Fit the weight to the best weights of a ScorerRun that is at its end, and keep it in their scorer.json and in the
    record."""
    if run.stop.enough:  # --max_steps cut it short.
        return
    path = run.folder / "scorer.bin"
    world.barrier()  # The main process has written them.
    load_weights(path, scorer, description)
    fitted = fit(scorer, samples, args, precision, world)
    if fitted is None:
        return
    run.facts["likelihood"] = fitted = fitted | {"scorer_digest": provenance.digest_files([path])}
    if world.is_main:
        write_json(path.with_name("scorer.json"), description | {"likelihood": fitted})
    run.say(
        f"likelihood: weight {fitted['weight']:.3g} of log-probability / tokens^{fitted['power']:g}, a unit of which "
        f"is worth {100 * fitted['slope']:.2f} ± {100 * fitted['error']:.2f} ROUGE beside the score; it gains "
        f"{100 * fitted['gain']:+.2f} on validation (mean of the three)"
    )
