"""How much likelihood and agreement count beside the scorer: fitted on validation, and bound to the scorer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.distributed import World
from harness.endings import UserError
from scorer import choices, combination
from scorer.scorer_arguments import get_args_parser

NOTHING = np.zeros(6)


class Known:
    """Samples of which the candidate with the highest mean log-probability of a token is the best, but for chance."""

    def __init__(self, with_likelihood=True):
        draws = np.random.default_rng(0)
        self.tokens = draws.integers(5, 40, (200, 6))
        self.means = draws.normal(-1, 0.5, (200, 6))
        self.means_of_rouge = self.means + draws.normal(0, 0.1, (200, 6))
        self.scores = draws.normal(0, 0.005, (200, 6))
        self.alike = self.means_of_rouge + draws.normal(0, 0.3, (200, 6))
        self.document_lengths, self.with_likelihood = np.zeros(200), with_likelihood

    def __len__(self):
        return 200

    def figures(self, name, number):
        pairs = self.means[number] * self.tokens[number], self.tokens[number]
        return {
            "rouge": self.means_of_rouge[number, :, None].repeat(3, axis=1),
            "likelihood": np.stack(pairs, axis=-1) if self.with_likelihood else None,
            "agreement": self.alike[number],
        }[name]


def fit(samples, scale=1.0):
    """`combination.fit` where the scorer gives `scale` times the samples' scores."""

    def scored(scorer, samples, numbers, *rest):
        yield numbers, None, torch.from_numpy(scorer * samples.scores[numbers]), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combination, "score_samples", scored)
        world = World(0, 1, torch.device("cpu"))
        return combination.fit(scale, samples, get_args_parser("").parse_args([]), None, world)


def test_what_counts_beside_the_score_is_fitted_on_validation():
    known = Known()
    weights = fit(known)
    assert weights["power"] == 1.0
    assert weights["gain"] > 0.5
    samples = [{name: known.figures(name, n) for name in combination.TERMS} for n in range(200)]
    chosen = {}
    for name, each in {"alone": None, "weighted": weights}.items():
        places = choices.by_scorer(list(known.scores), samples, each)
        chosen[name] = np.mean([known.means_of_rouge[number][place] for number, place in enumerate(places)])
    assert chosen["weighted"] - chosen["alone"] == pytest.approx(weights["gain"])


@pytest.mark.parametrize("with_likelihood", [True, False])
def test_terms_count_by_how_well_they_know(with_likelihood):
    """Errors of 0.2, 0.1 and 0.3 in score, likelihood and agreement: the best weights are as their inverse squares."""
    known = Known(with_likelihood)
    known.scores = known.means_of_rouge + np.random.default_rng(1).normal(0, 0.2, (200, 6))
    weights = fit(known)
    likely = 0.2**2 / 0.1**2 if with_likelihood else 0.0
    alike = 0.2**2 / 0.3**2
    assert weights["likelihood"] == pytest.approx(likely, rel=0.2)
    assert weights["agreement"] == pytest.approx(alike, rel=0.4)
    # The figures' own variance of 0.26 shrinks each slope, as a fourth measurement without error would.
    known_by = 1 + likely + alike + 0.2**2 / 0.26
    assert weights["slopes"]["likelihood"] == pytest.approx(likely / known_by, abs=0.05)
    assert weights["slopes"]["agreement"] == pytest.approx(alike / known_by, abs=3 * weights["errors"]["agreement"])


def test_a_scorer_that_knows_all_needs_nothing_beside_it():
    known = Known()
    known.scores = known.means_of_rouge
    weights = fit(known, 100.0)
    assert (weights["likelihood"], weights["agreement"]) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert weights["gain"] == 0


