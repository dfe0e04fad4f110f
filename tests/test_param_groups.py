"""Which parameters step, and how: options of groups; tensors frozen, tied, empty or without a gradient."""

import copy
import inspect
import pickle

import pytest
import torch
from mbf_optim import MBF
from torch import nn

from mbf_kernels.testing import assert_bitwise, randn

SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    "linear.weight": (4, 8),
    "linear.bias": (4,),
    "table.weight": (6, 4),
    "norm.weight": (5,),
    "half.weight": (4, 6),  # bfloat16
}
# For every option a value that is not the default, with what it needs beside it.
OVERRIDES = {
    "lr": dict(lr=0.02),
    "momentum": dict(momentum=0.5),
    "decay": dict(decay=0.9),
    "damping": dict(damping=0.03),
    "relative_damping": dict(relative_damping=False),
    "weight_decay": dict(weight_decay=0.5),
    "graft": dict(graft=None),
    "nesterov": dict(nesterov=False),
    "update_interval": dict(update_interval=2),
    "factor_interval": dict(factor_interval=3),
    "blocks": dict(blocks="row"),
    "segment": dict(segment=3),
    "grid": dict(blocks="grid", grid=(1, 2)),
    "average": dict(blocks="row", average=False),
    "diagonal_decay": dict(diagonal_decay=0.9),
    "eps": dict(eps=1e-2),
    "maximize": dict(maximize=True),
    "capturable": dict(capturable=True),
    "master_weights": dict(master_weights=True),
    "stochastic_rounding": dict(stochastic_rounding=True),
}
over_options = pytest.mark.parametrize("option", OVERRIDES)


class Problem:
    """Named tensors that are pulled to a centre, each step with noise of its own: the same bits on every run."""

    def __init__(self, seed=0, dtype=torch.float32, device=None, shapes=SHAPES):
        self.named, self._centre = {}, {}
        for i, (name, shape) in enumerate(shapes.items()):
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            kind = dict(dtype=torch.bfloat16 if name.startswith("half") else dtype, device=device)
            start = randn(*shape, **kind, seed=100 * seed + i)
            self.named[name] = nn.Parameter(start.to(memory_format=layout))
            self._centre[name] = randn(*shape, **kind, seed=100 * seed + 50 + i)

    def loss(self, step=None):
        """Half the squared distance to the centre, or to the one that ``step`` sees."""
        total = 0.0
        for i, (name, tensor) in enumerate(self.named.items()):
            away = tensor - self._centre[name]
            if step is not None:
                away = away - randn(*tensor.shape, dtype=tensor.dtype, device=tensor.device, seed=1000 * step + i)
            total = total + away.square().sum() / 2
        return total

    def backward(self, step, without=()):
        for tensor in self.named.values():
            tensor.grad = None
        self.loss(step).backward()
        for name in without:
            self.named[name].grad = None

    def modules(self):
        """The named tensors of one module after the other."""
        names = dict.fromkeys(name.split(".")[0] for name in self.named)
        return [{n: p for n, p in self.named.items() if n.split(".")[0] == name} for name in names]


def train(problem, optimizer, steps, first=0):
    for step in range(first, first + steps):
        problem.backward(step)
        optimizer.step()


def assert_same(a, b):
    for x, y in zip(a.named.values(), b.named.values(), strict=True):
        assert_bitwise(x, y)


# ---- options of groups


def test_every_option_is_tried():
    assert set(OVERRIDES) == set(inspect.signature(MBF).parameters) - {"params", "differentiable"}


@over_options
def test_an_option_of_a_group_counts_there_alone(option):
    """Two groups step as two optimizers would, of which one has the option for its default; and it matters."""
    override = OVERRIDES[option]
    together, alone, plain = ([Problem(seed) for seed in (1, 2)] for _ in range(3))
    groups = [dict(params=together[0].named.items(), **override), dict(params=together[1].named.items())]
    joint = MBF(groups)
    single = [MBF(alone[0].named.items(), **override), MBF(alone[1].named.items())]
    default = MBF(plain[0].named.items())
    for step in range(5):
        for problem in (*together, *alone, plain[0]):
            problem.backward(step)
        for optimizer in (joint, *single, default):
            optimizer.step()
    for ours, expected in zip(together, alone, strict=True):
        assert_same(ours, expected)
    if option != "capturable":
        pairs = zip(together[0].named.values(), plain[0].named.values(), strict=True)
        assert any((x != y).any() for x, y in pairs), "the option makes no difference here"


