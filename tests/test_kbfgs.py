"""K-BFGS and K-BFGS(L) against the paper's loop in NumPy, one sample and one vector at a time."""

import copy
import gc
import io
import math
import pickle

import numpy as np
import pytest
import torch
from mbf_optim import KBFGS, KBFGSL
from mbf_optim.bfgs import accepts, action_update, double_damping, gated_update, limited_product
from torch import nn

from mbf_kernels.testing import assert_bitwise, randn

BOTH = pytest.mark.parametrize("method", [KBFGS, KBFGSL])
CLOSE = dict(rtol=1e-9, atol=1e-9)
MU1, MU2 = 0.2, math.sqrt(0.3)


def vectors(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed)


def spd(count, n, seed=0):
    x = vectors(count, n, 2 * n, seed=seed)
    return x @ x.mT / n


def quadratic(x, h):
    return torch.einsum("...i,...ij,...j->...", x, h, x)


# ---- the method, in NumPy


def dense_bfgs(h, s, y):
    rho, eye = 1 / (s @ y), np.eye(len(s))
    return (eye - rho * np.outer(s, y)) @ h @ (eye - rho * np.outer(y, s)) + rho * np.outer(s, s)


def dense_damping(s, y, h, mu1, mu2):
    """Also which of the two were active."""
    hy, first, second = h @ y, False, False
    if s @ y <= mu1 * (y @ hy):
        theta, first = (1 - mu1) * (y @ hy) / (y @ hy - s @ y), True
        s = theta * s + (1 - theta) * hy
    if s @ y <= mu2 * (s @ s):
        theta, second = (1 - mu2) * (s @ s) / (s @ s - s @ y), True
        y = theta * y + (1 - theta) * s
    return s, y, first, second


class Reference:
    """Layers W abar with tanh between them, on inputs [m, T, p], the loss that of ``wavy``; a mean over samples."""

    def __init__(self, weights, lr, damping, decay, momentum, weight_decay, memory=None):
        self.w, self.lr, self.root, self.decay, self.momentum = weights, lr, math.sqrt(damping), decay, momentum
        self.weight_decay, self.memory = weight_decay, memory
        self.average = [np.zeros_like(w) for w in weights]
        self.a, self.h_a = [None] * len(weights), [None] * len(weights)
        self.h_g = [np.eye(len(w)) for w in weights]
        self.pairs = [[] for _ in weights]
        self.ema = [(np.zeros(len(w)), np.zeros(len(w))) for w in weights]
        self.damped = [0, 0]

    def one(self, x):
        """abar, h and g of every layer, of one sample at one location."""
        abars, outputs = [], []
        for i, w in enumerate(self.w):
            abars.append(np.append(x if i == 0 else np.tanh(outputs[-1]), 1.0))
            outputs.append(w @ abars[-1])
        gradients = [np.linspace(1, 2, len(outputs[-1])) * (np.cos(outputs[-1]) + 0.4 * outputs[-1])]
        for w, h in zip(self.w[:0:-1], outputs[-2::-1], strict=True):
            gradients.insert(0, (w[:, :-1].T @ gradients[0]) * (1 - np.tanh(h) ** 2))
        return abars, outputs, gradients

    def all(self, inputs):
        """By layer, [m T, n] each."""
        seen = [self.one(x) for sample in inputs for x in sample]
        return [[np.array([one[kind][i] for one in seen]) for i in range(len(self.w))] for kind in range(3)]

    def step(self, inputs):
        m = len(inputs)
        abars, outputs, gradients = self.all(inputs)
        directions = []
        for i, w in enumerate(self.w):
            gradient = gradients[i].T @ abars[i] / m + self.weight_decay * w
            self.average[i] = self.momentum * self.average[i] + (1 - self.momentum) * gradient
            new = abars[i].T @ abars[i] / m
            self.a[i] = new if self.a[i] is None else self.decay * self.a[i] + (1 - self.decay) * new
            if self.h_a[i] is None:
                self.h_a[i] = np.linalg.inv(self.a[i] + self.root * np.eye(len(new)))
            directions.append(self.h_g[i] @ self.average[i] @ self.h_a[i])
        self.w = [w - self.lr * p for w, p in zip(self.w, directions, strict=True)]
        _, after, gradients_after = self.all(inputs)
        for i in range(len(self.w)):
            self.learn(i, abars[i].mean(0), after[i].mean(0) - outputs[i].mean(0), gradients[i], gradients_after[i])

    def learn(self, i, abar, s, gradients, gradients_after):
        y = gradients_after.mean(0) - gradients.mean(0)
        s, y = (self.decay * old + (1 - self.decay) * new for old, new in zip(self.ema[i], (s, y), strict=True))
        self.ema[i] = s, y
        s, y, *active = dense_damping(s, y, self.h_g[i], 0.2, self.root)
        self.damped = [count + was for count, was in zip(self.damped, active, strict=True)]
        assert s @ y > 1e-4 * (s @ s) * np.linalg.norm(gradients.mean(0))
        self.pairs[i].append((s, y))
        if self.memory is None:
            self.h_g[i] = dense_bfgs(self.h_g[i], s, y)
        else:
            self.h_g[i] = np.eye(len(s))
            for pair in self.pairs[i][-self.memory :]:
                self.h_g[i] = dense_bfgs(self.h_g[i], *pair)
        s_a = self.h_a[i] @ abar
        self.h_a[i] = dense_bfgs(self.h_a[i], s_a, self.a[i] @ s_a + self.root * s_a)