def test_the_error_of_a_slope_is_that_over_documents():
    """200 times 40 documents of which the likelihood says nothing, but each of whose candidates are there twice."""
    draws = np.random.default_rng(0)
    found = []
    for _ in range(200):
        terms = [[draws.normal(0, 1, 4).repeat(2) for _ in range(3)] for _ in range(40)]
        judged = [(scores, np.stack([means - 1, np.ones(8)], -1), alike, scores + draws.normal(0, 1, 4).repeat(2))
                  for scores, means, alike in terms]  # fmt: skip
        found.append(combination.regress(judged))
    for name in combination.TERMS:
        slopes, errors = (np.array([each[what][name] for each in found]) for what in ("slopes", "errors"))
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(slopes.std(), rel=0.15)
        for each in found:
            assert (each[name] > 0) == (each["slopes"][name] > each["errors"][name])
        assert {each[name] > 0 for each in found} == {True, False}


def test_the_likelihood_counts_by_a_power_that_makes_the_likelier_the_better():
    """Though the sum, which is the lower the longer, would explain more: here longer candidates are the better ones."""
    draws, judged = np.random.default_rng(0), []
    for _ in range(200):
        tokens, means, scores = draws.integers(4, 20, 6), draws.normal(-1, 0.2, 6), draws.normal(0, 1, 6)
        rouge = scores + 0.3 * tokens + means
        judged.append((scores, np.stack([means * tokens, tokens], -1), NOTHING, rouge))
    weights = combination.regress(judged)
    assert weights["power"] == 1.0
    assert weights["slopes"]["likelihood"] > 0
    assert weights["agreement"] == 0


def test_shares_of_processes_make_one_fit():
    known = Known()
    terms = [[known.figures(name, n) for name in combination.TERMS] for n in range(200)]
    judged = [(known.scores[n], *terms[n], known.means_of_rouge[n]) for n in range(200)]
    whole, sums = combination.regress(judged), []
    combination.regress(judged[::2], lambda own: sums.append(own) or own)
    # The second process, whose sums come together with those of the first as far as they do not hang on the fit.
    others = iter(sums[:1])
    half = combination.regress(judged[1::2], lambda own: own + next(others, 0))
    assert half["slopes"] == pytest.approx(whole["slopes"])
    assert half["power"] == whole["power"]


def test_weights_count_for_the_scorer_that_they_were_fitted_to_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(combination, "load_weights", lambda *_: None)
    known = Known()
    weights = fit(known)
    monkeypatch.setattr(combination, "fit", lambda *_: weights)
    said = []
    run = SimpleNamespace(stop=SimpleNamespace(enough=False), folder=tmp_path, facts={}, say=said.append)
    for name in ("scorer.bin", "model.bin"):
        (tmp_path / name).write_text(name)
    combination.fit_best(run, None, {"encoder": "bert"}, None, None, None, World(0, 1, torch.device("cpu")))
    warnings = []
    assert combination.fitted_to(tmp_path / "scorer.bin", warnings) == run.facts["weights"]
    assert combination.fitted_to(tmp_path / "model.bin", warnings) is None
    assert warnings == []
    (tmp_path / "scorer.bin").write_text("another")
    assert combination.fitted_to(tmp_path / "scorer.bin", warnings) is None
    (line,) = warnings
    assert "fitted to another scorer.bin; they are not used" in line
    assert f"adds {weights['likelihood']:.3g} x (log-probability / tokens^1) to the score" in said[0]
    assert f"adds {weights['agreement']:.3g} x (agreement with the others) to the score" in said[1]


def test_a_combined_score_that_is_not_finite_is_refused():
    likelihood, agreement = np.array([[-1.0, 2.0], [-2.0, 3.0]]), np.array([0.5, 0.1])
    for weights in ({"likelihood": 1e308, "power": -1e308}, {"likelihood": 0.0, "power": 1.0, "agreement": 1e308}):
        with pytest.raises(UserError, match="make scores that are not finite"):
            combination.combine(np.array([1e308, 0.0]), likelihood, 10 * agreement, {"agreement": 0.0} | weights)
