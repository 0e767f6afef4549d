"""The score by which a candidate is chosen: the scorer's score plus weighted terms for the generator's likelihood and
the agreement with the other candidates (texts.rouge_scores). The weights are fitted on the validation split.

A candidate's log-probability is divided by a power of its number of tokens: 1 gives the mean per token, 0 the sum.
"""

import numpy as np
import torch
from model import check_scores, load_weights, read_description, score_samples

from harness.devices import widest_float
from harness.endings import UserError
from harness.files import write_json
from texts import provenance
from texts.rouge_scores import mean_score

TERMS = ("likelihood", "agreement")  # In addition to the score.
POWERS = (1.0, 0.5, 0.0)
LARGEST_WEIGHT = 100.0  # With this weight, the scorer hardly counts any more.


def combine(scores, likelihood, agreement, weights):
    """The combined scores, float64 [..., candidates]: the scorer's scores plus the weighted TERMS.

    scores, agreement: float [..., candidates]. likelihood: float [..., candidates, 2], log-probabilities and numbers of
    tokens. A term with weight 0 may be None. weights: as from `fit`. UserError if a result is not finite.
    """
    with np.errstate(all="ignore"):
        if weights["likelihood"]:
            scores = scores + weights["likelihood"] * per_token(likelihood, weights["power"])
        if weights["agreement"]:
            scores = scores + weights["agreement"] * agreement
    if not np.isfinite(scores).all():
        shown = ", ".join(f"{name} {weights[name]:g}" for name in (*TERMS, "power"))
        raise UserError(f"the weights in scorer.json ({shown}) make scores that are not finite; train the scorer again")
    return scores


def per_token(likelihood, power):
    """Log-probabilities divided by the number of tokens ** power, float64 [..., candidates]."""
    log_probs, tokens = np.moveaxis(np.asarray(likelihood, dtype=np.float64), -1, 0)
    return log_probs / tokens**power


def fit(scorer, samples, args, precision, world):
    """The weights of `regress` for the scores of `scorer` on the SampleSet `samples`, which has ROUGE. Each process
    scores its share."""
    scored = []
    numbers = np.argsort(samples.document_lengths, kind="stable")[world.rank :: world.size]
    for part, _, scores, _ in score_samples(scorer, samples, numbers, 2 * args.batch_size, world.device, precision):
        for number, own in zip(part, scores.cpu().double().numpy(), strict=True):
            likelihood, agreement = (samples.figures(name, number) for name in TERMS)
            rouge = mean_score(samples.figures("rouge", number))
            check_scores(own[: len(rouge)], scorer)
            scored.append((own[: len(rouge)], likelihood, agreement, rouge))

    def total(sums):
        there = torch.from_numpy(sums).to(world.device, widest_float(world.device))
        return world.sum(there).cpu().double().numpy()

    return regress(scored, total)


def regress(scored, total=lambda sums: sums):
    """Fit the weights of the TERMS: a least-squares regression of ROUGE on the score and the TERMS, within documents.

    Returns the weights for `combine`, a dict: for each term its slope divided by that of the score, and "power". For
    information, it also has "slopes" and "errors": for each term, the ROUGE per unit of it with the others fixed, and
    its standard error, clustered by document (Liang and Zeger 1986). A term whose slope does not exceed its error gets
    weight 0. "gain" is the change of the choices' mean ROUGE here. (It need not be positive: with a few hundred
    documents it is mostly noise, and requiring it made choices worse.)

    scored: for each document of this process (scores float64 [candidates], likelihood [candidates, 2] or None,
    agreement [candidates], ROUGE float64 [candidates]). total: sums an array over the processes.
    """
    size = 1 + len(TERMS)
    moments = np.zeros((len(scored), len(POWERS), size + 1, size + 1))  # Of score, TERMS, ROUGE, centred per document.
    for own, (scores, likelihood, agreement, rouge) in zip(moments, scored, strict=True):
        for place, power in enumerate(POWERS):
            likely = np.zeros(len(scores)) if likelihood is None else per_token(likelihood, power)
            table = np.stack([scores, likely, agreement, rouge])
            table = table - table.mean(1, keepdims=True)
            own[place] = table @ table.T
    sums = total(moments.sum(0))
    fits = [_slopes(each, range(size)) for each in sums]
    # Among the powers with a positive slope of the likelihood, the one with the smallest residual.
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
        for scores, likelihood, agreement, rouge in scored
    ]
    gain, documents = total(np.array([sum(gains, 0.0), len(gains)]))
    told = {name: dict(zip(TERMS, map(float, each[1:]), strict=True))
            for name, each in {"slopes": slopes, "errors": errors}.items()}  # fmt: skip
    return weights | told | {"gain": float(gain / documents)}


def _slopes(moments, kept):
    """The slopes of ROUGE (the last row) on the columns `kept`, float64 [columns]; 0 for the other columns.

    moments: float64 [columns + 1, columns + 1].
    """
    slopes, kept = np.zeros(len(moments) - 1), list(kept)
    slopes[kept] = np.linalg.pinv(moments[np.ix_(kept, kept)]) @ moments[kept, -1]
    return slopes


def fitted_to(path, warnings):
    """The weights that `fit_best` fitted to the scorer in the file `path`, or None; a line is added to the list
    `warnings` if there are weights that belong to other contents of it. A run's model.bin has none: it only shares a
    folder with the description of scorer.bin."""
    fitted = (read_description(path) or {}).get("weights")
    if not fitted:
        return None
    digest = provenance.digest_files([path])
    if fitted.get("scorer_digest", digest) == digest:
        return fitted
    if path.name != "model.bin":
        warnings.append(
            f"the weights of the choice in scorer.json were fitted to another {path.name}; they are not used"
        )
    return None


def fit_best(run, scorer, description, samples, args, precision, world):
    """At the end of a ScorerRun, fit the weights to its best scorer, and store them in scorer.json and the record."""
    if run.stop.enough:  # --max_steps cut it short.
        return
    path = run.folder / "scorer.bin"
    world.barrier()  # Wait until the main process has written the weights.
    load_weights(path, scorer, description)
    fitted = fit(scorer, samples, args, precision, world)
    run.facts["weights"] = fitted = fitted | {"scorer_digest": provenance.digest_files([path])}
    if world.is_main:
        write_json(path.with_name("scorer.json"), description | {"weights": fitted})
    names = {"likelihood": f"log-probability / tokens^{fitted['power']:g}", "agreement": "agreement with the others"}
    for name, words in names.items():
        run.say(
            f"the choice adds {fitted[name]:.3g} x ({words}) to the score; one unit, before weighting, is worth "
            f"{100 * fitted['slopes'][name]:.2f} ± {100 * fitted['errors'][name]:.2f} ROUGE"
        )
    run.say(f"with these weights, validation choices change by {100 * fitted['gain']:+.2f} ROUGE (mean of the three)")