def wavy(outputs):
    """Of a sample the sum; neither convex nor symmetric."""
    weights = torch.linspace(1, 2, outputs.shape[-1], dtype=outputs.dtype)
    return ((outputs.sin() + 0.2 * outputs.square()) * weights).flatten(1).sum(1)


def half_square(outputs):
    return outputs.square().flatten(1).sum(1) / 2


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def closure_of(model, optimizer, inputs, loss=wavy, reduce=torch.mean):
    def closure():
        optimizer.zero_grad()
        value = reduce(loss(model(inputs)))
        value.backward()
        return value

    return closure


def train(model, optimizer, steps, first=0):
    for t in range(first, first + steps):
        optimizer.step(closure_of(model, optimizer, vectors(6, 4, seed=t)))


def matrices(model):
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in model if isinstance(m, nn.Linear)]


# ---- the algebra


def test_double_damping_of_many_pairs():
    """s^T y >= 0.2 y^T H y after the first, s^T y >= mu2 s^T s after both, and nothing where that already holds."""
    s, h = vectors(4000, 6), spd(4000, 6, seed=1)
    y = vectors(4000, 6, seed=2) * torch.tensor([0.01, 1.0, 100.0, 1.0]).repeat(1000)[:, None]
    y[3::4] = s[3::4] + 0.1 * y[3::4]
    hy = (h @ y[..., None])[..., 0]
    once, same = double_damping(s, y, hy, MU1, 0.0)
    assert bool(((once * y).sum(1) >= MU1 * quadratic(y, h) * (1 - 1e-12)).all())
    torch.testing.assert_close(same, y, rtol=0, atol=0)
    s2, y2 = double_damping(s, y, hy, MU1, MU2)
    torch.testing.assert_close(s2, once, rtol=0, atol=0)
    assert bool(((s2 * y2).sum(1) >= MU2 * s2.square().sum(1) * (1 - 1e-12)).all())
    expected = [dense_damping(*(x.numpy() for x in row), MU1, MU2) for row in zip(s, y, h, strict=True)]
    torch.testing.assert_close(s2, torch.tensor(np.array([row[0] for row in expected])), **CLOSE)
    torch.testing.assert_close(y2, torch.tensor(np.array([row[1] for row in expected])), **CLOSE)
    assert {row[2:] for row in expected} == {(False, False), (False, True), (True, False), (True, True)}
    kept = torch.tensor([not row[2] and not row[3] for row in expected])
    torch.testing.assert_close((s2[kept], y2[kept]), (s[kept], y[kept]), rtol=0, atol=0)


