"""How a tensor becomes mini-blocks: the method's fixtures, its symmetries, the choice that report() shows."""

import pytest
import torch
from brute_force import GRAFTED, PAPER, BruteForce
from mbf_optim import MBF
from torch import nn

from mbf_kernels.testing import RATIO, assert_below, assert_relative, randn

EPS = torch.finfo(torch.float64).eps


def direction(g, m, damping, **options):
    """P of the paper's form when the gradient is g, the momentum m, and F the statistic of g alone.

    Two steps with mu = 1/2 and no memory in F: the gradient 2 (m - g), then g.
    """
    w = nn.Parameter(torch.zeros_like(g))
    optimizer = MBF.paper([w], lr=1.0, damping=damping, momentum=0.5, decay=0.0, **options)
    for gradient in (2 * (m - g), g):
        before = w.detach().clone()
        w.grad = gradient.clone()
        optimizer.step()
    return before - w.detach()


# The method's example: Gbar and M [O, D], the last column belonging to the bias; lambda = 0.5.
G = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)
M = torch.tensor([[1.0, 0, -1], [2, 1, 0]], dtype=torch.float64)
PRINTED = 5e-7  # half a unit of the last digit
FIXTURES = {
    "row, averaged": (
        dict(blocks="row", average=True),
        [[1.397260, 0.191781, -1.013699], [1.753425, 0.260274, -1.232877]],
    ),
    "column, averaged": (
        dict(blocks="column", average=True),
        [[0.225681, -0.498054, -1.221790], [-0.015564, 0.241245, 0.498054]],
    ),
    "row": (
        dict(blocks="row", average=False),
        [[2.275862, 0.551724, -1.172414], [2.658065, 0.322581, -2.012903]],
    ),
    "column": (
        dict(blocks="column", average=False),
        [[0.971429, -0.677966, -1.604396], [-0.114286, 0.305085, 0.791209]],
    ),
}
over_fixtures = pytest.mark.parametrize("options, expected", FIXTURES.values(), ids=FIXTURES)


@over_fixtures
def test_fixture(backend, options, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    g, m = G.to(expected.device), M.to(expected.device)
    assert_below((direction(g, m, 0.5, **options) - expected).abs(), PRINTED)


@over_fixtures
def test_fixture_with_a_bias(backend, options, expected):
    """The same figures when the last column is the bias of a linear layer."""
    layer = nn.Linear(2, 2, dtype=torch.float64)
    optimizer = MBF.paper(layer.named_parameters("x"), lr=1.0, damping=0.5, momentum=0.5, decay=0.0, **options)
    for gradient in (2 * (M - G).to(layer.weight.device), G.to(layer.weight.device)):
        before = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
        layer.weight.grad, layer.bias.grad = gradient[:, :2].clone(), gradient[:, 2].clone()
        optimizer.step()
    after = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
    assert_below((before - after - torch.tensor(expected, dtype=torch.float64)).abs(), PRINTED)


def test_fixture_of_a_filter(backend):
    g = torch.tensor([1.0, -1, 2, 0], dtype=torch.float64).view(1, 1, 2, 2)
    m = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).view(1, 1, 2, 2)
    expected = torch.tensor([0.461538, 5.538462, 2.923077, 8.0], dtype=torch.float64).view(1, 1, 2, 2)
    for shape in ((1, 1, 2, 2), (1, 1, 4), (1, 1, 2, 1, 2)):
        assert_below((direction(g.view(shape), m.view(shape), 0.5) - expected.view(shape)).abs(), PRINTED)


EVERY = [
    dict(blocks="row"), dict(blocks="row", average=False), dict(blocks="column"),
    dict(blocks="column", average=False),
    dict(blocks="segment", segment=4), dict(blocks="segment", segment=4, average=False),
    dict(blocks="grid", grid=(2, 3)), dict(blocks="grid", grid=(5, 2), average=False),
]  # fmt: skip
over_partitions = pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(map(str, o.values())))


