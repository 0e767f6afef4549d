"""main.py --memory_budget: the parts of an encoder's layers that backward redoes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model import Scorer
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from harness.distributed import World
from harness.endings import UserError
from harness.precision import choose_precision
from scorer import layer_plan
from scorer.layer_plan import KINDS, parts_of, plan_layers, redo_parts

pytestmark = pytest.mark.slow

LAYERS = 4
CPU = torch.device("cpu")
SINGLE, ALONE = choose_precision(None, CPU), World(0, 1, CPU)
TEXTS, LENGTHS = torch.arange(480).view(6, 80) % 99 + 1, torch.tensor([80, 70, 60, 80, 33, 50])


def make_bert():
    size = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    return BertModel(BertConfig(vocab_size=100, **size), add_pooling_layer=False)


def make_t5():
    return T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_ff=128, num_layers=LAYERS, num_heads=2, d_kv=16))


@pytest.fixture(scope="module", params=[make_bert, make_t5], ids=["bert", "t5"])
def scorer(request):
    torch.manual_seed(0)
    return Scorer(request.param()).train()  # With dropout.


def gradients(scorer):
    torch.manual_seed(1)
    scorer.zero_grad()
    scorer.encode_texts([TEXTS], [LENGTHS]).square().sum().backward()
    return [weight.grad.clone() for weight in scorer.parameters() if weight.grad is not None]


def test_every_layers_parts_are_found(scorer):
    found = parts_of(scorer.encoder)
    assert {number: set(parts) for number, parts in found.items()} == dict.fromkeys(range(LAYERS), set(KINDS))


@pytest.mark.parametrize("budget", [0.8, 0.6, 0.4])
def test_a_plan_is_within_its_budget_as_predicted_and_changes_no_gradient(scorer, budget):
    redo_parts(parts_of(scorer.encoder), ())
    plain = gradients(scorer)
    plan, share = plan_layers(scorer, TEXTS, LENGTHS, budget, SINGLE, ALONE)
    assert budget - 0.25 < share <= budget
    assert plan.peak_bytes / plan.plain_peak_bytes == pytest.approx(share, rel=0.05)
    for one, other in zip(plain, gradients(scorer), strict=True):
        assert torch.equal(one, other)


def test_a_budget_that_cannot_be_met_is_refused(scorer):
    with pytest.raises(UserError, match="a memory budget of 0.05 cannot be met"):
        plan_layers(scorer, TEXTS, LENGTHS, 0.05, SINGLE, ALONE)


@pytest.mark.parametrize("make", [make_bert, make_t5])
def test_frozen_layers_get_no_gradient_the_others_their_own_and_a_plan_leaves_them_alone(make):
    torch.manual_seed(0)
    scorer = Scorer(make()).train()
    whole = dict(zip([name for name, _ in scorer.named_parameters()], gradients(scorer), strict=True))
    scorer.freeze_layers(2)
    gradients(scorer)
    own = {name: weight.grad for name, weight in scorer.named_parameters() if weight.grad is not None}
    layers = "layer" if make is make_bert else "block"
    above = {name for name in whole if f"{layers}.2." in name or f"{layers}.3." in name or "final_layer_norm" in name}
    assert own.keys() == above
    assert all(torch.equal(own[name], whole[name]) for name in above)
    plan, share = plan_layers(scorer, TEXTS, LENGTHS, 0.8, SINGLE, ALONE)
    assert 0.5 < share <= 0.8
    assert plan.redo
    assert all(name[0] in "23" for name in plan.redo)
    with pytest.raises(UserError, match=f"the encoder has {LAYERS} layers"):
        scorer.freeze_layers(LAYERS)


@pytest.mark.parametrize("make", [make_bert, make_t5])
def test_recomputation_leaves_frozen_layers_alone(make):
    """The library lets the embeddings require gradients, for which backward would go through all layers."""
    scorer = Scorer(make()).train()
    scorer.freeze_layers(2)
    scorer.recompute_activations()
    layers = next(each for each in scorer.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == LAYERS)
    calls = []
    for number, layer in enumerate(layers):
        part = next(each for each in layer.modules() if isinstance(each, torch.nn.Linear))
        part.register_forward_hook(lambda *_, number=number: calls.append(number))
    scorer.encode_texts([TEXTS], [LENGTHS]).square().sum().backward()
    assert [calls.count(number) for number in range(LAYERS)] == [1, 1, 2, 2]


def test_the_plan_is_made_for_the_longest_documents_and_what_is_kept_told_of_usual_ones(monkeypatch):
    class Samples:
        document_lengths = np.array([5, 90, 20, 50, 10, 60])

        def __len__(self):
            return 6

        def batch(self, numbers):
            return SimpleNamespace(to=lambda device: self.document_lengths[numbers].tolist())

    held, planned, sizes = [], [], iter([120, 30])
    monkeypatch.setattr(layer_plan, "_held", lambda scorer, batch, autocast: held.append(batch) or next(sizes))
    monkeypatch.setattr(layer_plan, "_plan_budget", lambda scorer, batch, *rest: planned.append(batch))
    args, run = SimpleNamespace(memory_budget=0.5, use_checkpoint=False, batch_size=2), SimpleNamespace()
    layer_plan.plan_memory(None, Samples(), args, ALONE, SINGLE, run)
    assert (planned, held) == ([[60, 90]], [[20, 50]] * 2)
    assert run.kept_share == 30 / 120


def test_a_budget_is_planned_for_the_largest_call_and_the_plan_is_told(monkeypatch):
    redo, calls, said, run = {"0.attention", "1.feed_forward", "1.attention"}, [], [], SimpleNamespace(facts={})
    plan = SimpleNamespace(redo=redo, peak_bytes=60, plain_peak_bytes=100)
    monkeypatch.setattr(
        layer_plan, "plan_layers", lambda _, texts, lengths, *rest: calls.append(lengths) or (plan, 0.5)
    )
    batch = SimpleNamespace(texts=[torch.zeros(2, 5), torch.zeros(4, 9)], lengths=["few", "many"])
    args, world = SimpleNamespace(memory_budget=0.6), SimpleNamespace(say=said.append)
    layer_plan._plan_budget(None, batch, args, world, SINGLE, run)
    assert calls == ["many"]
    assert said == ["plan: backward recomputes 2 x attention and 1 x feed-forward, for a peak of 0.500 (planned 0.600)"]
    assert run.facts["plan"] == {"redo": sorted(redo), "peak_share": 0.5, "planned_peak_share": 0.6}


def test_each_part_of_a_layer_costs_its_own_bytes_and_seconds():
    names = [f"{number}.{kind}" for number in (2, 3) for kind in KINDS]
    sizes, seconds = dict(zip(names, (10, 30, 10, 5), strict=True)), dict(zip(names, (0.1, 0.2, 0.1, 0.3), strict=True))
    timeline = layer_plan._timeline([2, 3], sizes, seconds, held=100, peak=150)
    assert [(name, step.bytes, step.seconds) for name, step in timeline.steps.items()] == [
        (name, sizes[name], seconds[name]) for name in names
    ]
    assert timeline.fixed == 45
    assert [group.entry for group in timeline.groups] == [None, "2.feed_forward"]