def test_an_update_maps_y_to_s_and_stays_positive_definite():
    h = torch.eye(5).double().expand(3, 5, 5)
    for t in range(50):
        s, y = vectors(3, 5, seed=2 * t), vectors(3, 5, seed=2 * t + 1)
        s, y = double_damping(s, y, (h @ y[..., None])[..., 0], MU1, MU2)
        expected = np.array([dense_bfgs(*(x.numpy() for x in row)) for row in zip(h, s, y, strict=True)])
        h, good = gated_update(h, s, y, torch.ones_like(s))
        assert bool(good.all()) and bool((torch.linalg.eigvalsh(h) > 0).all()) and torch.equal(h, h.mT)
        torch.testing.assert_close((h @ y[..., None])[..., 0], s, **CLOSE)
        torch.testing.assert_close(h, torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("memory", [1, 4, 20])
def test_pairs_in_memory_are_dense_updates_of_the_identity(memory):
    """Of three groups, and one of zeros is none."""
    s = vectors(3, 12, 5)[:, -memory:]
    y = s + 0.4 * vectors(3, 12, 5, seed=1)[:, -memory:]
    y = torch.where((s * y).sum(-1, keepdim=True) > 0, y, s)
    s[1, 0], y[1, 0], x = 0, 0, vectors(3, 5, 4, seed=2)
    found = limited_product(s, y, x)
    for group in range(3):
        h = torch.eye(5).double().numpy()
        for pair in zip(s[group].numpy(), y[group].numpy(), strict=True):
            h = dense_bfgs(h, *pair) if pair[0].any() else h
        torch.testing.assert_close(found[group], torch.tensor(h) @ x[group], **CLOSE)
    torch.testing.assert_close(limited_product(s[:, :0], y[:, :0], x), x, rtol=0, atol=0)


def test_the_gate():
    """s^T y > 1e-4 s^T s |v|."""
    s, y = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.1, 0.2]).double()
    v = torch.tensor([600.0, 800.0]).double()  # 1e-4 * 5 * 1000 = s^T y
    assert bool(accepts(s, y, 0.999 * v)) and not bool(accepts(s, y, 1.001 * v))
    h = spd(1, 2)[0]
    for bad in (-y, 0 * y, y * math.nan, y * math.inf, y * 1e-320):
        kept, good = gated_update(h, s, bad, 0 * v)
        assert not bool(good) and torch.equal(kept, h) and not bool(accepts(s, bad, 0 * v))
    kept, good = gated_update(1e308 * h, s, 1e3 * s, v)
    assert not bool(good) and torch.equal(kept, 1e308 * h)


def test_no_pair_comes_of_a_zero_or_of_the_pole():
    """y = 0, and mu2 = 1 with s^T y = s^T s: both divide zero by zero."""
    s = vectors(5)
    for y, mu2 in ((0 * s, MU2), (s, 1.0)):
        pair = double_damping(s, y, y, MU1, mu2)
        assert not bool(accepts(*pair, s))


def test_the_inverse_of_what_stays_is_left_alone():
    a = spd(1, 5)[0] + torch.eye(5)
    inverse = torch.linalg.inv(a)
    h = inverse
    for t in range(20):
        h, good = action_update(h, a - torch.eye(5), 1.0, vectors(5, seed=t))
        assert bool(good)
    torch.testing.assert_close(h, inverse, rtol=1e-12, atol=1e-12)


def test_the_inverse_follows_a_matrix_that_changed():
    """By its action on random vectors alone, to rounding."""
    a = spd(1, 5)[0] + torch.eye(5)
    h = torch.linalg.inv(a)
    a[0, 0] += 3
    errors = []
    for t in range(200):
        h, _ = action_update(h, a, 0.0, vectors(5, seed=t))
        errors.append((h @ a - torch.eye(5)).norm().item())
    assert errors[0] > 0.1 and errors[20] < 0.1 * errors[0] and errors[-1] < 1e-12


# ---- whole steps

OPTIONS = dict(lr=0.2, damping=0.2, decay=0.8, momentum=0.7, weight_decay=0.01)


