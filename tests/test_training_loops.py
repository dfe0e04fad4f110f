"""Ordinary training loops around MBF: it reads ``grad`` when it steps, so that how the gradient came about is nothing
to it."""

import copy

import pytest
import torch
from mbf_optim import MBF
from torch import nn
from torch.utils.checkpoint import checkpoint

from mbf_kernels.testing import assert_bitwise, assert_relative, randn

STEPS, BATCH, PARTS = 4, 6, 3
OPTIONS = dict(lr=1e-2, damping=1e-2, weight_decay=0.1, segment=8)
# Sums in another order: eps = 2e-16, 4 steps, condition numbers up to 1/damping + 1 = 101.
TOLERANCE = 1e-9


class Network(nn.Module):
    def __init__(self, inplace=False, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3)
        self.middle = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(4, 3, 2), nn.ReLU(inplace))
        self.last = nn.Linear(27, 5)
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        x = self.first(x)
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x.flatten(1))


def train(model, parts=1, call=None):
    optimizer = MBF(model.named_parameters(), **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x in randn(BATCH, 2, 6, 6, seed=step).chunk(parts):
            ((call or model)(x).square().mean() / parts).backward()
        optimizer.step()
    return list(model.parameters())


def test_an_accumulated_gradient_is_that_of_the_batch():
    for found, expected in zip(train(Network(), PARTS), train(Network()), strict=True):
        assert_relative(found, expected, TOLERANCE)


@pytest.mark.parametrize("changes", [dict(inplace=True), dict(reentrant=False), dict(reentrant=True)], ids=str)
def test_activations_in_place_or_computed_again(changes):
    for found, expected in zip(train(Network(**changes)), train(Network()), strict=True):
        assert_bitwise(found, expected)


def test_the_names_of_a_compiled_model():
    """Biases join their weights, and its checkpoints go into the plain model's optimizer."""
    model, plain = Network(), Network()
    compiled = torch.compile(model, backend="eager")
    names = [name for name, _ in compiled.named_parameters()]
    assert all(name.startswith("_orig_mod.") for name in names)
    optimizers = [MBF(net.named_parameters(), **OPTIONS) for net in (compiled, plain)]
    for step in range(2 * STEPS):
        for net, optimizer in zip((compiled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(randn(BATCH, 2, 6, 6, seed=step)).square().mean().backward()
            optimizer.step()
        if step == STEPS:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bitwise(found, expected)


class Adapted(nn.Module):
    """A frozen layer with two trained matrices of low rank beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_matrices_beside_a_frozen_layer():
    """They step as if nothing else were given; the layer keeps still, and has no state."""
    models = Adapted(), Adapted()
    frozen = copy.deepcopy(models[0].base)
    adapters = [(name, p) for name, p in models[1].named_parameters() if p.requires_grad]
    optimizers = MBF(models[0].named_parameters(), **OPTIONS), MBF(adapters, **OPTIONS)
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(randn(BATCH, 8, seed=step)).square().mean().backward()
            optimizer.step()
    for found, expected in zip(*(model.parameters() for model in models), strict=True):
        assert_bitwise(found, expected)
    for found, expected in zip(models[0].base.parameters(), frozen.parameters(), strict=True):
        assert_bitwise(found, expected)
        assert not optimizers[0].state.get(found)
    assert (models[0].up.weight != Adapted().up.weight).all()
