"""Muon: SGD whose updates of the hidden convolutions are made orthogonal, so that all directions of a layer learn at
one pace (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon). torch.optim.Muon takes matrices alone; a convolution is one for each of its groups.
"""

import torch
from torch import nn

MOMENTUM = 0.95
RATE = 0.2  # Of the convolutions, for 1 of the weights that follow plain SGD.
WEIGHT_DECAY = 4e-3
PLAIN = {"momentum": 0, "nesterov": False}  # SGD's own part in the step of a convolution.
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Of the quintic iteration, from the source: the steepest at zero.


class Muon(torch.optim.SGD):
    """SGD over `groups` of parameters and over the hidden convolutions of `model`, whose updates are orthogonal.

    groups: as SGD takes them; of their weights those of hidden convolutions are left out. Further arguments go to SGD,
    and hold for the other weights alone.
    """

    def __init__(self, model, groups, **more):
        hidden = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels > 3]
        taken = {id(layer.weight) for layer in hidden}
        groups = [group | {"params": [each for each in group["params"] if id(each) not in taken]} for group in groups]
        for matrices in sorted({layer.groups for layer in hidden}):
            weights = [layer.weight for layer in hidden if layer.groups == matrices]
            groups.append({"params": weights, "matrices": matrices, "weight_decay": WEIGHT_DECAY} | PLAIN)
        super().__init__(groups, **more)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"] if "matrices" in group else ():
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                update = weight.grad.lerp(state["momentum"], MOMENTUM)  # Nesterov's.
                matrices = update.reshape(group["matrices"], len(weight) // group["matrices"], -1)
                weight.grad.copy_(RATE * orthogonal(matrices).view(weight.shape))
        super().step()


def orthogonal(matrices):
    """Nearly the orthogonal matrices U V^T of `matrices` U S V^T, float [n, rows, columns]; times the root of
    rows / columns where there are more rows, so that outputs change as much. In bfloat16 on a GPU.

    As the source has it, singular values end between 0.7 and 1.2, which is near enough: steps need no precision.
    """
    rows, columns = matrices.shape[1:]
    wide = matrices if rows <= columns else matrices.mT
    # Its norm is at least its largest singular value, which the iteration needs to be at most 1.
    x = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16 if wide.is_cuda else wide.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if rows <= columns else x.mT).to(matrices.dtype) * max(1, rows / columns) ** 0.5