@pytest.mark.parametrize("locations", [1, 3])
@pytest.mark.parametrize("memory", [None, 3, 100])
def test_steps_are_the_papers(memory, locations):
    """The limited memory drops its oldest pairs from the fourth step on."""
    model = network()
    reference = Reference([w.numpy() for w in matrices(model)], memory=memory, **OPTIONS)
    optimizer = KBFGS(model, **OPTIONS) if memory is None else KBFGSL(model, memory=memory, **OPTIONS)
    for t in range(8):
        inputs = 3 * vectors(6, locations, 4, seed=t)  # far enough for both dampings
        optimizer.step(closure_of(model, optimizer, inputs))
        reference.step(inputs.numpy())
        for actual, expected in zip(matrices(model), reference.w, strict=True):
            torch.testing.assert_close(actual, torch.tensor(expected), **CLOSE)
    assert all(reference.damped)
    for i, row in enumerate(optimizer.report()):
        state = optimizer.state[model[2 * i].weight]
        torch.testing.assert_close(state["A_inverse"][0], torch.tensor(reference.h_a[i]), **CLOSE)
        identity = torch.eye(len(reference.h_g[i]), dtype=torch.float64)[None]
        torch.testing.assert_close(optimizer._product(state, identity)[0], torch.tensor(reference.h_g[i]), **CLOSE)
        assert state["updates"] == 8 and row.skipped == 0


def test_enough_memory_gives_the_same_iterates():
    model = network()
    twin = copy.deepcopy(model)
    for net, optimizer in ((model, KBFGS(model)), (twin, KBFGSL(twin, memory=40))):
        train(net, optimizer, 40)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@BOTH
def test_half_the_squared_error_leaves_the_outputs_alone(method):
    """y = s, so that H_g stays I; and on one batch H_a the inverse it was."""
    model, inputs = nn.Linear(4, 3).double(), vectors(8, 4)
    optimizer = method(model)
    state = optimizer.state[model.weight]
    for _ in range(5):
        optimizer.step(closure_of(model, optimizer, inputs, half_square))
        product = optimizer._product(state, torch.eye(3).double()[None])[0]
        torch.testing.assert_close(product, torch.eye(3).double(), **CLOSE)
        abar = torch.cat([inputs, torch.ones(8, 1).double()], 1)
        inverse = torch.linalg.inv(abar.T @ abar / 8 + math.sqrt(0.3) * torch.eye(5).double())
        torch.testing.assert_close(state["A_inverse"][0], inverse, **CLOSE)
    assert optimizer.report()[0].skipped == 0


@BOTH
def test_one_step_of_a_linear_layer_is_least_squares(method):
    inputs, targets = vectors(12, 4), vectors(12, 3, seed=1)
    model = nn.Linear(4, 3).double()
    optimizer = method(model, lr=1.0, damping=0.0, momentum=0.0)
    optimizer.step(closure_of(model, optimizer, inputs, lambda outputs: half_square(outputs - targets)))
    ones = torch.cat([inputs, torch.ones(12, 1).double()], 1)
    solution = torch.linalg.lstsq(ones, targets).solution.T
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1), solution, **CLOSE)


@BOTH
def test_a_sum_of_losses_has_the_same_pairs(method):
    """Six samples: the gradient is six times the mean's, and lr here a sixth."""
    model = network()
    twin = copy.deepcopy(model)
    mean, total = method(model, lr=0.3), method(twin, lr=0.3 / 6, mean_loss=False)
    for net, optimizer, reduce in ((model, mean, torch.mean), (twin, total, torch.sum)):
        for t in range(4):
            optimizer.step(closure_of(net, optimizer, vectors(6, 4, seed=t), reduce=reduce))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@BOTH
def test_a_grouped_convolution_is_linear_layers_side_by_side(method):
    class Sides(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.sides = nn.ModuleList(nn.Linear(2, 3).double() for _ in range(2))
            with torch.no_grad():
                for i, side in enumerate(self.sides):
                    side.weight.copy_(conv.weight[3 * i : 3 * i + 3, :, 0])
                    side.bias.copy_(conv.bias[3 * i : 3 * i + 3])

        def forward(self, x):
            parts = [side(part) for side, part in zip(self.sides, x.mT.split(2, -1), strict=True)]
            return torch.cat(parts, -1)

    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 1, groups=2).double()
    sides = Sides(conv)
    for model, loss in ((conv, lambda outputs: wavy(outputs.mT)), (sides, wavy)):
        optimizer = method(model)
        for t in range(5):
            optimizer.step(closure_of(model, optimizer, vectors(7, 4, 3, seed=t), loss))
    torch.testing.assert_close(conv.weight[..., 0], torch.cat([side.weight for side in sides.sides]), **CLOSE)
    torch.testing.assert_close(conv.bias, torch.cat([side.bias for side in sides.sides]), **CLOSE)


