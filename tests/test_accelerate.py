"""What Accelerate does to an optimizer. ``make test`` installs it; elsewhere these tests may be skipped."""

import copy

import pytest
import torch
from mbf_optim import MBF
from torch import nn

from mbf_kernels.testing import randn

accelerate = pytest.importorskip("accelerate")

OPTIONS = dict(lr=1e-2, weight_decay=0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    )


def backward(model, step):
    model(randn(5, 1, 6, 6, dtype=torch.float32, seed=step)).square().mean().backward()


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
