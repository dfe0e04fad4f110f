"""torch.compile around training: the model, the step and both, with the figures of eager steps and one graph each."""

import warnings
from collections.abc import Callable

import pytest
import torch
from mbf_optim import MBF
from test_capturable import over_forms, over_partitions
from test_capturable import Run as CapturableRun
from test_mbf import FORMS, PARTITIONS
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LambdaLR

from mbf_kernels.testing import assert_below, assert_bitwise, randn

STEPS = 50


@pytest.fixture(autouse=True)
def strict():
    """Nothing is left of other tests; compiling anything again is an error, and so is a warning."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()  # fmt: skip


def number(value: float, on_device: bool) -> float | torch.Tensor:
    return torch.tensor(value, dtype=torch.float64) if on_device else value


class Training:
    """A small network with a schedule of its learning rate."""

    def __init__(self, capturable=False, tensor_lr=False):
        self.model = network()
        options = dict(lr=number(1e-2, tensor_lr), damping=0.1, capturable=capturable)
        self.optimizer = MBF(self.model.named_parameters(), **options)
        self.schedule = LambdaLR(self.optimizer, lambda step: 0.95**step)
        self.steps = 0

    def backward(self, model: Callable):
        self.optimizer.zero_grad()
        x, target = (randn(4, *shape, dtype=torch.float64, seed=self.steps) for shape in ((2, 6, 6), (3,)))
        (model(x) - target).square().mean().backward()
        self.steps += 1

    def run(self, steps=STEPS, model=None, step=None):
        for _ in range(steps):
            self.backward(model or self.model)
            (step or self.optimizer.step)()
            self.schedule.step()
        return self

    def weights(self):
        return list(self.model.parameters())


def assert_same_weights(found, expected):
    for a, b in zip(found.weights(), expected.weights(), strict=True):
        assert_bitwise(a.detach(), b.detach())


def fullgraph(optimizer):
    """The step alone in one graph: without the wrapper that a schedule puts around it."""
    step = torch.compile(MBF.step, fullgraph=True, backend="aot_eager")
    return lambda: step(optimizer)


@over_partitions
@over_forms
def test_step_in_one_graph( form, partition):
    """Every structure of mini-blocks."""
    options = FORMS[form] | PARTITIONS[partition]
    eager, traced = CapturableRun(capturable=True, **options), CapturableRun(capturable=True, **options)
    compiled = fullgraph(traced.optimizer)
    for i in range(4):
        for run in (eager, traced):
            run.load()
            run.group["lr"].fill_(1e-2 / (1 + i))
        eager.optimizer.step()
        compiled() if i else traced.optimizer.step()
    for name in eager.tensors:
        assert_bitwise(traced.tensors[name].detach(), eager.tensors[name].detach())
    assert counters["stats"]["unique_graphs"] == 1