@BOTH
def test_a_dead_group_leaves_the_others_alone(method):
    """Its pair is no pair; theirs are."""
    torch.manual_seed(0)
    conv, linear = nn.Conv1d(4, 6, 1, groups=2).double(), nn.Linear(2, 3).double()
    linear.load_state_dict({"weight": conv.weight.detach()[:3, :, 0], "bias": conv.bias.detach()[:3]})
    whole, alone = method(conv), method(linear)
    for t in range(5):
        inputs = vectors(7, 4, 3, seed=t)
        whole.step(closure_of(conv, whole, inputs, lambda outputs: wavy(outputs[:, :3].mT)))
        alone.step(closure_of(linear, alone, inputs[:, :2].mT))
    torch.testing.assert_close(conv.weight[:3, :, 0], linear.weight, **CLOSE)
    torch.testing.assert_close(conv.bias[:3], linear.bias, **CLOSE)
    assert [optimizer.report()[0].skipped for optimizer in (whole, alone)] == [5, 0]
    identity = torch.eye(3).double().expand(2, 3, 3)
    assert torch.equal(whole._product(whole.state[conv.weight], identity)[1], identity[1])


# ---- the second pass


class Recorded(nn.Module):
    """Dropout that keeps its outputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(nn.functional.dropout(torch.ones_like(x), 0.5))
        return x * self.seen[-1]


@BOTH
def test_the_second_pass_leaves_no_trace(method):
    """Masks are the first pass's; the random numbers, BatchNorm's averages and gradients are as after it alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), Recorded(), nn.Linear(5, 2)).double()
    twin, inputs = copy.deepcopy(model), vectors(6, 4)
    optimizer = method(model)
    for _ in range(2):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        torch.manual_seed(5)
        expected = wavy(twin(inputs)).mean()
        expected.backward()
        after = torch.get_rng_state()
        torch.manual_seed(5)
        loss = optimizer.step(closure_of(model, optimizer, inputs))
        assert torch.equal(loss, expected) and torch.equal(torch.get_rng_state(), after)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert_bitwise(a.grad, b.grad)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        first, second = model[2].seen[-2:]
        assert torch.equal(first, second) and 0 < first.count_nonzero() < first.numel()
    assert model[1].num_batches_tracked == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_masks_on_a_gpu_are_the_first_passs():
    model = nn.Sequential(nn.Linear(4, 5), Recorded(), nn.Linear(5, 2)).double().cuda()
    optimizer, inputs, states = KBFGS(model), vectors(6, 4).cuda(), []
    plain = closure_of(model, optimizer, inputs)

    def closure():
        loss = plain()
        states.append(torch.cuda.get_rng_state())
        return loss

    optimizer.step(closure)
    first, second = model[1].seen
    assert torch.equal(first, second) and torch.equal(torch.cuda.get_rng_state(), states[0])


def test_gradients_zeroed_in_place_and_buffers_replaced():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2).double()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.linear(x)

    model, inputs = Counting(), vectors(6, 4)
    optimizer, losses = KBFGS(model), []

    def closure():
        optimizer.zero_grad(set_to_none=False)
        losses.append(wavy(model(inputs)).mean())
        losses[-1].backward()
        return losses[-1]

    expected = torch.autograd.grad(wavy(model.linear(inputs)).mean(), model.linear.weight)[0]
    assert optimizer.step(closure) is losses[0] and len(losses) == 2
    assert_bitwise(model.linear.weight.grad, expected)
    assert_bitwise(losses[1].detach(), wavy(model(inputs)).mean().detach())
    assert model.calls == 2  # the first pass, and the line above


def test_a_second_pass_that_fails_leaves_no_trace_either():
    model, inputs = network(), vectors(6, 4)
    optimizer, calls = KBFGS(model), []

    def closure():
        if calls:
            torch.rand(1)
            raise RuntimeError("no second")
        calls.append(1)
        return closure_of(model, optimizer, inputs)()

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no second"):
        optimizer.step(closure)
    assert all(param.grad is not None for param in model.parameters()) and torch.equal(torch.get_rng_state(), state)


# ---- what is skipped


