"""Schedulers of torch around MBF: what they set counts at the next step, and nothing is compiled again for it."""

import copy
import inspect
from functools import partial

import pytest
import torch
from mbf_optim import MBF
from test_mbf import FORMS, Pair
from test_param_groups import Problem, assert_same
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from mbf_kernels.testing import assert_bitwise, randn

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], gamma=0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=4),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=1e-3, max_lr=1e-2, step_size_up=3),  # momentum, too
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=12),  # likewise
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.ExponentialLR(opt, gamma=0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.ExponentialLR(opt, gamma=0.9)]
    ),
    "SWALR": lambda opt: SWALR(opt, swa_lr=3e-3, anneal_epochs=4),
}
STEPS = 10


def test_every_scheduler_is_tried():
    classes = [kind for _, kind in inspect.getmembers(lr_scheduler, inspect.isclass) if kind.__name__[0] != "_"]
    known = {kind.__name__ for kind in classes if issubclass(kind, lr_scheduler.LRScheduler)}
    assert known - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


class Scheduled:
    """A problem in two groups with rates of their own, MBF or another optimizer for it, and a scheduler."""

    def __init__(self, name, lr=float, optimizer=MBF, **options):
        self.problem = Problem()
        named = list(self.problem.named.items())
        groups = [dict(params=named[:3], lr=lr(0.01)), dict(params=named[3:], lr=lr(0.02))]
        self.optimizer = optimizer(groups, momentum=0.9, **options)
        self.scheduler = SCHEDULERS[name](self.optimizer)
        self.steps = 0

    def values(self):
        """What schedulers set, for each group."""
        return [(float(group["lr"]), group["momentum"]) for group in self.optimizer.param_groups]

    def step(self):
        self.problem.backward(self.steps)
        self.optimizer.step()
        advance(self.scheduler)
        self.steps += 1


def advance(scheduler):
    scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


def number(lr):
    return torch.tensor(lr, dtype=torch.float64)


MODES = {
    "float": dict(lr=float),
    "tensor": dict(lr=number),
    "capturable": dict(lr=number, capturable=True),
}
over_schedulers = pytest.mark.parametrize("name", SCHEDULERS)
over_modes = pytest.mark.parametrize("mode", MODES)


@over_modes
@over_schedulers
def test_a_schedule_is_that_of_sgd(name, mode):
    """lr and momentum of every group, from step to step, as torch's SGD has them."""
    ours, sgd = Scheduled(name, **MODES[mode]), Scheduled(name, optimizer=torch.optim.SGD)
    seen = set()
    for _ in range(STEPS):
        assert ours.values() == sgd.values()
        seen.update(ours.values())
        ours.step()
        sgd.step()
    assert len(seen) > 2, "nothing was scheduled"


@pytest.mark.parametrize("form", FORMS)
@over_modes
@over_schedulers
def test_a_schedule_counts_at_the_next_step(name, mode, form):
    """The steps are those of the brute-force optimizer that has lr and momentum set by hand."""
    options = MODES[mode] | dict(lr=MODES[mode]["lr"](0.01), damping=0.1)
    pair = Pair("mlp", torch.float64, FORMS[form] | options)
    (group,) = pair.run.optimizer.param_groups
    scheduler = SCHEDULERS[name](pair.run.optimizer)
    for _ in range(STEPS):
        for layer in pair.brute.layers:
            layer.o.update(lr=float(group["lr"]), momentum=group["momentum"])
        pair.step()
        advance(scheduler)
    pair.check(1e-9)


@over_modes
@over_schedulers
def test_a_schedule_resumes(name, mode):
    """From the checkpoints of optimizer and scheduler, in objects made anew."""
    straight, resumed = (Scheduled(name, **MODES[mode]) for _ in range(2))
    for _ in range(4):
        straight.step()
    saved = copy.deepcopy((straight.optimizer.state_dict(), straight.scheduler.state_dict()))
    with torch.no_grad():
        for key, p in straight.problem.named.items():
            resumed.problem.named[key].copy_(p)
    resumed.scheduler.load_state_dict(saved[1])
    resumed.optimizer.load_state_dict(saved[0])
    resumed.steps = straight.steps
    for _ in range(4):
        straight.step()
        resumed.step()
        assert resumed.values() == straight.values()
    assert_same(straight.problem, resumed.problem)


