"""How much the generator's likelihood counts beside the scorer: fitted on validation, and bound to the weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.distributed import World
from scorer import choices, likelihood
from scorer.scorer_arguments import get_args_parser


class Known:
    """Samples of which the candidate with the highest mean log-probability of a token is the best, but for chance."""

    def __init__(self, with_likelihood=True):
        draws = np.random.default_rng(0)
        self.tokens = draws.integers(5, 40, (200, 6))
        self.means = draws.normal(-1, 0.5, (200, 6))
        self.figures = self.means + draws.normal(0, 0.1, (200, 6))
        self.scores = draws.normal(0, 0.005, (200, 6))
        self.document_lengths, self.with_likelihood = np.zeros(200), with_likelihood

    def __len__(self):
        return 200

    def rouge(self, number):
        return self.figures[number, :, None].repeat(3, axis=1)

    def likelihood(self, number):
        pairs = self.means[number] * self.tokens[number], self.tokens[number]
        return np.stack(pairs, axis=-1) if self.with_likelihood else None


def test_the_weight_of_the_likelihood_is_fitted_on_validation(monkeypatch):
    def scored(scorer, samples, numbers, *rest):
        yield numbers, None, torch.from_numpy(scorer * samples.scores[numbers]), None

    monkeypatch.setattr(likelihood, "score_samples", scored)
    known, world = Known(), World(0, 1, torch.device("cpu"))
    args = get_args_parser("").parse_args([])
    fitted = likelihood.fit(1.0, known, args, None, world)
    assert fitted["power"] == 1.0
    assert fitted["gain"] > 0.5
    samples = [{"likelihood": known.likelihood(number)} for number in range(200)]
    chosen = {}
    for name, each in {"alone": None, "fitted": fitted}.items():
        places = choices.by_scorer(list(known.scores), samples, each)
        chosen[name] = np.mean([known.figures[number][place] for number, place in enumerate(places)])
    assert chosen["fitted"] - chosen["alone"] == pytest.approx(fitted["gain"])
    known.scores = known.figures + np.random.default_rng(1).normal(0, 0.2, (200, 6))
    both = likelihood.fit(1.0, known, args, None, world)  # The means have an error of 0.1, the scores twice of it.
    assert both["weight"] == pytest.approx(0.2**2 / 0.1**2, rel=0.2)
    assert both["slope"] == pytest.approx(0.8, abs=3 * both["error"])
    known.scores = known.figures  # A scorer that knows all needs no likelihood.
    knowing = likelihood.fit(100.0, known, args, None, world)
    assert (knowing["weight"], knowing["gain"]) == (pytest.approx(0, abs=1e-9), 0)
    assert likelihood.fit(1.0, Known(with_likelihood=False), args, None, world) is None


def test_the_error_of_the_slope_is_that_over_documents():
    """200 times 40 documents of which the likelihood says nothing, but each of whose candidates are there twice."""
    draws = np.random.default_rng(0)
    found = []
    for _ in range(200):
        pairs = [(draws.normal(0, 1, 4).repeat(2), draws.normal(-1, 1, 4).repeat(2)) for _ in range(40)]
        judged = [(scores, np.stack([means, np.ones(8)], -1), scores + draws.normal(0, 1, 4).repeat(2))
                  for scores, means in pairs]  # fmt: skip
        found.append(likelihood.regress(judged))
    slopes, errors = (np.array([each[name] for each in found]) for name in ("slope", "error"))
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(slopes.std(), rel=0.15)
    assert all(each["weight"] == 0 for each in found if each["slope"] <= each["error"] or each["gain"] == 0)
    assert any(each["weight"] > 0 for each in found)


def test_the_likelihood_counts_by_a_power_that_makes_the_likelier_the_better():
    """Though the sum, which is the lower the longer, would explain more: here longer candidates are the better ones."""
    draws, judged = np.random.default_rng(0), []
    for _ in range(200):
        tokens, means, scores = draws.integers(4, 20, 6), draws.normal(-1, 0.2, 6), draws.normal(0, 1, 6)
        rouge = scores + 0.3 * tokens + means
        judged.append((scores, np.stack([means * tokens, tokens], -1), rouge))
    fitted = likelihood.regress(judged)
    assert fitted["power"] == 1.0
    assert fitted["slope"] > 0


def test_a_weight_that_gains_nothing_is_none():
    """Beside the scores, likelihood says which of the worst two is worse, and is wrong of the best two."""
    scores, rouge = np.array([3.0, 2.9, 1.0, 1.0]), np.array([3.0, 2.8, 2.0, 0.0])
    likelihood_of = np.stack([np.array([-1.2, -1.0, -1.0, -3.0]), np.ones(4)], -1)
    draws = np.random.default_rng(0)
    judged = [(scores, likelihood_of, rouge + draws.normal(0, 0.01, 4)) for _ in range(20)]
    fitted = likelihood.regress(judged)
    assert fitted["slope"] > fitted["error"]
    assert (fitted["weight"], fitted["gain"]) == (0, 0)


def test_shares_of_processes_make_one_fit():
    known = Known()
    judged = [(known.scores[number], known.likelihood(number), known.figures[number]) for number in range(200)]
    whole, sums = likelihood.regress(judged), []
    likelihood.regress(judged[::2], lambda own: sums.append(own) or own)
    # The second process, whose sums come together with those of the first as far as they do not hang on the fit.
    others = iter(sums[:1])
    half = likelihood.regress(judged[1::2], lambda own: own + next(others, 0))
    assert (half["slope"], half["power"]) == (pytest.approx(whole["slope"]), whole["power"])


def test_a_weight_counts_for_the_weights_that_it_was_fitted_to_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "load_weights", lambda *_: None)
    monkeypatch.setattr(
        likelihood, "fit", lambda *_: {"weight": 0.04, "power": 1.0, "slope": 0.02, "error": 0.01, "gain": 0.1}
    )
    run = SimpleNamespace(stop=SimpleNamespace(enough=False), folder=tmp_path, facts={}, say=print)
    for name in ("scorer.bin", "model.bin"):
        (tmp_path / name).write_text(name)
    likelihood.fit_best(run, None, {"encoder": "bert"}, None, None, None, World(0, 1, torch.device("cpu")))
    assert likelihood.fitted_to(tmp_path / "scorer.bin") == run.facts["likelihood"]
    assert likelihood.fitted_to(tmp_path / "model.bin") is None
    (tmp_path / "scorer.json").write_text('{"encoder": "bert", "likelihood": {"weight": 0.04}}')  # As before.
    assert likelihood.fitted_to(tmp_path / "model.bin") == {"weight": 0.04}