@BOTH
def test_a_dead_layer_stays_where_it_is(method):
    """No gradient comes through, y = 0: H_g is left I and that is counted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    nn.init.constant_(model[0].bias, -100.0)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = method(model)
    train(model, optimizer, 4)
    for old, new in list(zip(before, model.parameters(), strict=True))[:2]:
        assert_bitwise(new.detach(), old)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    assert not torch.equal(model[2].bias, before[3])
    assert [row.skipped for row in optimizer.report()] == [4, 0]
    identity = torch.eye(3).double()[None]
    assert torch.equal(optimizer._product(optimizer.state[model[0].weight], identity), identity)


@BOTH
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_statistics_that_are_not_finite_are_skipped(method, bad_pass):
    model = network()
    optimizer = method(model)
    train(model, optimizer, 2)
    kept = copy.deepcopy({name: optimizer.state[model[0].weight][name] for name in ("A", "s", "y")})
    calls = iter(range(2))

    def closure():
        scale = math.inf if next(calls) == bad_pass else 1.0
        optimizer.zero_grad()
        model(vectors(6, 4) * scale).sum().backward()
        for param in model.parameters():
            param.grad = torch.zeros_like(param)

    optimizer.step(closure)
    state = optimizer.state[model[0].weight]
    assert all(torch.equal(state[name], kept[name]) == (name != "A" or bad_pass == 0) for name in kept)
    assert state["skipped"] == 1 and bool(state["A_inverse"].isfinite().all())
    train(model, optimizer, 2, first=2)
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_without_damping_a_singular_matrix_has_to_wait():
    """Two samples of four numbers: the step is along the averaged gradient; with enough samples it starts."""
    model = nn.Linear(4, 2).double()
    optimizer = KBFGS(model, damping=0.0)
    before = model.weight.detach().clone()
    optimizer.step(closure_of(model, optimizer, torch.zeros(2, 4).double()))
    torch.testing.assert_close(model.weight, before - 0.3 * 0.1 * model.weight.grad)
    assert "A" not in optimizer.state[model.weight] and optimizer.report()[0].skipped == 1
    optimizer.step(closure_of(model, optimizer, vectors(8, 4)))
    assert optimizer.state[model.weight]["updates"] == 1


# ---- as an optimizer


def test_only_passes_of_the_closure_count():
    """Not one before it; and it may zero gradients without the optimizer."""
    model = network()
    twin = copy.deepcopy(model)
    for net, optimizer in ((model, KBFGS(model)), (twin, KBFGS(twin))):
        for t in range(3):
            inputs = vectors(6, 4, seed=t)
            closure = closure_of(net, optimizer, inputs)
            if net is twin:
                wavy(net(5 * inputs)).mean().backward()
                closure = closure_of(net, net, inputs)
            optimizer.step(closure)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_bitwise(a, b)


def test_what_has_no_gradient_stays():
    """Its weight, that has one, steps along the average."""
    model = network()
    optimizer, before = KBFGS(model), [param.detach().clone() for param in model.parameters()]
    plain = closure_of(model, optimizer, vectors(6, 4))

    def closure():
        loss = plain()
        model[0].bias.grad = None
        return loss

    optimizer.step(closure)
    assert torch.equal(model[0].bias, before[1])
    torch.testing.assert_close(model[0].weight.detach(), before[0] - 0.3 * 0.1 * model[0].weight.grad, **CLOSE)


@BOTH
def test_what_is_no_known_layer_steps_along_its_averaged_gradient(method):
    """Beside a layer that has curvature; and a layer in evaluation mode, without statistics."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.known, self.still = nn.Linear(3, 3), nn.Linear(3, 3)
            self.norm, self.free = nn.BatchNorm1d(3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.norm(self.still(self.known(x))) * self.free

    torch.manual_seed(0)
    model = Net().double()
    model.still.eval()
    optimizer = method(model, lr=0.1, momentum=0.8, weight_decay=0.01)
    plain = [model.free, *model.norm.parameters(), *model.still.parameters()]
    averages = [torch.zeros_like(param) for param in plain]
    for t in range(3):
        old = [param.detach().clone() for param in plain]
        optimizer.step(closure_of(model, optimizer, vectors(8, 3, seed=t)))
        for param, was, average in zip(plain, old, averages, strict=True):
            average.mul_(0.8).add_(param.grad + 0.01 * was, alpha=0.2)
            torch.testing.assert_close(param.detach(), was - 0.1 * average, **CLOSE)
    structures = {row.name: row.structure for row in optimizer.report()}
    expected = "H_a 4x4, H_g 3x3" if method is KBFGS else "H_a 4x4, H_g of 100 pairs"
    assert structures.pop("known.weight + bias") == expected
    assert set(structures.values()) == {"gradient"} and len(structures) == 4


@BOTH
def test_a_resumed_run_has_the_same_bits(method):
    model = network()
    optimizer = method(model, weight_decay=0.01)
    train(model, optimizer, 7)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    other = network(seed=1)
    resumed = method(other)
    weights, state = torch.load(buffer)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, 6, first=7)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(a, b)


