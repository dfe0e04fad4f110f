"""torch.compile around training: the model, the step and both, with the figures of eager steps and one graph each."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle

import pytest
import torch
from mbf_optim import MBF
from test_capturable import Run as CapturableRun
from test_mbf import FORMS, PARTITIONS
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LambdaLR

from mbf_kernels.testing import assert_bitwise, randn

STEPS = 50


@pytest.fixture(autouse=True)
def strict():
    """Nothing is left of other tests; compiling anything again is an error, and so is a warning."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
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

    def batch(self):
        self.steps += 1
        return [randn(4, *shape, dtype=torch.float64, seed=self.steps) for shape in ((2, 6, 6), (3,))]

    def backward(self, model: Callable):
        self.optimizer.zero_grad()
        x, target = self.batch()
        (model(x) - target).square().mean().backward()

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


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_model_compiled(capturable, tensor_lr):
    """Bits, with a backend that runs the operators as they are."""
    compiled = Training(capturable, tensor_lr)
    compiled.run(model=torch.compile(compiled.model, backend="aot_eager"))
    assert_same_weights(compiled, Training(capturable, tensor_lr).run())


def test_model_compiled_with_inductor():
    """Half the digits of the type: sums run in another order, and 50 steps carry their rounding on."""
    compiled = Training()
    compiled.run(model=torch.compile(compiled.model))
    tolerance = torch.finfo(torch.float64).eps ** 0.5
    for a, b in zip(compiled.weights(), Training().run().weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_step_and_schedule_in_one_graph():
    """50 steps; the rate is read where the schedule writes it."""
    traced = Training(capturable=True, tensor_lr=True).run(1)
    traced.run(STEPS - 1, step=fullgraph(traced.optimizer))
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_weights(traced, Training(capturable=True, tensor_lr=True).run())


@pytest.mark.parametrize("device", [nullcontext(), torch.device("cpu")], ids=["", "torch.device"])
@pytest.mark.parametrize(("form", "partition"), list(zip(cycle(FORMS), PARTITIONS, strict=False)))
def test_every_structure_in_one_graph(form, partition, device):
    options = FORMS[form] | PARTITIONS[partition] | dict(capturable=True)
    eager, traced = CapturableRun(**options), CapturableRun(**options)
    eager.step()
    traced.step()
    compiled = fullgraph(traced.optimizer)
    for lr in (1e-2, 5e-3):
        for run, step in ((eager, eager.optimizer.step), (traced, compiled)):
            run.load()
            run.group["lr"].fill_(lr)
            with device:
                step()
    assert counters["stats"]["unique_graphs"] == 1
    for name in eager.tensors:
        assert_bitwise(traced.tensors[name].detach(), eager.tensors[name].detach())


def test_step_with_inductor():
    traced = Training(capturable=True, tensor_lr=True).run(1)
    step = torch.compile(MBF.step, fullgraph=True)
    traced.run(3, step=lambda: step(traced.optimizer))
    assert_same_weights(traced, Training(capturable=True, tensor_lr=True).run(4))


@pytest.mark.parametrize(("capturable", "tensor_lr"), [(False, False), (False, True), (True, False)])
def test_untraced_step(capturable, tensor_lr):
    """One break, nothing compiled, nothing baked in."""
    whole = Training(capturable, tensor_lr).run(1)
    step = torch.compile(whole.optimizer.step, backend="aot_eager")
    whole.run(STEPS - 1, step=step)
    assert counters["stats"].get("unique_graphs", 0) == 0
    assert_same_weights(whole, Training(capturable, tensor_lr).run())
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="MBF.step is traced with capturable=True"):
        fullgraph(whole.optimizer)()


@pytest.mark.parametrize(("capturable", "tensor_lr"), [(False, False), (False, True), (True, False), (True, True)])
def test_training_step_compiled(capturable, tensor_lr):
    """Forward, backward and step in one function."""
    whole = Training(capturable, tensor_lr).run(1)

    @torch.compile(backend="aot_eager")
    def train_step(x, target):
        whole.optimizer.zero_grad()
        (whole.model(x) - target).square().mean().backward()
        whole.optimizer.step()

    for _ in range(STEPS - 1):
        train_step(*whole.batch())
        whole.schedule.step()
    assert_same_weights(whole, Training(capturable, tensor_lr).run())


def test_missing_gradient_after_a_traced_step():
    """What the graph was not made for runs outside, and is right."""
    eager, traced = CapturableRun(capturable=True), CapturableRun(capturable=True)
    step = torch.compile(MBF.step, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for i, drop in enumerate([(), (), ("conv.weight", "linear.bias"), (), ()]):
            for run in (eager, traced):
                run.load(drop)
            eager.optimizer.step()
            step(traced.optimizer) if i else traced.optimizer.step()
    for name in eager.tensors:
        assert_bitwise(traced.tensors[name].detach(), eager.tensors[name].detach())