def rounding(g, damping):
    """Twice the solve ratio, times the condition of F + lambda I, at most (|g|^2 + lambda) / lambda."""
    return 2 * RATIO * max(g.shape) * EPS * (1 + g.norm() ** 2 / damping).item()


@over_partitions
def test_large_damping_is_momentum_sgd(options):
    """P1: lambda P -> M."""
    g, m = randn(6, 10, seed=1), randn(6, 10, seed=2)
    p = direction(g, m, 1e6, **options)
    assert_relative(1e6 * p, m, 1e-6 * g.norm().item() ** 2 + rounding(g, 1e6))


@over_partitions
def test_scaling_the_loss(options):
    """P4: g and M times c, lambda times c^2: P / c."""
    g, m = randn(6, 10, seed=1), randn(6, 10, seed=2)
    assert_relative(8 * direction(8 * g, 8 * m, 32.0, **options), direction(g, m, 0.5, **options), rounding(g, 0.5))


@pytest.mark.parametrize("blocks", ["row", "column"])
def test_averaged_rows_and_columns_turn_with_their_inputs_and_outputs(blocks):
    """P5: G -> U G V gives P -> U P V for every rotation U of the outputs and V of the inputs."""
    g, m = randn(6, 10, seed=1), randn(6, 10, seed=2)
    u, v = (torch.linalg.qr(randn(n, n, seed=n)).Q for n in (6, 10))
    turned = direction(u @ g @ v, u @ m @ v, 0.5, blocks=blocks)
    assert_relative(turned, u @ direction(g, m, 0.5, blocks=blocks) @ v, rounding(g, 0.5))


@pytest.mark.parametrize("blocks", ["row", "column"])
def test_own_matrices_turn_inside_the_block_and_permute_outside(blocks):
    """P5 for un-averaged blocks: a rotation within the block, a permutation of the blocks."""
    g, m = randn(6, 10, seed=1), randn(6, 10, seed=2)
    inside = torch.linalg.qr(randn(10, 10)).Q if blocks == "row" else torch.linalg.qr(randn(6, 6)).Q
    order = torch.randperm(6 if blocks == "row" else 10, generator=torch.Generator().manual_seed(1))

    def move(x):
        return (x @ inside)[order] if blocks == "row" else (inside @ x)[:, order]

    p = direction(g, m, 0.5, blocks=blocks, average=False)
    assert_relative(direction(move(g), move(m), 0.5, blocks=blocks, average=False), move(p), rounding(g, 0.5))


@pytest.mark.parametrize("average", [True, False])
def test_partitions_that_coincide(average):
    """Rows are the grid (1, O) and segments of the whole fan-in; columns are the grid (D, 1)."""
    g, m = randn(6, 10, seed=1), randn(6, 10, seed=2)
    row, column = (direction(g, m, 0.5, blocks=b, average=average) for b in ("row", "column"))
    same = [(row, dict(blocks="grid", grid=(1, 6))), (column, dict(blocks="grid", grid=(10, 1)))]
    same += [(row, dict(blocks="segment", segment=s)) for s in (10, 64)]
    for expected, options in same:
        assert_relative(direction(g, m, 0.5, average=average, **options), expected, rounding(g, 0.5))


@over_partitions
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "part of a larger matrix"])
@pytest.mark.parametrize("options_of", [GRAFTED, PAPER], ids=["grafted", "paper"])
def test_any_strides(options, strides, options_of):
    """A matrix in any memory order takes the brute-force steps, and what surrounds it stays."""
    home = torch.full((12, 14), 7.0, dtype=torch.float64)
    view = {
        "contiguous": torch.empty(6, 10, dtype=torch.float64),
        "transposed": torch.empty(10, 6, dtype=torch.float64).t(),
    }
    w = nn.Parameter(view.get(strides, home[3:9, 2:12]).copy_(randn(6, 10)))
    around = torch.ones_like(home, dtype=torch.bool)
    around[3:9, 2:12] = False
    options = options_of | dict(lr=0.1, damping=0.1) | options
    optimizer, brute = MBF([w], **options), BruteForce([[w.detach()]], options)
    for step in range(5):
        w.grad = randn(6, 10, seed=step)
        optimizer.step()
        brute.step([[w.grad]])
    assert_relative(w.detach().flatten(), torch.from_numpy(brute.layers[0].w), 1e-9)
    assert (home[around] == 7).all()


