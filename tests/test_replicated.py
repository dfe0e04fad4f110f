"""MBF where every process has all parameters: DistributedDataParallel, and ZeroRedundancyOptimizer over it."""

import copy

import pytest
import torch
from mbf_optim import MBF
from processes import run
from test_sharded import CASES, TOLERANCE, network
from torch import distributed
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from mbf_kernels.testing import assert_bitwise, assert_relative, randn

STEPS = 4
BATCH = 8


def inputs(step, part=slice(None)):
    return randn(BATCH, 2, 6, 7, seed=step)[part]


def train(model, make, steps=STEPS, part=slice(None), optimizer=None):
    optimizer = optimizer or make(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step, part)).square().mean().backward()
        optimizer.step()
    return optimizer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def my_part():
    """The samples of this process: as many as the others'."""
    share = BATCH // distributed.get_world_size()
    return slice(share * distributed.get_rank(), share * (distributed.get_rank() + 1))


def named(case):
    return lambda model: MBF(model.named_parameters(), **CASES[case])


def replicated():
    outcomes = {}
    for case in CASES:
        model = DistributedDataParallel(network(case))
        train(model, named(case), part=my_part())
        outcomes[case] = weights(model)
    return outcomes


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_are_identical_and_equal_one_process(world_size):
    """MBF needs the gradients alone, which DistributedDataParallel averages."""
    first, *others = run(world_size, replicated, timeout=200)
    for case, found in first.items():
        for other in others:
            for a, b in zip(found, other[case], strict=True):
                assert_bitwise(a, b)
        model = network(case)
        train(model, named(case))
        for a, b in zip(found, model.parameters(), strict=True):
            assert_relative(a, b, TOLERANCE, case)


def rounded_at_random():
    model = network("grafted, auto").bfloat16()
    optimizer = MBF(model.named_parameters(), lr=1e-2, stochastic_rounding=True)
    torch.manual_seed(distributed.get_rank())  # what else is drawn may differ
    for step in range(STEPS):
        for i, p in enumerate(model.parameters()):
            p.grad = randn(*p.shape, seed=100 * step + i).bfloat16()
        optimizer.step()
    return [w.float() for w in weights(model)]


def test_stochastic_rounding_is_the_same_on_all_replicas():
    first, second = run(2, rounded_at_random)
    for a, b in zip(first, second, strict=True):
        assert_bitwise(a, b)


# ---- ZeroRedundancyOptimizer


def unnamed(case):
    return lambda model: MBF(model.parameters(), **CASES[case])


def zero(case):
    """The optimizer's work and state shared out among the processes."""
    return lambda model: ZeroRedundancyOptimizer(model.parameters(), optimizer_class=MBF, **CASES[case])


def zero_redundancy():
    outcomes = {}
    for case in CASES:
        model = DistributedDataParallel(network(case))
        optimizer = train(model, zero(case), part=my_part())
        mine = len(optimizer.optim.state_dict()["state"])
        assert 0 < mine < len(list(model.parameters()))
        outcomes[case] = weights(model), mine
    return outcomes


def test_zero_redundancy_optimizer_equals_one_process():
    """And every parameter's state is on one process only."""
    first, second = run(2, zero_redundancy, timeout=200)
    for case, (found, mine) in first.items():
        other, others = second[case]
        model = network(case)
        train(model, unnamed(case))
        assert mine + others == len(found)
        for a, b, expected in zip(found, other, model.parameters(), strict=True):
            assert_bitwise(a, b)
            assert_relative(a, expected, TOLERANCE, case)


def zero_resumed():
    case = "grafted, auto, old factors"
    model = DistributedDataParallel(network(case))
    optimizer = train(model, zero(case), part=my_part())
    optimizer.consolidate_state_dict(to=0)
    holder = [copy.deepcopy(optimizer.state_dict()) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(holder, src=0)
    saved = copy.deepcopy(model.state_dict())
    train(model, None, part=my_part(), optimizer=optimizer)
    undisturbed = weights(model)
    model = DistributedDataParallel(network(case))
    model.load_state_dict(saved)
    resumed = zero(case)(model)
    resumed.load_state_dict(holder[0])
    assert len(resumed.optim.report()) > 0
    train(model, None, part=my_part(), optimizer=resumed)
    return undisturbed, weights(model)


def test_zero_redundancy_optimizer_resumes():
    """It puts what it loads into the state as it is saved, not through load_state_dict: bitwise all the same."""
    for undisturbed, resumed in run(2, zero_resumed):
        for a, b in zip(undisturbed, resumed, strict=True):
            assert_bitwise(a, b)