@over_options
def test_a_group_added_later_is_an_optimizer_of_its_own(option):
    override = OVERRIDES[option]
    early, late, alone = Problem(1), Problem(2), Problem(2)
    optimizer, expected = MBF(early.named.items()), MBF(alone.named.items(), **override)
    train(early, optimizer, 2)
    optimizer.add_param_group(dict(params=late.named.items(), **override))
    for step in range(3):
        for problem in (early, late, alone):
            problem.backward(step)
        optimizer.step()
        expected.step()
    assert_same(late, alone)


def test_a_refused_group_changes_nothing():
    ours, expected = Problem(), Problem()
    optimizers = [MBF(problem.named.items(), lr=0.01) for problem in (ours, expected)]
    train(ours, optimizers[0], 2)
    train(expected, optimizers[1], 2)
    late = {name: nn.Parameter(torch.ones(2, 3)) for name in ("x", "y")}
    refused = [
        dict(params=late.items(), lr=-1.0),
        dict(params=[("x", late["x"]), ("y", nn.Parameter(torch.ones(2, dtype=torch.complex64)))]),
        dict(params=[late["x"]]),  # without a name
        dict(params=ours.named.items()),  # again
    ]
    for group in refused:
        with pytest.raises((ValueError, TypeError)):
            optimizers[0].add_param_group(group)
    assert len(optimizers[0].param_groups) == 1 and set(optimizers[0].state) == set(ours.named.values())
    train(ours, optimizers[0], 2, first=2)
    train(expected, optimizers[1], 2, first=2)
    assert_same(ours, expected)


def test_the_callers_groups_and_options_stay_as_they_are():
    """So that groups may be used for a second optimizer, with other defaults."""
    problem = Problem()
    names = list(problem.named)
    groups = [dict(params=[problem.named[name] for name in names[:3]], lr=0.1)]
    groups += [dict(params=[problem.named[name] for name in names[3:]])]
    options = dict(lr=0.01, grid=[1, 2], blocks="grid")
    before = copy.copy(options), [(dict(group), list(group["params"])) for group in groups]
    optimizer = MBF(groups, **options)
    optimizer.param_groups[1]["lr"] = 7.0
    train(problem, optimizer, 1)
    assert options == before[0] and optimizer.defaults["lr"] == 0.01
    for group, (keys, params) in zip(groups, before[1], strict=True):
        assert list(group) == list(keys) and all(x is y for x, y in zip(group["params"], params, strict=True))
    assert [group["lr"] for group in MBF(groups, lr=0.5).param_groups] == [0.1, 0.5]


# ---- which tensors step


@over_options
def test_a_step_without_a_gradient_is_no_step(option):
    """Every module as if it had an optimizer of its own, which steps when there are gradients."""
    ours, alone = Problem(), Problem()
    optimizer = MBF(ours.named.items(), **OVERRIDES[option])
    single = [MBF(module.items(), **OVERRIDES[option]) for module in alone.modules()]
    missing = [(), ("conv.weight",), ("linear.weight", "linear.bias"), ("conv.bias", "norm.weight"), tuple(SHAPES), ()]
    for step, without in enumerate(missing):
        before = {name: ours.named[name].detach().clone() for name in without}
        ours.backward(step, without)
        alone.backward(step, without)
        optimizer.step()
        for module, own in zip(alone.modules(), single, strict=True):
            if any(p.grad is not None for p in module.values()):
                own.step()
        for name in without:
            assert_bitwise(ours.named[name], before[name])
    assert_same(ours, alone)


@over_options
def test_a_frozen_tensor_starts_when_it_is_freed(option):
    """It keeps still, then steps as in an optimizer made at that moment; it makes no difference to the others."""
    ours, others, fresh = Problem(), Problem(), Problem()
    frozen = [name for name in SHAPES if name.startswith(("linear", "norm"))]
    for name in frozen:
        ours.named[name].requires_grad_(False)
    optimizer = MBF(ours.named.items(), **OVERRIDES[option])
    expected = MBF([(n, p) for n, p in others.named.items() if n not in frozen], **OVERRIDES[option])
    late = MBF([(n, fresh.named[n]) for n in frozen], **OVERRIDES[option])
    for step in range(6):
        if step == 3:
            for name in frozen:
                assert_bitwise(ours.named[name], fresh.named[name])
                ours.named[name].requires_grad_(True)
        for problem in (ours, others, fresh):
            problem.backward(step)
        optimizer.step()
        expected.step()
        if step >= 3:
            late.step()
    for name, tensor in ours.named.items():
        assert_bitwise(tensor, (fresh if name in frozen else others).named[name])