STRUCTURES = [  # shape, options, form, expected word in structure, count of matrices, size
    ((8, 4, 3, 3), {}, "grafted", "filter", 32, 9),
    ((8, 4, 3), {}, "grafted", "filter", 32, 3),
    ((8, 4, 1, 2, 3), {}, "paper", "filter", 32, 6),
    ((8, 4, 1, 1), {}, "paper", "filter", 32, 1),
    ((8, 4, 1, 1), dict(blocks="filter"), "grafted", "filter", 32, 1),
    ((8, 4, 1, 1), {}, "grafted", "segment", 1, 4),
    ((8, 130), {}, "grafted", "segment", 3, 64),
    ((8, 130), dict(average=False, blocks="segment"), "grafted", "segment", 24, 64),
    ((8, 130), {}, "paper", "row", 1, 130),
    ((8, 6), dict(blocks="row", average=False), "grafted", "row", 8, 6),
    ((8, 6), dict(blocks="column"), "grafted", "column", 1, 8),
    ((8, 6), dict(blocks="column", average=False), "paper", "column", 6, 8),
    ((8, 6), dict(blocks="grid", grid=(3, 2)), "paper", "grid", 1, 8),
    ((8, 6), dict(blocks="grid", grid=(3, 2), average=False), "paper", "grid", 6, 8),
    ((8, 6, 1, 1), dict(blocks="grid", grid=(3, 2), average=False), "paper", "grid", 6, 8),
    ((8, 6), dict(blocks="diagonal"), "paper", "diagonal", None, None),
    ((8,), {}, "grafted", "diagonal", None, None),
    ((), {}, "paper", "diagonal", None, None),
    ((8,), dict(blocks="row"), "paper", "diagonal", None, None),  # what cannot apply takes the diagonal step
    ((8, 6), dict(blocks="filter"), "grafted", "diagonal", None, None),
    ((8, 4, 3, 3), dict(blocks="segment"), "grafted", "diagonal", None, None),
]


@pytest.mark.parametrize("shape, options, form, word, count, size", STRUCTURES)
def test_report_tells_the_structure(shape, options, form, word, count, size):
    w = nn.Parameter(torch.ones(shape))
    optimizer = MBF([w], **options) if form == "grafted" else MBF.paper([w], lr=0.1, damping=0.1, **options)
    w.grad = torch.ones(shape)
    optimizer.step()
    (row,) = optimizer.report()
    assert word in row.structure and tuple(row.shape) == shape
    if count is not None:
        assert (row.count, row.size) == (count, size)
    assert (w != 1).all()


def test_a_grid_must_divide_the_matrix():
    """The bias column counts: 6 inputs and a bias make 7."""
    layer = nn.Linear(6, 8)
    for parameters, grid in [([layer.weight], (4, 2)), ([layer.weight], (3, 3)), (layer.named_parameters(), (3, 2))]:
        with pytest.raises(ValueError, match="(?i)grid.*divide"):
            MBF(parameters, blocks="grid", grid=grid)
    MBF(layer.named_parameters(), blocks="grid", grid=(7, 4))


def test_a_very_large_kernel_takes_the_diagonal_step():
    """Its matrices would cost n / 2 floats per weight: "auto" leaves kernels of more than 128 taps alone."""
    for shape, word in (((2, 2, 11, 11), "filter"), ((2, 2, 12, 12), "diagonal")):
        (row,) = MBF([nn.Parameter(torch.ones(shape))]).report()
        assert word in row.structure