# ---- averaged weights


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6, 3))


def batch(step):
    return randn(16, 2, 8, dtype=torch.float32, seed=2 * step), randn(16, 3, dtype=torch.float32, seed=2 * step + 1)


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target)


def train(model, after):
    optimizer = MBF(model.named_parameters(), lr=0.01)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, *batch(step)).backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("decay", [None, 0.5], ids=["mean", "exponential"])
def test_averaged_weights(decay):
    """Of SWA and EMA: they are the averages of what MBF made, and averaging leaves the training alone."""
    model, plain = network(), network()
    options = dict(multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else {}
    averaged = AveragedModel(model, **options)
    seen = []

    def after():
        averaged.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])

    train(model, after)
    train(plain, lambda: None)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bitwise(a, b)
    weights = [decay**5] + [(1 - decay) * decay ** (5 - i) for i in range(1, 6)] if decay else [1 / 6] * 6
    for p, *values in zip(averaged.module.parameters(), *seen, strict=True):
        mean = sum(w * value.double() for w, value in zip(weights, values, strict=True))
        size = sum(w * value.double().abs() for w, value in zip(weights, values, strict=True))
        assert ((p.double() - mean).abs() <= 2 * 6 * torch.finfo(torch.float32).eps * size).all()
    update_bn((batch(step)[0] for step in range(4)), averaged)
    assert all(b.isfinite().all() for b in averaged.buffers())


# ---- compiled models


@pytest.fixture
def compile_once():
    """torch.compile, to which it is an error to compile anything a second time."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield torch.compile
    torch._dynamo.reset()


def scheduled(model, mode):
    """An optimizer, and a scheduler that changes its lr and momentum at every step."""
    options = MODES[mode] | dict(lr=MODES[mode]["lr"](0.01))
    optimizer = MBF(model.named_parameters(), **options)
    return optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=50)


@over_modes
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_is_compiled_once(compile_once, backend, mode):
    model = network()
    optimizer, scheduler = scheduled(model, mode)
    compiled = compile_once(loss_of, backend=backend)
    losses = []
    for step in range(50):
        optimizer.zero_grad()
        losses.append(compiled(model, *batch(step % 4)))
        losses[-1].backward()
        optimizer.step()
        scheduler.step()
    assert sum(losses[-4:]) < sum(losses[:4])


@over_modes
@pytest.mark.parametrize("part", ["step", "iteration"])
def test_compiled_code_may_step(compile_once, part, mode):
    """Who compiles the step, or all of an iteration, gets the plain step, and compiles once."""
    models = [network(), network()]
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer, scheduler = scheduled(model, mode)
        if compiled and part == "step":
            optimizer.step = compile_once(optimizer.step, backend="eager")

        def iteration(x, target, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss_of(model, x, target).backward()
            optimizer.step()

        if compiled and part == "iteration":
            iteration = compile_once(iteration, backend="eager")
        for step in range(50):
            iteration(*batch(step))
            scheduler.step()
    for plain, compiled in zip(*(model.parameters() for model in models), strict=True):
        assert_bitwise(compiled, plain)


def test_a_compiled_model_inside_a_closure_stays_compiled(compile_once):
    calls = []

    def backend(graph, _):
        return lambda *args: calls.append("compiled") or graph(*args)

    model = network()
    optimizer, scheduler = scheduled(model, "float")
    compiled = compile_once(loss_of, backend=backend)

    def closure(step):
        optimizer.zero_grad()
        loss = compiled(model, *batch(step))
        loss.backward()
        return loss

    for step in range(4):
        optimizer.step(partial(closure, step))
        scheduler.step()
    assert len(calls) == 4
