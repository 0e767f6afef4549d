"""main.py --memory_budget: the parts of an encoder's layers that backward redoes."""

import pytest
import torch
from model import Scorer
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from harness.distributed import World
from harness.endings import UserError
from harness.precision import choose_precision
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
