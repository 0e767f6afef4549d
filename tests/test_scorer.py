"""The scorer: its loss and its learning. What it reads: test_scorer_data.py; its files: test_scorer_weights.py."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_utils import SampleSet, TextEncoding, tokenize_samples
from model import load_encoder, load_scorer, ranking_loss, score_samples

from harness.distributed import World
from harness.precision import choose_precision
from pretrained.model_folders import half_precision_name
from scorer import converted_weights, metrics, short_attention
from scorer.metrics import CollapseWatch, Metrics, validate
from scorer.optimization import Schedule, seed_step
from scorer.scorer_arguments import get_args_parser, run_name
from texts.samples import read_sample, sample_files

CPU = torch.device("cpu")
FP32 = choose_precision(None, CPU)


@pytest.fixture(scope="module")
def encoding(encoders):
    return TextEncoding(load_encoder(encoders["t5"])[1], 60, 20)


@pytest.fixture(scope="module")
def val_set(sample_folder, encoding):
    samples = map(read_sample, sample_files(sample_folder / "val"))
    return SampleSet(tokenize_samples(samples, encoding, 16, "standard"), encoding, "cpu")


# ---------------------------------------------------------------------------------------------------- the loss


def loss_by_loops(scores, gold_scores, rouge, margin, gold_margin, gold_weight):
    """The published loss, one pair at a time; candidates that tie share the mean of their ranks, and make no pair.

    scores, rouge: lists of lists; a document's lists may have any length.
    """
    total = 0
    for own, gold, targets in zip(scores, gold_scores, rouge, strict=True):
        n = len(own)
        places = sorted(targets, reverse=True)
        ranks = [np.mean([place for place, value in enumerate(places) if value == target]) for target in targets]
        loss = 0
        for better in range(n):
            for worse in range(n):
                if targets[better] > targets[worse]:
                    distance = ranks[worse] - ranks[better]
                    missing = own[worse] - own[better] + margin * distance
                    loss = loss + max(missing, 0 * missing) / (n - distance)
        for score in own:
            missing = score - gold + gold_margin
            loss = loss + gold_weight * max(missing, 0 * missing) / n
        total = total + loss
    return total / len(scores)


@pytest.mark.parametrize("seed", range(8))
def test_loss_and_gradient_equal_a_loop_over_pairs(seed):
    rng = random.Random(seed)
    counts = [rng.randint(1, 6) for _ in range(4)]
    most = max(counts)
    scores = torch.rand(4, most, dtype=torch.float64, requires_grad=True)
    gold_scores = torch.rand(4, dtype=torch.float64, requires_grad=True)
    rouge = torch.tensor([[rng.choice((0.1, 0.2, 0.3, 0.5, 0.7)) for _ in range(most)] for _ in range(4)])
    present = torch.arange(most) < torch.tensor(counts)[:, None]
    settings = (0.1, 0.05, 0.7)
    loss = ranking_loss(scores, gold_scores, rouge, present, *settings)
    ragged = [[scores[row, place] for place in range(count)] for row, count in enumerate(counts)]
    targets = [rouge[row, :count].tolist() for row, count in enumerate(counts)]
    expected = loss_by_loops(ragged, list(gold_scores), targets, *settings)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (scores, gold_scores))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (scores, gold_scores)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loss_without_ties_is_the_mean_over_each_rank_difference():
    # Liu and Liu's code: for each difference the mean over its pairs, of all documents at once.
    scores, rouge = torch.rand(3, 8), torch.rand(3, 8)
    ordered = scores.gather(1, rouge.argsort(1, descending=True))
    expected = sum((ordered[:, step:] - ordered[:, :-step] + 0.01 * step).clamp(min=0).mean() for step in range(1, 8))
    loss = ranking_loss(scores, torch.ones(3), rouge, torch.ones(3, 8, dtype=torch.bool))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("candidates", "expected"), [(8, 0.28), (16, 1.20)])
def test_loss_of_a_collapsed_scorer(candidates, expected):
    equal, rouge = torch.zeros(2, candidates), torch.rand(2, candidates)
    loss = ranking_loss(equal, torch.zeros(2), rouge, torch.ones(2, candidates, dtype=torch.bool))
    assert loss.item() == pytest.approx(expected)


def test_candidates_that_tie_are_not_pushed_apart_and_their_order_does_not_matter():
    rouge = torch.tensor([[0.4, 0.2, 0.4, 0.1]])
    scores = torch.rand(1, 4, requires_grad=True)
    present = torch.ones(1, 4, dtype=torch.bool)
    order = torch.tensor([2, 1, 0, 3])
    swapped = ranking_loss(scores[:, order], torch.ones(1), rouge[:, order], present)
    torch.testing.assert_close(ranking_loss(scores, torch.ones(1), rouge, present), swapped)
    all_tie = ranking_loss(scores, torch.ones(1), torch.ones(1, 4), present)
    assert all_tie == 0
    assert torch.autograd.grad(all_tie, scores)[0].abs().max() == 0


# ------------------------------------------------------------------------------------- learning and validation


def test_schedule_goes_by_the_updates_made():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], fused=True)
    schedule = Schedule(optimizer, peak=1.0, warmup=2, updates=6)
    rates = []
    for attempt in range(8):
        parameter.grad = torch.ones(3)
        schedule.set()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if attempt not in (1, 4):  # A GradScaler skips these.
            optimizer.step()
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.75, 0.75, 0.5, 0.25])


def test_the_rate_of_a_run_rises_for_narrower_encoders_unless_it_is_given():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], fused=True)
    found = []
    for flags, width in (([], 768), ([], 192), (["--lr", "0.5"], 192)):
        args = get_args_parser("").parse_args([*flags, "--num_epoch", "3", "--warmup", "0.2"])
        schedule = Schedule.of_run(args, optimizer, width, updates_an_epoch=10)
        found.append((schedule.peak, schedule.warmup, schedule.updates))
    assert found == [(3e-5, 6, 30), (pytest.approx(2.4e-4), 6, 30), (0.5, 6, 30)]


def test_validation_is_the_mean_rouge_of_the_highest_scores(encoders, val_set):
    scorer = load_scorer(encoders["t5"], total_len=60, max_len=20)[0]
    args = get_args_parser("").parse_args([])
    shares = [validate(scorer, val_set, args, FP32, World(rank, 1, CPU)) for rank in (0,)]
    chosen = []
    for number in range(len(val_set)):
        ((_, _, scores, _),) = score_samples(scorer, val_set, [number], 1, CPU, FP32)
        chosen.append(val_set.figures("rouge", number)[scores[0].argmax()])
    means = np.mean(chosen, axis=0)
    first = np.mean([val_set.figures("rouge", number)[0] for number in range(len(val_set))], axis=0)
    assert [shares[0][f"first_{name}"] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(first, abs=1e-6)
    assert [shares[0][f"val_{name}"] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(means, abs=1e-6)


def test_a_candidate_that_is_not_there_is_never_chosen(val_set, monkeypatch):
    def scored(scorer, samples, numbers, *rest):
        present = torch.tensor([[True, True, False]])
        for number in numbers:
            yield [number], SimpleNamespace(present=present), torch.tensor([[-0.2, -0.1, 0.0]]), None

    monkeypatch.setattr(metrics, "score_samples", scored)
    monkeypatch.setattr(metrics, "loss_of", lambda *_: torch.zeros(()))
    result = validate(None, val_set, get_args_parser("").parse_args([]), FP32, World(0, 1, CPU))
    second = np.mean([val_set.figures("rouge", number)[1] for number in range(len(val_set))], axis=0)
    assert [result[f"val_{name}"] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(second, abs=1e-6)


def test_each_step_of_each_process_has_its_own_dropout_and_has_it_again():
    def drawn(*position):
        seed_step(*position)
        return float(torch.rand(1))

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(*places[0]) == drawn(*places[0])


@pytest.mark.parametrize(
    ("words", "name"),
    [("", ""), ("--half_precision bfloat16", "_bf16"), ("--frozen_layers 2", "_frozen2"),
     ("--use_checkpoint", "_checkpoint"), ("--memory_budget 0.5", "_budget0.5"), ("--seed 3", "_seed3"),
     ("--deterministic", "_deterministic")],
)  # fmt: skip
def test_what_changes_a_run_is_in_its_name(words, name):
    assert run_name(get_args_parser("").parse_args(["--num_workers", "1", *words.split()])) == f"simcls_1_worker{name}"


def test_recomputation_changes_no_gradient_and_keeps_less(encoders, val_set):
    from harness.memory import SavedBytes

    results = []
    for recompute in (False, True):
        scorer = load_scorer(encoders["t5"], total_len=60, max_len=20, dropout=0.1)[0]
        if recompute:
            scorer.recompute_activations()
        batch = val_set.batch(range(6))
        torch.manual_seed(0)  # Dropout's masks must be the same when they are redone.
        with SavedBytes(scorer) as saved:
            loss = ranking_loss(*scorer(batch), batch.rouge, batch.present)
        loss.backward()
        results.append((saved.bytes, [weight.grad for weight in scorer.parameters()]))
    (plain, gradients), (recomputed, same_gradients) = results
    assert recomputed < plain / 2
    assert all(torch.equal(one, other) for one, other in zip(gradients, same_gradients, strict=True))


@pytest.mark.parametrize("kind", ["t5", "bert", "roberta"])
def test_the_last_layer_computes_the_first_token_s_state_as_if_with_all_others(kind, encoders):
    scorer, whole = load_scorer(encoders[kind])[0], load_encoder(encoders[kind])[0]
    ids, lengths = torch.randint(5, 60, (6, 9)), torch.tensor([9, 9, 7, 5, 4, 3])
    mask = torch.arange(9) < lengths[:, None]
    expected = whole(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert scorer.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.shape == (
        6,
        1,
        expected.shape[2],
    )
    found = scorer.encode_texts([ids], [lengths])
    torch.testing.assert_close(found, expected[:, 0])
    found.square().sum().backward()
    expected[:, 0].square().sum().backward()
    for one, other in zip(scorer.encoder.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("kind", ["t5", "bert", "roberta"])
def test_short_texts_in_bfloat16_on_a_cpu_have_the_gradients_of_fused_attention(kind, encoders):
    groups = [torch.randint(5, 60, (4, 9))], [torch.tensor([9, 8, 5, 3])]
    results = []
    for dtype in (None, torch.bfloat16):
        scorer = load_scorer(encoders[kind])[0]
        short_attention.prefer(scorer.encoder, CPU, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            states = scorer.encode_texts(*groups)
        states.square().sum().backward()
        gradients = [weight.grad.norm() for weight in scorer.parameters()]
        results.append((scorer.encoder.config._attn_implementation, states, torch.stack(gradients)))
    assert [name for name, _, _ in results] == ["sdpa", short_attention.NAME]
    assert torch.equal(results[0][2], results[1][2]) == (kind == "t5")  # Whose bias by position fused attention adds.
    for one, other in zip(*(each[1:] for each in results), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_weights_that_do_not_learn_are_converted_once(kind, encoders, monkeypatch):
    scorer = load_scorer(encoders[kind])[0]
    scorer.freeze_layers(1)
    linears = [linear for linear in scorer.encoder.modules() if type(linear) is torch.nn.Linear]
    frozen = [linear for linear in linears if not linear.weight.requires_grad]
    assert 0 < len(frozen) < len(linears)
    made = []
    product = converted_weights.product
    monkeypatch.setattr(
        converted_weights, "product", lambda *parts, **rest: made.append(parts) or product(*parts, **rest)
    )
    groups = [torch.randint(5, 60, (4, 9)), torch.randint(5, 60, (2, 7))], [None, torch.tensor([7, 3])]

    def encode(training):
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            return scorer.encode_texts(*groups)

    with torch.autocast("cpu", torch.bfloat16):
        for linear in linears:
            del linear.forward  # As the library computes it.
        expected = scorer.encode_texts(*groups)
        converted_weights.convert_once(scorer.encoder)
    for _ in range(2):
        states = encode(training=True)
        torch.testing.assert_close(states, expected, rtol=0.02, atol=0.02)
    assert len(made) == len(frozen), "once for all groups and steps"
    states.square().sum().backward()
    assert all((linear.weight.grad is None) == (linear in frozen) for linear in linears)
    before = encode(training=False)
    torch.testing.assert_close(before, expected, rtol=0.02, atol=0.02)
    assert len(made) == len(linears)
    with torch.no_grad():
        linears[0].weight.mul_(2)  # As from a file.
    assert not torch.equal(encode(training=False), before)
    assert len(made) == len(linears) + 1, "changed weights are converted again, and no others"


@pytest.mark.parametrize("mask", ["bool", "float", "none"])
def test_attention_of_short_texts_equals_the_library_s(mask, monkeypatch):
    torch.manual_seed(0)
    parts = [torch.randn(3, 2, 5, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    seen = (torch.arange(5) < torch.tensor([5, 3, 2])[:, None])[:, None, None].expand(-1, 1, 5, -1)
    if mask == "float":
        seen = torch.zeros(3, 1, 5, 5, dtype=torch.bfloat16).masked_fill(~seen, -1e4)
    seen = None if mask == "none" else seen
    module = SimpleNamespace(is_causal=False)
    found = short_attention.attention(module, *parts, seen, scaling=0.7)[0]
    monkeypatch.setattr(short_attention, "SHORT", 4)
    fused = short_attention.attention(module, *parts, seen, scaling=0.7)[0]
    torch.testing.assert_close(found, fused, rtol=0.02, atol=0.02)
    assert not torch.equal(found, fused)  # They are different computations.


def test_attention_of_short_texts_drops_weights_as_often_as_it_is_told():
    torch.manual_seed(0)
    query, key = (torch.zeros(8, 4, 64, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    # Equal weights of 1 / 64 choose rows of the identity: the result is the weights.
    value = torch.eye(64, dtype=torch.bfloat16).expand(8, 4, 64, 64)
    module = SimpleNamespace(is_causal=False)
    weights = 64 * short_attention.attention(module, query, key, value, None, dropout=0.25)[0].float()
    assert weights.unique().tolist() == pytest.approx([0, 4 / 3], rel=0.01)
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_a_stopped_run_does_not_validate():
    assert metrics.validate(None, None, None, None, World(1, 2, CPU), stop=True) is None


def test_metrics_are_means_over_documents():
    metrics, world = Metrics(CPU), World(0, 1, CPU)

    class Batch:
        rouge = torch.tensor([[0.3, 0.2, 0.1], [0.5, 0.1, 0]])
        present = torch.tensor([[True, True, True], [True, True, False]])

    metrics.add(torch.tensor(1.0), torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.2, -1.0]]), Batch, 1.0)
    metrics.add(torch.tensor(7.0), torch.zeros(2, 3), Batch, 0.0)
    assert metrics.report(world) == pytest.approx([1.0, 0.25])
    assert metrics.flat_loss(get_args_parser("").parse_args([])) == pytest.approx((0.03 + 0.01) / 2)
    metrics.add(torch.tensor(4.0), torch.zeros(2, 3), Batch, 1.0)
    assert metrics.epoch_loss(world) == pytest.approx(2.5)
    assert metrics.report(world)[0] == 4.0


def test_a_saved_state_has_the_sums_of_all_processes():
    class Both(World):
        def sum(self, totals):
            return totals + torch.full_like(totals, 2.0)  # What the other process has.

    for rank, expected in ((0, 5.0), (1, 0.0)):
        metrics = Metrics(CPU)
        metrics.totals.fill_(3.0)
        metrics.gather(Both(rank, 2, CPU))
        assert (metrics.state_dict()["totals"] == expected).all()


@pytest.mark.parametrize("every", [1, 20, 50])
def test_collapse_is_seen_within_100_updates(every):
    def seen(spread_at, until=400):
        watch = CollapseWatch(margin=0.01)
        watch.warmup = 30
        updates = range(every, until, every)
        return [update for update in updates if watch.sees_collapse(update, spread_at(update))]

    assert seen(lambda update: 0.05) == []
    (collapse,) = seen(lambda update: 0.05 if update < 200 else 1e-6)
    assert 200 < collapse <= 300
    (never_learned,) = seen(lambda update: 1e-4)
    assert never_learned <= 130
    # A fresh BERT: the spread grows from nothing.
    assert seen(lambda update: min(1e-4 * 1.02**update, 0.05)) == []
    collapses = seen(lambda update: 1e-6 if update < 150 or update >= 250 else 0.05)
    assert len(collapses) == 2


@pytest.mark.parametrize(("words", "kind", "on_cuda"), [
    ("--half_precision", "t5", "bfloat16"), ("--half_precision True", "bert", "float16"), ("", "t5", None),
    ("--half_precision float16", "t5", "float16"),
])  # fmt: skip
def test_half_precision_that_names_no_type_is_bfloat16_for_encoders_of_the_t5_family(words, kind, on_cuda, encoders):
    args = get_args_parser("").parse_args([*words.split(), "--model_type", encoders[kind]])
    architecture = load_scorer(args.model_type)[2]["architecture"]
    assert half_precision_name(args.half_precision, architecture) == on_cuda
    assert run_name(args) == f"simcls_{args.num_workers}_worker" + "_fp16" * bool(words)
