"""Muon: SGD whose updates of the hidden convolutions are made orthogonal, so that all directions of a layer learn at
one pace (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon). torch.optim.Muon takes matrices alone; a convolution is one for each of its groups.
"""

from collections import defaultdict

import torch
from torch import nn

MOMENTUM = 0.95
RATE = 0.2  # Of the convolutions, over the rate of the other weights.
WEIGHT_DECAY = 4e-3  # Of the convolutions, in a step times its rate, as SGD has it.
PLAIN = {"momentum": 0, "nesterov": False}  # What is left to SGD of a convolution's step: an update is made already.
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Of an iteration, from the source: they lift small singular values fastest.


class Muon(torch.optim.SGD):
    """SGD over `groups` of parameters and over the hidden convolutions of `model`, whose updates are orthogonal.

    groups: as SGD takes them; of their weights those of hidden convolutions are left out. Further arguments go to SGD,
    and hold for the other weights alone.
    """

    def __init__(self, model, groups, **more):
        # All but the first, which sees pixels.
        hidden = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels > 3]
        taken = {id(layer.weight) for layer in hidden}
        groups = [group | {"params": [each for each in group["params"] if id(each) not in taken]} for group in groups]
        for count in sorted({layer.groups for layer in hidden}):
            weights = [layer.weight for layer in hidden if layer.groups == count]
            groups.append({"params": weights, "matrices": count, "weight_decay": WEIGHT_DECAY} | PLAIN)
        super().__init__(groups, **more)

    @torch.no_grad()
    def step(self):
        """Put the updates of the convolutions in the place of their gradients, and let SGD take all steps."""
        alike = defaultdict(list)  # Shape -> the weights with such matrices: many small products take longer than one.
        for group in self.param_groups:
            for weight in group["params"] if "matrices" in group else ():
                matrices = self._looked_ahead(weight).reshape(group["matrices"], len(weight) // group["matrices"], -1)
                is_tall = matrices.shape[1] > matrices.shape[2]
                wide = matrices.mT if is_tall else matrices
                alike[wide.shape[1:]].append((weight, wide, is_tall))
        for (rows, columns), found in alike.items():
            updates = orthogonal(torch.cat([wide for _, wide, _ in found])).split([len(wide) for _, wide, _ in found])
            for (weight, _, is_tall), update in zip(found, updates, strict=True):
                # Where outputs are more than inputs, so much that they change as much.
                update = update.mT * (columns / rows) ** 0.5 if is_tall else update
                weight.grad.copy_(RATE * update.reshape(weight.shape))
        super().step()

    def _looked_ahead(self, weight):
        """The gradient of a weight with its momentum, as Nesterov has it."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(state["momentum"], MOMENTUM)


def orthogonal(matrices):
    """Nearly the orthogonal matrices U V^T of `matrices` U S V^T, float [n, rows, columns] with rows <= columns; in
    bfloat16 on a GPU. The singular values end near 1, between 0.6 and 1.3 or so, which is near enough for a step."""
    # The norm is at least the largest singular value, which the iteration needs to be at most 1.
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):  # Newton and Schulz's: x becomes a x + b (x x^T) x + c (x x^T)^2 x.
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