def test_loading_keeps_the_dtype_of_statistics():
    model = network()
    optimizer = KBFGSL(model)
    train(model, optimizer, 1)
    other = network().float()
    resumed = KBFGSL(other)
    resumed.load_state_dict(optimizer.state_dict())
    assert {resumed.state[other[0].weight][name].dtype for name in ("A", "A_inverse", "S", "s")} == {torch.float64}


@BOTH
def test_schedulers_and_groups(method):
    """A scheduler's lr is that of the next step; a group with lr 0 stays."""
    model = network()
    first, last = (list(model[i].parameters()) for i in (0, 2))
    optimizer = method(model, groups=[dict(params=first, lr=0.0), dict(params=last)])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.0)
    moved = []
    for t in range(2):
        before = [param.detach().clone() for param in model.parameters()]
        train(model, optimizer, 1, first=t)
        scheduler.step()
        moved.append([not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)])
    assert moved == [[False, False, True, True], [False] * 4]


@BOTH
def test_weights_and_biases_in_groups_of_their_own(method):
    """Curvature is the weight's, lr each one's own. A bias in no group is no column."""
    model = network()
    twin, partial = copy.deepcopy(model), copy.deepcopy(model)
    weights, biases = ([p for p in twin.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    split = [dict(params=biases, lr=0.2), dict(params=weights, damping=0.3)]
    before = [param.detach().clone() for param in model.parameters()]
    train(model, method(model, lr=0.1, damping=0.3), 1)
    train(twin, method(twin, lr=0.1, damping=0.7, groups=split), 1)
    for old, a, b in zip(before, model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close((b - old) * (1 if b.ndim > 1 else 0.5), a - old, **CLOSE)
    lone = method(partial, groups=[dict(params=[p for p in partial.parameters() if p.ndim > 1])])
    train(partial, lone, 3)
    assert [row.structure.split(",")[0] for row in lone.report()] == ["H_a 4x4", "H_a 3x3"]
    assert torch.equal(partial[0].bias, before[1])


BAD = {"lr": -1.0, "damping": 1.0, "decay": 1.5, "momentum": 1.0, "weight_decay": float("nan")}


@BOTH
@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(method, name):
    with pytest.raises(ValueError, match=f"^{method.__name__}: expected {name} "):
        method(nn.Linear(2, 2), **{name: BAD[name]})
    with pytest.raises(TypeError, match=f"^{method.__name__}: expected {name} to be a number"):
        method(nn.Linear(2, 2), **{name: "much"})


@pytest.mark.parametrize("memory", [0, 2.5, True, None])
def test_bad_memory_is_refused(memory):
    with pytest.raises(ValueError, match="^KBFGSL: expected memory to be an integer >= 1"):
        KBFGSL(nn.Linear(2, 2), memory=memory)


@BOTH
def test_what_is_refused(method):
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = method(model)
    with pytest.raises(TypeError, match=rf"^{method.__name__}: expected step\(closure\)"):
        optimizer.step()
    with pytest.raises(TypeError, match=f"^{method.__name__}: expected dense gradients"):
        optimizer.step(closure_of(model, optimizer, torch.tensor([[1], [2]])))
    with pytest.raises(TypeError, match=f"^{method.__name__}: cannot be copied or pickled"):
        pickle.dumps(optimizer)


def test_an_optimizer_that_is_gone_leaves_the_model_alone():
    model = network()
    optimizer = KBFGS(model)
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    assert not model._forward_hooks and not model._forward_pre_hooks and not model[0]._forward_hooks