class Tied(nn.Module):
    """Two layers of one weight, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_tied_weights_are_one_tensor(duplicate):
    """They step once and stay tied, in copies too; both biases step."""
    model = Tied()
    optimizer = MBF(model.named_parameters())
    expected = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    apart = MBF(expected.items())
    for step in range(4):
        if step == 2 and duplicate is not None:
            model, optimizer = duplicate((model, optimizer))
        optimizer.zero_grad()
        model(randn(7, 5, dtype=torch.float32, seed=step)).square().sum().backward()
        for ours, other in zip(model.parameters(), expected.values(), strict=True):
            other.grad = ours.grad.clone()
        optimizer.step()
        apart.step()
    assert model.first.weight is model.second.weight and len(optimizer.state) == 3
    for ours, other in zip(model.parameters(), expected.values(), strict=True):
        assert_bitwise(ours, other)


@over_options
def test_empty_tensors(option):
    """They do no harm, in steps and in checkpoints."""
    shapes = {"a.weight": (0, 5), "a.bias": (0,), "b.weight": (3, 0), "b.bias": (3,), "c.weight": (0, 2, 3, 3)}
    shapes |= {"d.weight": (2, 0, 3, 3), "e.weight": (0,)}
    ours, alone = Problem(shapes=shapes | SHAPES), Problem()
    with torch.no_grad():
        for name, tensor in alone.named.items():
            tensor.copy_(ours.named[name])
    optimizer, expected = (MBF(problem.named.items(), **OVERRIDES[option]) for problem in (ours, alone))
    for step in range(4):
        if step == 2:
            optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        ours.backward(step)
        for name, tensor in alone.named.items():
            tensor.grad = ours.named[name].grad.clone()
        optimizer.step()
        expected.step()
    for name, tensor in alone.named.items():
        assert_bitwise(tensor, ours.named[name])
    assert ours.named["b.bias"].isfinite().all()
    assert len(str(optimizer.report())) > len(str(expected.report()))


def test_zero_grad():
    """Gradients set to zero stay where they are, for CUDA graphs; the steps are the same as without them."""
    runs = [Problem(), Problem()]
    optimizers = [MBF(problem.named.items(), lr=0.01) for problem in runs]
    for step in range(4):
        for problem, optimizer, to_none in zip(runs, optimizers, (True, False), strict=True):
            held = [p.grad for p in problem.named.values()]
            optimizer.zero_grad(set_to_none=to_none)
            for p, grad in zip(problem.named.values(), held, strict=True):
                assert p.grad is None if to_none or step == 0 else p.grad is grad and not p.grad.any()
            problem.loss(step).backward()
            optimizer.step()
    assert_same(*runs)


def test_a_zero_gradient_is_a_gradient():
    """Momentum carries on, as with torch's optimizers; without a gradient nothing moves."""
    problem = Problem(shapes={name: shape for name, shape in SHAPES.items() if name != "half.weight"})
    optimizer = MBF(problem.named.items(), lr=0.01)
    train(problem, optimizer, 1)
    for to_none in (False, True):
        before = [p.detach().clone() for p in problem.named.values()]
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()
        for p, b in zip(problem.named.values(), before, strict=True):
            assert ((p == b) if to_none else (p != b)).all()


SET_WRONG = {
    "momentum": (None, "momentum"),
    "decay": (1.5, "in \\[0, 1\\]"),
    "update_interval": (-1, "integer >= 1"),
    "weight_decay": ("a", "number"),
    "nesterov": ("yes", "True or False"),
    "lr": (None, "lr to be a number"),
    "damping": ("a", "damping to be a number"),
}


@pytest.mark.parametrize("name", SET_WRONG)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_option_that_is_set_wrong_is_refused_before_anything_moves(name, steps_before):
    weight = nn.Parameter(randn(4, 3, 3, 3))
    optimizer = MBF([{"params": [nn.Parameter(randn(2))]}, {"params": [weight]}])
    for _ in range(steps_before):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    good = optimizer.param_groups[1][name]
    value, message = SET_WRONG[name]
    optimizer.param_groups[1][name] = value
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=f"MBF: .*{message}"):
            optimizer.step()
    assert_bitwise(weight.detach(), before)
    optimizer.param_groups[1][name] = good
    optimizer.step()
    assert optimizer.state_dict()["state"][1]["step"] == steps_before + 1
