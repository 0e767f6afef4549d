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
WEIGHTS = (0.0, *(0.000625 * 2**step for step in range(10)))  # To 0.32.
GRID = [[{"weight": weight, "power": power} for weight in WEIGHTS] for power in POWERS]
FOLDS = 10
CLEAR = 1.645  # Standard errors, of a one-sided test at 5 %.


def combine(scores, likelihood, fitted):
    """By what a candidate is chosen, float64 [..., candidates]: the scorer's scores, and the likelihood by its weight.

    scores: float [..., candidates]; likelihood: float [..., candidates, 2], log-probabilities and numbers of tokens.
    fitted: {"weight", "power"} as from `fit`.
    """
    log_probs, tokens = np.moveaxis(np.asarray(likelihood, dtype=np.float64), -1, 0)
    return scores + fitted["weight"] * log_probs / tokens ** fitted["power"]


def fit(scorer, samples, args, precision, world):
    """The {"weight", "power", "gain", "error"} of `choose` for the choices of `scorer` among the SampleSet `samples`;
    None where samples have no likelihoods. Each process scores its share."""
    if samples.likelihood(0) is None:
        return None
    sums = torch.zeros(2, FOLDS, len(POWERS), len(WEIGHTS), dtype=torch.float64)  # Of gains, and of their squares.
    numbers = np.argsort(samples.document_lengths, kind="stable")[world.rank :: world.size]
    for part, _, scores, _ in score_samples(scorer, samples, numbers, 2 * args.batch_size, world.device, precision):
        for number, own in zip(part, scores.cpu().double().numpy(), strict=True):
            rouge, likelihood = mean_score(samples.rouge(number)), samples.likelihood(number)
            own = own[: len(rouge)]
            chosen = torch.tensor([[rouge[combine(own, likelihood, each).argmax()] for each in row] for row in GRID])
            gains = chosen.double() - chosen[0, 0]
            sums[:, number % FOLDS] += torch.stack([gains, gains**2])
    sums = world.sum(sums.to(world.device, widest_float(world.device)))
    return choose(*sums.cpu().double().numpy(), len(samples))


def choose(gains, squares, documents):
    """The {"weight", "power"} with the best mean ROUGE, or no weight where that is not clearly better than none; with
    the "gain" of fitting one, cross-validated, and the standard "error" of that.

    A weight fits its own documents better than others. So each fold gets the weight that is the best on the other
    folds, and what that gains there is "gain". It is clear when chance would give it once in twenty times.

    gains, squares: sums over the documents of a fold, float64 [folds, powers, weights], of the ROUGE that an entry of
    GRID gains over the scorer alone, and of its square. documents: in all folds.
    """
    places = [_best(gains.sum(0) - own) for own in gains]
    gain, square = (
        sum(own[place] for own, place in zip(sums, places, strict=True)) / documents for sums in (gains, squares)
    )
    error = np.sqrt(max(square - gain**2, 0) / documents)
    power, weight = _best(gains.sum(0)) if gain > CLEAR * error else (0, 0)
    return GRID[power][weight] | {"gain": float(gain), "error": float(error)}


def _best(table):
    """The place in `table` [powers, weights] whose figure is the best together with its neighbours' in the row, since a
    peak of one weight is chance; of equal ones the smaller weight."""
    smooth = np.stack([np.convolve(np.pad(row, 1, mode="edge"), np.ones(3) / 3, "valid") for row in table])
    return min(np.ndindex(smooth.shape), key=lambda place: (-round(smooth[place], 9), place[1], place[0]))


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
        f"likelihood: weight {fitted['weight']:g} of log-probability / tokens^{fitted['power']:g}; cross-validated it "
        f"gains {100 * fitted['gain']:+.2f} ± {100 * fitted['error']:.2f} ROUGE (mean of the three)"
    )
