"""Schedulers of torch around MBF: what they set counts at the next step, and nothing is compiled again for it."""

import copy
import inspect
from functools import partial

import pytest
import torch
from mbf_optim import MBF
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
        self.scheduler.step(*[1.0] * isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau))
        self.steps += 1


def number(lr):
    return torch.tensor(lr, dtype=torch.float64)


@pytest.mark.parametrize("lr", [float, number], ids=["float", "tensor"])
@pytest.mark.parametrize("capturable", [False, True], ids=["plain", "capturable"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_that_of_sgd_and_counts(name, capturable, lr):
    """lr and momentum go as in torch's SGD; the steps are those of an optimizer that has them set by hand."""
    ours = Scheduled(name, lr, capturable=capturable)
    by_hand = Scheduled("ConstantLR", lr, capturable=capturable)
    sgd = Scheduled(name, optimizer=torch.optim.SGD)
    seen = set()
    for step in range(STEPS):
        assert ours.values() == sgd.values()
        seen.update(ours.values())
        for group, (rate, momentum) in zip(by_hand.optimizer.param_groups, sgd.values(), strict=True):
            group.update(lr=lr(rate), momentum=momentum)
        by_hand.problem.backward(step)
        by_hand.optimizer.step()
        ours.step()
        sgd.step()
    assert len(seen) > 2, "nothing was scheduled"
    assert_same(ours.problem, by_hand.problem)


@pytest.mark.parametrize("lr", [float, number], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_resumes(name, lr):
    """From the checkpoints of optimizer and scheduler, in objects made anew."""
    straight, resumed = (Scheduled(name, lr) for _ in range(2))
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


@pytest.fixture(params=["eager", "inductor"])
def compiler(request):
    """torch.compile, to which a second compilation of the same is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield partial(torch.compile, backend=request.param)
    torch._dynamo.reset()


LRS = {"float": lambda: 0.01, "tensor": lambda: torch.tensor(0.01), "capturable": lambda: torch.tensor(0.01)}


@pytest.mark.parametrize("kind", LRS)
def test_a_compiled_model_is_compiled_once(compiler, kind):
    """However lr and momentum go, through optimizer steps that are not compiled."""
    model = network()
    optimizer = MBF(model.named_parameters(), lr=LRS[kind](), capturable=kind == "capturable")
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=50)
    forward = compiler(loss_of)
    losses = []
    for step in range(50):
        optimizer.zero_grad()
        losses.append(forward(model, *batch(step % 4)))
        losses[-1].backward()
        optimizer.step()
        scheduler.step()
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("kind", LRS)
def test_a_step_inside_compiled_code_is_the_plain_step(compiler, kind):
    """Whoever compiles a whole iteration, or the step, gets the same weights, and again no second compilation."""
    models = [network() for _ in range(2)]
    optimizers = [
        MBF(model.named_parameters(), lr=LRS[kind](), capturable=kind == "capturable") for model in models
    ]
    steps = [optimizers[0].step, compiler(optimizers[1].step)]
    for model, optimizer, step_ in zip(models, optimizers, steps, strict=True):
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=50)
        for step in range(50):
            optimizer.zero_grad()
            loss_of(model, *batch(step)).backward()
            step_()
            scheduler.step()
    for plain, compiled in zip(*(model.parameters() for model in models), strict=True):
        assert_bitwise(compiled, plain)
