"""muon.py: what a step does to each kind of weight, in any layout, and that a saved state goes on with it."""

import copy

import pytest
import torch
from resnext_fast import make_optimizer

from models.resnext import ResNeXt
from muon import RATE, WEIGHT_DECAY, orthogonal

CPU = torch.device("cpu")


def with_gradients(model, seed):
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    return model


def optimizer_of(model, name="muon", lr=0.1):
    return make_optimizer(model, name, lr, CPU, torch.amp.GradScaler("cpu", enabled=False))


def after_steps(model, optimizer, seeds=range(3)):
    for seed in seeds:
        with_gradients(model, seed)
        optimizer.step()
    return dict(model.named_parameters())


@pytest.fixture
def model():
    torch.manual_seed(5)
    return ResNeXt(2, 4)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (32, 64), (16, 18)])
def test_all_directions_get_one_size_and_keep_their_place(rows, columns):
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns)
    found = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    seen = u.mT @ found @ v.mT  # Its singular values, if its directions are those of the matrices.
    sizes = seen.diagonal(dim1=1, dim2=2)
    assert ((sizes > 0.6) & (sizes < 1.3)).all()
    assert (seen - torch.diag_embed(sizes)).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["layer2.0.conv1", "layer2.0.conv3", "layer1.0.conv1"])
def test_a_matrix_is_updated_as_by_torch(model, name):
    """Wide and tall. torch's own takes the 1x1 convolutions as they are, but iterates in bfloat16."""
    theirs = copy.deepcopy(model)
    weight = theirs.get_submodule(name).weight
    before = weight.detach().clone()
    matrix = torch.nn.Parameter(before.flatten(1).clone())
    rate = RATE * 0.1
    reference = torch.optim.Muon([matrix], lr=rate, weight_decay=WEIGHT_DECAY / RATE, momentum=0.95)
    ours = after_steps(model, optimizer_of(model))[f"{name}.weight"]
    for seed in range(3):
        with_gradients(theirs, seed)
        matrix.grad = weight.grad.flatten(1).clone()
        reference.step()
    step = (ours - before).flatten(1)
    assert step.norm() > rate
    assert (step - (matrix - before.flatten(1))).norm() < 0.02 * step.norm()


def test_each_group_of_a_grouped_convolution_is_a_matrix(model):
    weight = model.layer1[0].conv2.weight
    before = weight.detach().clone()
    with_gradients(model, 0)
    gradient = weight.grad.clone()
    optimizer_of(model).step()
    for part, old, grad in zip(weight.chunk(2), before.chunk(2), gradient.chunk(2), strict=True):
        update = orthogonal(grad.flatten(1)[None])[0].view_as(old)
        expected = old * (1 - 0.1 * WEIGHT_DECAY) - 0.1 * RATE * update
        assert torch.allclose(part, expected, atol=1e-5)


def test_other_weights_follow_sgd(model):
    theirs = copy.deepcopy(model)
    sgd = after_steps(theirs, optimizer_of(theirs, "sgd"))
    equal = [name for name, weight in after_steps(model, optimizer_of(model)).items() if weight.equal(sgd[name])]
    batch_norms = [name for name, weight in model.named_parameters() if weight.ndim == 1 and "linear" not in name]
    assert sorted(equal) == sorted(["conv1.weight", *batch_norms, "linear.weight", "linear.bias"])


def test_the_layout_does_not_matter(model):
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    ours = dict(model.named_parameters())
    gradients = {name: torch.randn_like(weight) for name, weight in ours.items()}
    for each in (model, other):
        for name, weight in each.named_parameters():
            weight.grad = torch.empty_like(weight).copy_(gradients[name])  # As autograd lays them out.
        optimizer_of(each).step()
    for name, weight in other.named_parameters():
        assert torch.allclose(ours[name], weight, atol=1e-5)


def test_a_saved_state_goes_on(model):
    optimizer = optimizer_of(model)
    after_steps(model, optimizer)
    other = copy.deepcopy(model)
    resumed = optimizer_of(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours, theirs = after_steps(model, optimizer, [7, 8]), after_steps(other, resumed, [7, 8])
    assert all(ours[name].equal(theirs[name]) for name in ours)
