"""The optimizers that look at layers, in several processes: replicas stay alike, and see what one process would see."""

import copy
import io
import tempfile

import processes
import pytest
import torch
from mbf_optim import KBFGS, KFAC, KPSVD, AdaFisher, TwoLevelKFAC
from mbf_optim.triangles import packed, unpacked
from test_model_optimizer import KINDS, QUASI
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from mbf_kernels.testing import assert_bitwise, randn

ALL = KINDS | QUASI | {"KFAC, SUA": lambda model, **options: KFAC(model, spatially_uncorrelated=True, **options)}
over_all = pytest.mark.parametrize("kind", ALL)
ONE_OF_EACH = ["KFAC", "KPSVD, lanczos", "two-level", "two-level, additive", "AdaFisher", "KBFGS"]
over_methods = pytest.mark.parametrize("kind", ONE_OF_EACH)
NETWORKS = {
    "linear": (lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)], (4,)),
    "sequences": (lambda: [nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)], (3, 4)),
    "convolutions": (
        lambda: [
            *(nn.Conv2d(2, 4, 2, padding=1), nn.BatchNorm2d(4).eval(), nn.Tanh()),
            *(nn.Conv2d(4, 4, 2, groups=2, stride=2), nn.Flatten(), nn.Linear(16, 3)),
        ],
        (2, 4, 3),
    ),
}
STEPS, SAMPLES = 4, 12


def net(network="linear"):
    torch.manual_seed(0)
    return nn.Sequential(*NETWORKS[network][0]()).double()


def batches(network="linear", sizes=(SAMPLES,), steps=STEPS):
    """Of every step the parts, inputs and targets."""
    for t in range(steps):
        inputs = randn(sum(sizes), *NETWORKS[network][1], dtype=torch.float64, seed=t)
        targets = inputs.flatten(1)[:, :3].sin()
        yield list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def loss_of(outputs, targets):
    return (outputs.flatten(1)[:, :3] - targets).square().sum(1).mean()


def options_of(kind):
    every_other = {} if "KBFGS" in kind else {"update_interval": 2}
    exact = {"tolerance": 1e-12} if "KPSVD" in kind else {}  # starts are random, and of other samples others
    return {"lr": 0.02} | every_other | exact


def train(model, optimizer, steps):
    """Of the parts a process takes its own; one alone takes all, and accumulates."""
    for parts in steps:
        mine = [parts[distributed.get_rank()]] if distributed.is_initialized() else parts

        def closure(mine=mine):
            optimizer.zero_grad()
            for inputs, targets in mine:
                loss = loss_of(model(inputs), targets) / len(mine)
                loss.backward()
            return loss

        optimizer.step(closure)


def replica(model, **options):
    return DistributedDataParallel(model, **options) if distributed.is_initialized() else model


def kept_by(model, optimizer):
    """Eigenvectors are known up to their signs."""
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for index, values in state.items():
        state[index] = {name: value for name, value in values.items() if not name.endswith("_vectors")}
    return {"weights": model.state_dict(), "state": state}


def trained(kind, network, steps):
    model = net(network)
    optimizer = ALL[kind](model, **options_of(kind))
    train(replica(model), optimizer, steps)
    return kept_by(model, optimizer)


def assert_same(a, b, close=assert_bitwise):
    """Of nested dictionaries."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key], close)
        elif isinstance(value, torch.Tensor):
            close(value, b[key])
        else:
            assert value == b[key], key


def assert_close(a, b):
    """Sums in another order, and what a few steps make of it."""
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def run(world_size, function, *args):
    """What all replicas have alike."""
    first, *others = processes.run(world_size, function, *args)
    for other in others:
        assert_same(first, other)
    return first


@over_all
@pytest.mark.parametrize("network", NETWORKS)
def test_processes_with_equal_parts_are_one_with_all(kind, network):
    parts, whole = list(batches(network, (6, 6))), list(batches(network, (12,)))
    assert_same(run(2, trained, kind, network, parts), trained(kind, network, whole), assert_close)


@over_methods
def test_three_processes(kind):
    parts, whole = list(batches(sizes=(4, 4, 4))), list(batches())
    assert_same(run(3, trained, kind, "linear", parts), trained(kind, "linear", whole), assert_close)


@pytest.mark.parametrize("kind", [kind for kind in ALL if "Ada" not in kind and "kfac_corrected" not in kind])
@pytest.mark.parametrize("network", ["linear", "convolutions"])
def test_processes_count_alike(kind, network):
    """Whatever they have: the samples of one with half as many as the other might as well come twice. (KPSVD's A, of
    "kfac_corrected", does not know of that.)"""
    parts = list(batches(network, (2, 4)))
    doubled = [[tuple(torch.cat([x, x, y]) for x, y in zip(*step, strict=True))] for step in parts]
    one = trained(kind, network, doubled)
    assert_same(run(2, trained, kind, network, parts)["weights"], one["weights"], assert_close)


@pytest.mark.parametrize("kind", ["AdaFisher", "AdaFisherW"])
@pytest.mark.parametrize("network", NETWORKS)
def test_adafisher_sees_what_it_would_of_an_accumulated_gradient(kind, network):
    parts = list(batches(network, (2, 4)))
    assert_same(run(2, trained, kind, network, parts), trained(kind, network, parts), assert_close)
