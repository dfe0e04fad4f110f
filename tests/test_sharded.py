"""MBF over several processes: what they step together is what one process steps alone.

Every process computes the gradients of all data, so that those of one process and of many are the same but for
rounding: what differs is where parameters lie.
"""

import pytest
import torch
from mbf_optim import MBF
from processes import run
from test_mbf import FORMS, PARTITIONS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mbf_kernels.testing import assert_relative, randn

STEPS = 4
OPTIONS = dict(lr=1e-2, damping=1e-2, weight_decay=0.1)


def network(dtype=torch.float64):
    """Of every structure; 6, 5 and 2 outputs on up to 4 processes: uneven shards, and empty ones."""
    torch.manual_seed(0)
    modules = [
        nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 5, 1, bias=False), nn.Tanh(),
        nn.Conv2d(5, 4, (2, 3)), nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 2),
        nn.Linear(2, 2, bias=False),
    ]  # fmt: skip
    return nn.Sequential(*modules).to(dtype)


def train(model, optimizer, steps=STEPS, first=0):
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x, target = randn(8, 2, 6, 7, dtype=dtype, seed=step), randn(8, 2, dtype=dtype, seed=100 + step)
        (model(x) - target).square().mean().backward()
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outcome(model, optimizer):
    """Weights and states, whole, by name."""
    states = optimizer.state_dict()["state"]
    return [
        (name, whole(param), {entry: whole(value) for entry, value in states[i].items()})
        for i, (name, param) in enumerate(model.named_parameters())
    ]


def assert_same(found, expected, tolerance=1e-9):
    for (name, weight, state), (_, true_weight, true_state) in zip(found, expected, strict=True):
        assert_relative(weight, true_weight, tolerance, name)
        assert state.keys() == true_state.keys(), name
        for entry, value in state.items():
            assert_relative(value.double(), true_state[entry].double(), tolerance, f"{name} {entry}")


def sharded(options, world_size, mesh_shape):
    model = network()
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = MBF(model.named_parameters(), **options)
    train(model, optimizer)
    return outcome(model, optimizer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("mesh", [(2,), (3,), (4,), (2, 2)], ids=str)
def test_fully_shard_equals_one_process(form, partition, mesh):
    options = FORMS[form] | PARTITIONS[partition] | OPTIONS
    model = network()
    optimizer = MBF(model.named_parameters(), **options)
    train(model, optimizer)
    size = 1
    for n in mesh:
        size *= n
    for found in run(size, sharded, options, size, mesh):
        assert_same(found, outcome(model, optimizer))
