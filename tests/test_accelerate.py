"""What Accelerate does to an optimizer. ``make test`` installs it; elsewhere these tests may be skipped."""

import copy
import os

import pytest
import torch
from mbf_optim import MBF
from processes import run
from torch import nn

from mbf_kernels.testing import assert_relative, randn

accelerate = pytest.importorskip("accelerate")
AcceleratedOptimizer = accelerate.optimizer.AcceleratedOptimizer
AcceleratorState, PartialState = accelerate.state.AcceleratorState, accelerate.state.PartialState

OPTIONS = dict(lr=1e-2, weight_decay=0.1)


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    return nn.Sequential(*layers).double()


def backward(model, step):
    model(randn(5, 1, 6, 6, seed=step)).square().mean().backward()


@pytest.mark.parametrize("steps", [0, 2], ids=["observed", "stepped"])
def test_preparing_loses_nothing(steps):
    """It sends the state to the device and back, through ``state_dict`` and ``load_state_dict``."""
    model = network()
    optimizer = MBF(model.named_parameters(), **OPTIONS)
    backward(model, 0)
    optimizer.observe()
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert after["param_groups"] == before["param_groups"]


def test_it_sees_a_step_that_overflows():
    """By ``step`` not being called; it then leaves the schedule where it is."""
    accelerate.Accelerator(cpu=True)
    model = network()
    optimizer = AcceleratedOptimizer(MBF(model.named_parameters(), **OPTIONS), scaler=torch.amp.GradScaler("cpu"))
    for finite in (False, True):
        optimizer.scaler.scale(model[0].weight.sum() * (1.0 if finite else float("inf"))).backward()
        optimizer.step()
        assert optimizer.step_was_skipped is not finite
        optimizer.zero_grad()


def train_sharded(folder):
    """The parameters after two steps under FSDP2, and again after the second from a checkpoint of the first."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
    }
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    # It offers FSDP2 on accelerators alone.
    shared = {"distributed_type": accelerate.DistributedType.FSDP, "fsdp_plugin": plugin}
    AcceleratorState._shared_state.update(shared)
    PartialState._shared_state.update(shared)
    model = network()
    model, optimizer = accelerator.prepare(model, MBF(model.named_parameters(), **OPTIONS))
    trained = []
    for step in (0, 1, 1):
        if len(trained) == 1:
            accelerator.save_state(folder)
        if len(trained) == 2:
            accelerator.load_state(folder)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        trained.append([param.full_tensor().detach() for param in model.parameters()])
    return trained[1:]


def test_fsdp2(tmp_path):
    """It puts other parameters into the optimizer, after the state has been made."""
    model = network()
    optimizer = MBF(model.named_parameters(), **OPTIONS)
    for step in (0, 1):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    for trained in run(2, train_sharded, str(tmp_path), timeout=300.0):
        for params in trained:
            for param, expected in zip(params, model.parameters(), strict=True):
                assert_relative(param, expected, 1e-9)  # as in test_sharded.py
