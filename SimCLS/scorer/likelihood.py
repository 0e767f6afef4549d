"""The generator's own likelihood of a candidate beside the scorer's score: how much it counts is fitted on validation.

A candidate's log-probability is divided by a power of its number of tokens: 1 gives the mean a token, 0 the sum.
"""

import numpy as np
import torch
from model import load_weights, score_samples

from harness.devices import widest_float
from harness.files import write_json
from texts.scoring import mean_score

POWERS = (1.0, 0.5, 0.0)
WEIGHTS = (0.0, *(0.000625 * 2**step for step in range(10)))  # To 0.32.


def combine(scores, likelihood, fitted):
    """By what a candidate is chosen, float64 [..., candidates]: the scorer's scores, and the likelihood by its weight.

    scores: float [..., candidates]; likelihood: float [..., candidates, 2], log-probabilities and numbers of tokens.
    fitted: {"weight", "power"} as from `fit`.
    """
    log_probs, tokens = np.moveaxis(np.asarray(likelihood, dtype=np.float64), -1, 0)
    return scores + fitted["weight"] * log_probs / tokens ** fitted["power"]


def fit(scorer, samples, args, precision, world):
    """The {"weight", "power"} whose choices have the best mean ROUGE, and "gain", what they have above those of the
    scorer alone; None where samples have no likelihoods.

    A weight is judged by the mean over itself and its neighbours in WEIGHTS, since a peak of one weight is chance. Each
    process scores its share of the SampleSet `samples`.
    """
    if samples.likelihood(0) is None:
        return None
    grid = [[{"weight": weight, "power": power} for weight in WEIGHTS] for power in POWERS]
    sums = torch.zeros(len(POWERS), len(WEIGHTS), dtype=torch.float64)
    numbers = np.argsort(samples.document_lengths, kind="stable")[world.rank :: world.size]
    for part, _, scores, _ in score_samples(scorer, samples, numbers, 2 * args.batch_size, world.device, precision):
        for number, own in zip(part, scores.cpu().double().numpy(), strict=True):
            rouge, likelihood = mean_score(samples.rouge(number)), samples.likelihood(number)
            own = own[: len(rouge)]
            sums += torch.tensor([[rouge[combine(own, likelihood, each).argmax()] for each in row] for row in grid])
    sums = sums.to(world.device, widest_float(world.device))
    table = world.sum(sums).cpu().numpy() / len(samples)
    return choose(table, grid)


def choose(table, grid):
    """The entry of `grid` whose figure in `table` [powers, weights] is the best together with its neighbours' in the
    row, the smaller weight of two equal ones; with its "gain" over the first weight, 0."""
    smooth = np.stack([np.convolve(np.pad(row, 1, mode="edge"), np.ones(3) / 3, "valid") for row in table])
    power, weight = min(np.ndindex(smooth.shape), key=lambda place: (-round(smooth[place], 9), place[1], place[0]))
    return grid[power][weight] | {"gain": float(table[power, weight] - table[0, 0])}


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
    run.facts["likelihood"] = fitted
    if world.is_main:
        write_json(path.with_name("scorer.json"), description | {"likelihood": fitted})
    run.say(
        f"likelihood: weight {fitted['weight']:g} of log-probability / tokens^{fitted['power']:g}, on validation "
        f"{100 * fitted['gain']:+.2f} ROUGE (mean of the three)"
    )
