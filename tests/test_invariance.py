"""Undamped, K-FAC does not see how a network is parametrised: affine transformations of what layers take and give leave
the function that it learns as it was (Martens & Grosse 2015, theorem 1; Grosse & Martens 2016 for convolutions)."""

import copy

import pytest
import torch
from mbf_optim import KFAC
from mbf_optim.affine import affine_layers
from test_kfac import loss_of
from torch import nn

from mbf_kernels.testing import randn

OPTIONS = dict(lr=0.2, momentum=0.8, decay=0.7, update_interval=1, factor_interval=1, kl_clip=0.05)
STEPS = 4
NETWORKS = {
    "linear": (lambda: [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)], (40, 4)),
    "convolutions": (
        lambda: [
            nn.Conv2d(2, 3, 2),
            nn.Tanh(),
            nn.Conv2d(3, 2, (1, 2), stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8, 2),
        ],
        (40, 2, 4, 5),
    ),
}


class Transformed(nn.Module):
    """M x + c, x the channels (dimension 1)."""

    def __init__(self, channels, seed):
        super().__init__()
        self.matrix = torch.eye(channels).double() + 0.4 * randn(channels, channels, dtype=torch.float64, seed=seed)
        self.shift = randn(channels, dtype=torch.float64, seed=seed + 1)

    def forward(self, x):
        return (x.movedim(1, -1) @ self.matrix.T + self.shift).movedim(-1, 1)


def reparametrised(model):
    """The same function, with x' = M x + c and h = N h' + d around every layer: W' = N^-1 W M^-1."""
    modules = []
    for i, module in enumerate(model):
        module = copy.deepcopy(module)
        if not hasattr(module, "weight"):
            modules.append(module)
            continue
        before, after = (Transformed(module.weight.shape[1 - side], 10 * i + 2 * side) for side in (0, 1))
        with torch.no_grad():
            weight = torch.einsum("qc...,cd->qd...", module.weight, torch.linalg.inv(before.matrix))
            moved = weight.reshape(*weight.shape[:2], -1).sum(2) @ before.shift  # sees the shift at every offset
            module.bias.copy_(torch.linalg.solve(after.matrix, module.bias - moved - after.shift))
            module.weight.copy_(torch.linalg.solve(after.matrix, weight.flatten(1)).view(weight.shape))
        modules += [before, module, after]
    return nn.Sequential(*modules)


def trained(model, inputs, **options):
    """What the network says after some steps, and the condition numbers of all that was inverted, A's and G's added."""
    optimizer = KFAC(model, **OPTIONS | options)
    conditions = []
    for batch in inputs[:STEPS]:
        optimizer.zero_grad()
        loss_of(model(batch)).mean().backward()
        optimizer.step()
        for layer in affine_layers(model):
            names = ("A_deviation", "A_mean", "A", "G")
            state = optimizer.state[layer.weight]
            conditions.append(sum(torch.linalg.cond(state[name]).max().item() for name in names if name in state))
    return model(inputs[STEPS]).detach(), max(conditions)


def both(network, **options):
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model = nn.Sequential(*make()).double()
    twin = reparametrised(model)
    inputs = randn(STEPS + 1, *shape, dtype=torch.float64)
    start = model(inputs[STEPS]).detach()
    torch.testing.assert_close(twin(inputs[STEPS]), start, rtol=1e-12, atol=1e-12)
    (mine, condition), (other, other_condition) = (trained(net, inputs, **options) for net in (model, twin))
    moved = (mine - start).abs().max()
    return (mine - other).abs().max() / moved, max(condition, other_condition)


@pytest.mark.parametrize("network, sua", [("linear", False), ("convolutions", False), ("convolutions", True)])
def test_undamped_steps_do_not_depend_on_the_parametrisation(network, sua):
    """With averages, momentum and the clip, which do not either. Solving with a matrix of n <= 9 rows is off by some
    n eps times its condition number, relative to the direction. What a step was off by stays, and grows in the next: 10
    for that and for the transformations."""
    difference, condition = both(network, damping=0.0, spatially_uncorrelated=sua)
    tolerance = 10 * STEPS * 9 * torch.finfo(torch.float64).eps * condition
    assert tolerance < 1e-6
    assert difference <= tolerance


@pytest.mark.parametrize("network", NETWORKS)
def test_damped_steps_do(network):
    """So that the above is no property of the transformations."""
    difference, _ = both(network, damping=0.1)
    assert difference > 1e-2
