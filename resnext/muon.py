"""Muon: SGD whose updates of the hidden convolutions are orthogonalised, so that all directions of a layer learn at the
same pace (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon). torch.optim.Muon accepts only matrices; a convolution is treated as one matrix per
group."""

from collections import defaultdict

import torch
from torch import nn

MOMENTUM = 0.95
RATE = 0.2  # Scales the convolutions' updates, relative to the learning rate of the other weights.
WEIGHT_DECAY = 4e-3  # Of the convolutions; multiplied by the learning rate in each step, as in SGD.
PLAIN = {"momentum": 0, "nesterov": False}  # SGD applies a convolution's finished update without momentum.
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # From the source; they raise small singular values fastest.


class Muon(torch.optim.SGD):
    """SGD over `groups` of parameters and over the hidden convolutions of `model`, whose updates are orthogonalised.

    groups: as for SGD; weights of hidden convolutions are removed from them. Further arguments go to SGD and apply to
    the other weights only.
    """

    def __init__(self, model, groups, **more):
        # All convolutions but the first, which sees pixels.
        hidden = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels > 3]
        taken = {id(layer.weight) for layer in hidden}
        groups = [group | {"params": [each for each in group["params"] if id(each) not in taken]} for group in groups]
        for count in sorted({layer.groups for layer in hidden}):
            weights = [layer.weight for layer in hidden if layer.groups == count]
            groups.append({"params": weights, "matrices": count, "weight_decay": WEIGHT_DECAY} | PLAIN)
        super().__init__(groups, **more)

    @torch.no_grad()
    def step(self):
        """Replace the gradients of the convolutions with their updates, then let SGD take the step for all weights."""
        alike = defaultdict(list)  # By matrix shape, since one batched product is faster than many small ones.
        for group in self.param_groups:
            for weight in group["params"] if "matrices" in group else ():
                matrices = self._looked_ahead(weight).reshape(group["matrices"], len(weight) // group["matrices"], -1)
                is_tall = matrices.shape[1] > matrices.shape[2]
                wide = matrices.mT if is_tall else matrices
                alike[wide.shape[1:]].append((weight, wide, is_tall))
        for (rows, columns), found in alike.items():
            updates = orthogonal(torch.cat([wide for _, wide, _ in found])).split([len(wide) for _, wide, _ in found])
            for (weight, _, is_tall), update in zip(found, updates, strict=True):
                # With more outputs than inputs, scaled so that each output changes by as much.
                update = update.mT * (columns / rows) ** 0.5 if is_tall else update
                weight.grad.copy_(RATE * update.reshape(weight.shape))
        super().step()

    def _looked_ahead(self, weight):
        """The weight's gradient with Nesterov momentum."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(state["momentum"], MOMENTUM)


def orthogonal(matrices):
    """Approximately the orthogonal factor U V^T of `matrices` = U S V^T, float [n, rows, columns] with rows <= columns;
    computed in bfloat16 on a GPU. The singular values end up near 1, between about 0.6 and 1.3, which is close enough
    for an optimizer step."""
    # The iteration needs singular values of at most 1; the Frobenius norm bounds the largest one.
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):  # Newton-Schulz: x becomes a x + b (x x^T) x + c (x x^T)^2 x.
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
