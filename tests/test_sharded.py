"""MBF over several processes: what they step together is what one process steps alone.

Every process computes the gradients of all data, so that those of one process and of many differ by rounding at most:
what differs is where parameters lie.
"""

import math

import pytest
import torch
from mbf_optim import MBF
from processes import run
from test_mbf import FORMS, PARTITIONS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mbf_kernels.testing import assert_relative, randn

STEPS = 4
# Rounding differs by the order of sums alone: eps = 2e-16, 4 steps, condition numbers up to 1/damping + 1 = 101.
TOLERANCE = 1e-9
PROCESSES = (2,), (3,), (4,), (2, 2)  # the last: HSDP, two replicas of two shards
CASES = {
    f"{form}, {partition}": FORMS[form] | PARTITIONS[partition] | dict(lr=1e-2, damping=1e-2, weight_decay=0.1)
    for form in FORMS
    for partition in PARTITIONS
}
CASES["grafted, grid of rows"] = CASES["grafted, grid"] | dict(grid=(2, 4))
CASES["grafted, auto, old factors"] = CASES["grafted, auto"] | dict(update_interval=2, factor_interval=3)
CASES["paper, auto, old factors"] = CASES["paper, auto"] | dict(update_interval=2, factor_interval=3)


def network(case):
    """Of every structure; 10, 6 and 2 outputs on up to 4 processes: uneven shards, and empty ones."""
    torch.manual_seed(0)
    if "grid of rows" in case:
        layers = nn.Flatten(), nn.Linear(84, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)
        return nn.Sequential(*layers).double()
    layers = [
        nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 10, 1, bias=False), nn.Tanh(),
        nn.Conv2d(10, 4, (2, 3)), nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 2), nn.Tanh(),
        nn.Linear(2, 2, bias=False),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


def backward(model, step):
    """Gradients of a regression batch that depends on the step alone."""
    y = model(randn(8, 2, 6, 7, seed=step))
    (y - randn(*y.shape, seed=100 + step)).square().mean().backward()


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def shard(model, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outcome(model, optimizer):
    """Weights and states, whole, by name."""
    states = optimizer.state_dict()["state"]
    named = enumerate(model.named_parameters())
    return [(name, whole(p), {entry: whole(value) for entry, value in states[i].items()}) for i, (name, p) in named]


def alone(case, steps=range(STEPS)):
    model = network(case)
    optimizer = MBF(model.named_parameters(), **CASES[case])
    train(model, optimizer, steps)
    return outcome(model, optimizer)


def assert_same(found, expected, case, tolerance=TOLERANCE):
    for (name, weight, state), (_, true_weight, true_state) in zip(found, expected, strict=True):
        assert_relative(weight, true_weight, tolerance, f"{case}: {name}")
        assert state.keys() == true_state.keys(), f"{case}: {name}"
        for entry, value in state.items():
            assert value.dtype == true_state[entry].dtype
            assert_relative(value.double(), true_state[entry].double(), tolerance, f"{case}: {name}, {entry}")


def together(mesh_shape):
    outcomes = {}
    for case, options in CASES.items():
        model = shard(network(case), mesh_shape)
        optimizer = MBF(model.named_parameters(), **options)
        for param in model.parameters():
            assert isinstance(param, DTensor)
        train(model, optimizer)
        outcomes[case] = outcome(model, optimizer)
    return outcomes


@pytest.mark.parametrize("mesh", PROCESSES, ids=str)
def test_fully_shard_equals_one_process(mesh):
    """Every form and partition, weights and states."""
    for outcomes in run(math.prod(mesh), together, mesh, timeout=300):
        for case, found in outcomes.items():
            assert_same(found, alone(case), case)


# ---- any placements

LINEAR = {"x.weight": (6, 7), "x.bias": (6,)}
CONVOLUTION = {"x.weight": (6, 4, 3), "x.bias": (6,)}
SHAPES = {case: CONVOLUTION if "filter" in case else LINEAR for case in CASES if "rows" not in case}
PLACES = [
    [[Shard(1)], [Replicate()]],
    [[Shard(0)], [Replicate()]],
    [[Shard(0), Shard(1)], [Shard(0), Replicate()]],
    [[Shard(0), Shard(0)], [Shard(0), Shard(0)]],
    [[Replicate(), Replicate()], [Replicate(), Shard(0)]],
]


def step_with_given_gradients(case, place):
    params = [
        (name, nn.Parameter(place(randn(*shape, seed=i), i))) for i, (name, shape) in enumerate(SHAPES[case].items())
    ]
    optimizer = MBF(params, **CASES[case])
    for step in range(STEPS):
        for i, (_, p) in enumerate(params):
            p.grad = place(randn(*p.shape, seed=10 * step + 50 + i), i)
        optimizer.step()
    return [whole(p) for _, p in params]


def placed(places):
    mesh = init_device_mesh("cpu", (2, 2)[: len(places[0])])
    return {
        case: step_with_given_gradients(case, lambda x, i: distribute_tensor(x, mesh, places[i])) for case in SHAPES
    }


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_other_placements_equal_one_process(places):
    """Tensor parallelism's: mini-blocks may straddle shards, and a bias may lie elsewhere than its weight."""
    for outcomes in run(2 ** len(places[0]), placed, places, timeout=300):
        for case, found in outcomes.items():
            for weight, expected in zip(found, step_with_given_gradients(case, lambda x, i: x), strict=True):
                assert_relative(weight, expected, TOLERANCE, case)
