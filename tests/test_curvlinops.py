"""K-FAC against curvlinops (Dangel and others), which shares nothing with it. Its factors are A / T and T G: the same
product, and the same directions. ``make test`` installs it; elsewhere these tests may be skipped."""

import copy

import pytest
import torch
from mbf_optim import KFAC
from test_kfac import PLAIN
from torch import nn

from mbf_kernels.testing import randn

curvlinops = pytest.importorskip("curvlinops")


class Mean(nn.Module):
    """Over the positions of a sequence."""

    def forward(self, x):
        return x.mean(1)


NETWORKS = {
    "linear": ([nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)], (9, 4)),
    "sequences": ([nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), Mean()], (9, 6, 4)),
    "convolutions": (
        [
            nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 2, 2, dilation=(2, 1), bias=False),
            nn.Flatten(),
            nn.Linear(12, 3),
        ],
        (9, 2, 4, 6),
    ),
}
over_networks = pytest.mark.parametrize("network", NETWORKS)


def made(network):
    torch.manual_seed(0)
    modules, shape = NETWORKS[network]
    model = nn.Sequential(*copy.deepcopy(modules)).double()
    for param in model.parameters():
        nn.init.normal_(param, std=0.5)
    return model, randn(*shape, dtype=torch.float64), torch.arange(shape[0]) % 3


def theirs(model, loss, inputs, labels, fisher):
    twin = copy.deepcopy(model)
    operator = curvlinops.KFACLinearOperator(
        twin, loss, list(twin.parameters()), [(inputs, labels)],
        fisher_type=fisher, separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    operator.compute_kronecker_factors()
    return operator


def assert_factors(optimizer, operator, locations, samples=1):
    """``samples``: by which a sum of losses has the larger G there."""
    found = operator.state_dict()
    for layer in optimizer._layers:
        state, count = optimizer.state[layer.weight], locations[layer.name]
        mine = {"input_covariances": state["A"] / count, "gradient_covariances": state["G"] * count * samples}
        for name, matrix in mine.items():
            torch.testing.assert_close(matrix[0], found[name][layer.name], rtol=1e-9, atol=1e-12)


def locations_of(model, inputs):
    """T of every layer, by name."""
    counts, x = {}, inputs
    for name, module in model.named_children():
        x = module(x)
        counts[name] = x[0].numel() // x.shape[1 if isinstance(module, nn.Conv2d) else -1]
    return counts


@over_networks
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_of_the_empirical_fisher_matrix(network, reduction):
    model, inputs, labels = made(network)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    operator = theirs(model, loss, inputs, labels, curvlinops.FisherType.EMPIRICAL)
    optimizer = KFAC(model, mean_loss=reduction == "mean", **PLAIN | dict(lr=0.0))
    loss(model(inputs), labels).backward()
    optimizer.step()
    samples = len(inputs) if reduction == "sum" else 1
    assert_factors(optimizer, operator, locations_of(model, inputs), samples)


def exact_residuals(outputs):
    """Instead of draws: copy c of every sample has sqrt(classes) times column c of a root of diag(p) - p p^T."""
    count = outputs.shape[1]
    p = outputs.softmax(1)
    roots = (torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]).unflatten(0, (count, -1))
    return count**0.5 * torch.cat([roots[c, :, :, c] for c in range(count)])


@over_networks
def test_factors_of_the_fisher_matrix(network):
    """Its expectation over labels taken exactly, on both sides."""
    model, inputs, labels = made(network)
    operator = theirs(model, nn.CrossEntropyLoss(), inputs, labels, curvlinops.FisherType.TYPE2)
    optimizer = KFAC(model, distribution=exact_residuals, **PLAIN | dict(lr=0.0))
    copies = inputs.repeat(3, *[1] * (inputs.ndim - 1))
    nn.functional.cross_entropy(model(copies), labels.repeat(3)).backward()
    optimizer.step()
    assert_factors(optimizer, operator, locations_of(model, inputs))


@over_networks
@pytest.mark.parametrize("form", ["factored", "exact"])
def test_directions(network, form):
    model, inputs, labels = made(network)
    operator = theirs(model, nn.CrossEntropyLoss(), inputs, labels, curvlinops.FisherType.EMPIRICAL)
    name = {"factored": "use_heuristic_damping", "exact": "use_exact_damping"}[form]
    inverse = curvlinops.KFACInverseLinearOperator(operator, damping=0.01, **{name: True})
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = KFAC(model, damping=0.01, damping_form=form, **PLAIN)
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    expected = inverse @ [param.grad for param in model.parameters()]
    for old, param, direction in zip(before, model.parameters(), expected, strict=True):
        torch.testing.assert_close((old - param.detach()) / 0.1, direction, rtol=1e-9, atol=1e-9)
