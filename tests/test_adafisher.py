"""AdaFisher against its definition: factors by loops over single numbers, F by torch.kron, and pinned figures."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from mbf_optim import AdaFisher, AdaFisherW
from mbf_optim.capture import Capture
from mbf_optim.diagonal_factors import factors, known_layers, sums
from mbf_optim.replicas import Share
from test_capture import LAYERS as AFFINE
from torch import nn
from torch.utils.checkpoint import checkpoint

from mbf_kernels.testing import assert_bitwise, randn

EXACT = dict(rtol=1e-12, atol=1e-12)  # float64: a few hundred roundings of 1.1e-16
EPSILON = 1e-6
PINNED = {  # made with the authors' code
    (AdaFisher, 0.0): (
        [[-0.3109452798198049, -0.1963350800759295], [0.6861848664335422, -0.2408478001208401]],
        [-0.2027027027027026, 0.2487562333065466],
    ),
    (AdaFisher, 0.01): (
        [[-0.3110696579335862, -0.1960732999652608], [0.685841773986692, -0.2413294957282597]],
        [-0.202770270271277, 0.2488806114250533],
    ),
    (AdaFisherW, 0.01): (
        [[-0.3109462798198198, -0.1963330800758997], [0.6861818664334229, -0.2408518001208999]],
        [-0.2027032027027101, 0.2487572333065615],
    ),
}
LAYERS = {name: case for name, case in AFFINE.items() if name != "conv2d, valid"} | {  # words for paddings: one will do
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (1, 3), padding="same"), (4, 2, 6, 5)),  # the loops pad both sides alike
    "batch norm, vectors": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch norm, sequences": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "batch norm, images": (lambda: nn.BatchNorm2d(4), (5, 4, 3, 2)),
    "layer norm, vectors": (lambda: nn.LayerNorm(4), (5, 4)),
    "layer norm, sequences": (lambda: nn.LayerNorm(4), (5, 3, 4)),
    "layer norm, images": (lambda: nn.LayerNorm((3, 4, 2)), (5, 3, 4, 2)),
    "layer norm, rows of images": (lambda: nn.LayerNorm((4, 2)), (5, 3, 4, 2)),
    "layer norm, no bias": (lambda: nn.LayerNorm(4, bias=False), (5, 3, 4)),
}
over_layers = pytest.mark.parametrize("layer", LAYERS)
over_classes = pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])


def layer_of(name, seed=0):
    make, shape = LAYERS[name]
    torch.manual_seed(seed)
    return make().double(), randn(*shape, dtype=torch.float64, seed=seed)


def index(i, size, mode):
    """Where a position beside an axis is read; None: a zero."""
    if mode == "replicate":
        return min(max(i, 0), size - 1)
    if mode == "circular":
        return i % size
    if mode == "reflect":
        return abs(i) if i < size else 2 * (size - 1) - i
    return i if 0 <= i < size else None


def loops_of_a_convolution(module, h, s):
    """One number of one patch at a time."""
    axes = h.ndim - 2
    padding = module.padding
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    channels, entries = module.in_channels // module.groups, module.weight[0].numel()
    places = [range(n) for n in s.shape[2:]]
    total, count = [0.0] * entries, len(h) * math.prod(s.shape[2:]) * entries
    for n, group in itertools.product(range(len(h)), range(module.groups)):
        for out in itertools.product(*places):
            entry = 0
            for c, *k in itertools.product(range(channels), *map(range, module.kernel_size)):
                at = [
                    index(out[a] * module.stride[a] - padding[a] + k[a] * module.dilation[a], h.shape[2 + a],
                          module.padding_mode)
                    for a in range(axes)
                ]  # fmt: skip
                total[entry] += 0.0 if None in at else h[(n, group * channels + c, *at)].item() ** 2
                entry += 1
    inputs = [x / count for x in total] + ([] if module.bias is None else [module.groups / entries])
    outputs = [s[:, o].square().sum().item() / (len(h) * math.prod(s.shape[2:])) for o in range(s.shape[1])]
    return inputs, outputs


def loops_of_a_linear_layer(module, h, s):
    rows, gradients = h.reshape(-1, h.shape[-1]), s.reshape(-1, s.shape[-1])
    inputs = [sum(row[j].item() ** 2 for row in rows) / len(rows) for j in range(rows.shape[1])]
    outputs = [sum(row[i].item() ** 2 for row in gradients) / len(rows) for i in range(gradients.shape[1])]
    return inputs + ([] if module.bias is None else [1.0]), outputs


def loops_of_a_norm(module, h, s):
    samples, size, elements = h.shape[0], h.shape[1], math.prod(h.shape[2:])
    means = [sum(x.item() for x in h[:, k].flatten()) / elements**2 for k in range(size)]
    inputs = [sum(a * a for a in means) / samples**2] + ([] if module.bias is None else [size / samples**2])
    sums = [0.0] * module.weight.numel()
    for at in itertools.product(*map(range, s.shape)):
        inner = at[1:2] if not isinstance(module, nn.LayerNorm) else at[s.ndim - module.weight.ndim :]
        place = 0
        for i, n in zip(inner, module.weight.shape, strict=True):
            place = place * n + i
        sums[place] += s[at].item()
    return inputs, [x * x / samples for x in sums]


def loops(module, h, s):
    """H and S by definition."""
    by_kind = {nn.Linear: loops_of_a_linear_layer, nn.Conv1d: loops_of_a_convolution, nn.Conv2d: loops_of_a_convolution}
    found = by_kind.get(type(module), loops_of_a_norm)(module, h.detach(), s)
    return [torch.tensor(values, dtype=torch.float64) for values in found]


def watched(model):
    layers = known_layers(model, {id(param) for param in model.parameters()})
    return layers, Capture(model, [layer.module for layer in layers])


def raw_factors(layer, uses, scale=1.0):
    """Of one process."""
    share = Share(uses, layer.extent(uses), [layer.extent(uses)])
    return factors(layer, share, sums(layer, share, scale).sums)


@over_layers
def test_raw_factors_are_those_of_loops(layer):
    model, inputs = layer_of(layer)
    (known,), capture = watched(model)
    outputs = model(inputs)
    gradients = randn(*outputs.shape, dtype=torch.float64, seed=1)
    outputs.backward(gradients)
    expected = loops(model, inputs, gradients)
    for scale in (1.0, 8.0):  # of the loss
        h, s = raw_factors(known, capture.uses(model), scale)
        torch.testing.assert_close(h, expected[0], **EXACT)
        torch.testing.assert_close(s * scale**2, expected[1], **EXACT)
    assert (1, s.numel(), h.numel()) == (1, known.shape[0] * known.shape[1], known.shape[2])


@over_layers
def test_an_accumulated_gradient_is_one_batch(layer):
    model, inputs = layer_of(layer)
    (known,), capture = watched(model)
    outputs = model(inputs)
    gradients = randn(*outputs.shape, dtype=torch.float64, seed=1)
    outputs.backward(gradients)
    whole = raw_factors(known, capture.uses(model))
    capture.clear()
    for part, gradient in zip(inputs.split(3), gradients.split(3), strict=True):
        model(part).backward(gradient)
    for a, b in zip(raw_factors(known, capture.uses(model)), whole, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_uses_of_different_lengths():
    """The tokens of all uses at one place are summed; those that a shorter use lacks are zeros."""
    model = nn.LayerNorm(4).double()
    (known,), capture = watched(model)
    short, long = (randn(2, t, 4, dtype=torch.float64, seed=t) for t in (2, 3))
    for x in (short, long):
        model(x).square().sum().backward()
    a = torch.zeros(3, dtype=torch.float64)
    for x in (short, long):
        a[: x.shape[1]] += x.sum((0, 2)) / 4**2
    h, s = raw_factors(known, capture.uses(model))
    torch.testing.assert_close(h, torch.stack([a.square().sum(), torch.tensor(3.0).double()]) / 4**2, **EXACT)
    torch.testing.assert_close(s, model.bias.grad.square() / 4, **EXACT)


@pytest.mark.parametrize("layer", ["linear", "conv2d, groups", "layer norm, vectors", "layer norm, images"])
def test_a_sample_without_a_batch_dimension_is_a_batch_of_one(layer):
    model, inputs = layer_of(layer)
    (known,), capture = watched(model)
    found = []
    for x in (inputs[0], inputs[:1]):
        model(x).sin().sum().backward()
        found.append(raw_factors(known, capture.uses(model)))
        capture.clear()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_order_of_samples_does_not_count():
    model, inputs = layer_of("conv2d, groups")
    (known,), capture = watched(model)
    found = []
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
        model(inputs[order]).sin().sum().backward()
        found.append(raw_factors(known, capture.uses(model)))
        capture.clear()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


# ---- steps


@pytest.mark.parametrize(("kind", "weight_decay"), PINNED)
def test_the_published_codes_first_step(kind, weight_decay):
    """Its weights were made in float32: with decay that shows in the eleventh digit."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -0.2], [0.3, 0.4]]))
        model.bias.copy_(torch.tensor([0.05, -0.1]))
    model.double()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = kind(model, weight_decay=weight_decay)
    inputs, gradients = (torch.tensor(x, dtype=torch.float64) for x in ([[1, 2], [3, -1]], [[1, 0], [0.5, -2]]))
    model(inputs).backward(gradients)
    optimizer.step()
    for param, old, expected in zip(model.parameters(), before, PINNED[kind, weight_decay], strict=True):
        torch.testing.assert_close(param - old, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    state = optimizer.state[model.weight]
    for name, expected in (("H", [0.087999998, 0.08299999925, 0.08]), ("S", [0.08, 0.08799999418182243])):
        torch.testing.assert_close(state[name], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 2, stride=2),
        nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 1),
    ).double()  # fmt: skip


def batch(t):
    return randn(6, 2, 4, 3, dtype=torch.float64, seed=t)


def loss_of(outputs):
    return (30 * outputs.sin() + outputs.square()).mean()  # with a slope far above the epsilon's root


class Dense:
    """The definition, one layer of a Sequential after the other."""

    def __init__(self, model, lr, beta, damping, averages, weight_decay, decoupled, tau):
        self.model, self.lr, self.beta, self.damping, self.averages = model, lr, beta, damping, averages
        self.weight_decay, self.decoupled, self.tau, self.t = weight_decay, decoupled, tau, 0
        self.factors, self.momenta = {}, {param: torch.zeros_like(param) for param in model.parameters()}

    def gradients(self, x, due):
        seen = []
        for module in self.model:
            h, x = x, module(x)
            if list(module.parameters()):
                x.retain_grad()
                seen.append((module, h, x))
        loss_of(x).backward()
        for module, h, outputs in seen if due else []:
            for which, raw in enumerate(loops(module, h, outputs.grad)):
                old = self.factors.get((module, which), torch.ones_like(raw))
                normal = (raw - raw.min()) / (raw.max() - raw.min() + EPSILON)
                self.factors[module, which] = self.averages[0] * old + self.averages[1] * normal

    @torch.no_grad()
    def step(self):
        self.t += 1
        for module in self.model:
            if not list(module.parameters()):
                continue
            h, s = (self.factors[module, which] for which in (0, 1))
            f = torch.kron(s, h).view(len(s), len(h))
            f = f + self.damping if self.tau is None else self.damping * (1 + f / (self.tau * f.mean()))
            columns = module.weight.numel() // len(s)
            parts = [f[:, :columns], f[:, columns:]] if module.bias is not None else [f]
            for param, part in zip(module.parameters(), parts, strict=True):
                gradient = param.grad + (0.0 if self.decoupled else self.weight_decay) * param
                self.momenta[param] = self.beta * self.momenta[param] + (1 - self.beta) * gradient
                move = self.momenta[param] / (1 - self.beta**self.t) / part.reshape(param.shape)
                param -= self.lr * (move + (self.weight_decay if self.decoupled else 0.0) * param)


@over_classes
@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("tau", [None, 0.1])
def test_steps_are_the_dense_ones(kind, variant, tau):
    torch.manual_seed(0)
    model = network()
    twin = copy.deepcopy(model)
    options = dict(lr=1e-4, beta=0.7, damping=0.02, weight_decay=0.1)
    averages = (0.06, 0.006) if variant == "official" else (0.6, 0.4)
    dense = Dense(twin, averages=averages, decoupled=kind is AdaFisherW, tau=tau, **options)
    optimizer = kind(model, decay=0.6, update_interval=2, variant=variant, relative_damping=tau, **options)
    for t in range(6):
        optimizer.zero_grad()
        twin.zero_grad()
        loss_of(model(batch(t))).backward()
        dense.gradients(batch(t), due=t % 2 == 0)
        optimizer.step()
        dense.step()
        # steps of at most lr / lambda |M| < 1 each, whose gradients and F differ by some hundred roundings
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert optimizer.state[model[0].weight]["updates"] == 3


def curvature_of(param, optimizer):
    """F, of the shape of the parameter."""
    group = optimizer.param_groups[0]
    layer = next(layer for layer in optimizer._layers if any(param is own for own in layer.params))
    s, h = optimizer._curvature(param, layer, param.dtype, group)
    return torch.outer(s, h).view(param.shape) + group["damping"]


BOUNDS = {1: (0.007400, 0.008744), 2: (0.001041, 0.001226), 3: (0.00100026, 0.00108470), 6: (0.001, 0.00107561)}


@pytest.mark.parametrize("updates", BOUNDS)
def test_damping_dominates_with_the_published_scales(updates):
    """Both bounds are taken: by the least and the most active input and output. Half a unit of their last digit."""
    model = nn.Linear(3, 3).double()
    optimizer = AdaFisher(model, update_interval=1, lr=0.0)
    inputs = 1e4 * randn(5, 3, dtype=torch.float64)
    for _ in range(updates):
        model.zero_grad()
        (1e4 * model(inputs)).backward(randn(5, 3, dtype=torch.float64, seed=1))
        optimizer.step()
    f = torch.cat([curvature_of(param, optimizer).flatten() for param in model.parameters()])
    least, most = BOUNDS[updates]
    assert abs(f.min().item() - least) <= 5e-7 and abs(f.max().item() - most) <= 5e-7
    factor = 0.08**updates, 0.08**updates + 0.008 * (1 - 0.08**updates) / 0.92
    assert all(1e-3 + factor[0] ** 2 - 1e-15 <= x <= 1e-3 + factor[1] ** 2 + 1e-15 for x in f.tolist())


def test_the_scale_of_the_loss_enters_by_the_epsilon_only():
    model = nn.Linear(4, 3).double()
    found = []
    for scale in (1e4, 1e6):
        net = copy.deepcopy(model)
        optimizer = AdaFisher(net)
        (scale * net(randn(6, 4, dtype=torch.float64)).sin().sum()).backward()
        optimizer.step()
        found.append(optimizer.state[net.weight])
    assert_bitwise(found[0]["H"], found[1]["H"])
    torch.testing.assert_close(found[0]["S"], found[1]["S"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_relative_damping_counts_at_any_scale_and_shortens_steps_only(variant):
    """Also where a vector has a single entry, which fades, at last to nothing."""
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = AdaFisher(model, damping=0.1, relative_damping=0.5, update_interval=1, variant=variant)
    inputs = randn(6, 4, dtype=torch.float64)
    for _ in range(400):
        model.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    if variant == "official":
        assert state["S"].item() == 0
    f = curvature_of(model.weight, optimizer)
    torch.testing.assert_close(f, 0.1 * (1 + state["H"] / (0.5 * state["H"].mean()))[None], **EXACT)
    assert f.min() >= 0.1


# ---- nothing is left where it was


class Wild(nn.Module):
    """An embedding first, raw parameters of a layer's shape, tied and frozen weights, attention, a norm that only
    shifts, a layer used twice."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.embedding, self.place = nn.Embedding(7, 4), nn.Parameter(randn(4, 4, dtype=torch.float32))
        self.attention, self.shared = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)
        self.frozen, self.shift, self.plain = (
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.LayerNorm(4, elementwise_affine=False),
        )
        self.head, self.last = nn.Linear(4, 7, bias=False), nn.Linear(7, 3)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)
        self.shift.weight.requires_grad_(False)
        self.checkpointed = checkpointed

    def middle(self, x):
        return torch.tanh(self.shared(torch.relu_(self.shared(input=x))))

    def forward(self, tokens):
        x = self.embedding(tokens) @ self.place
        x = self.plain(self.shift(self.frozen(x + self.attention(x, x, x)[0])))
        x = self.middle(x) if self.checkpointed is None else checkpoint(self.middle, x, **self.checkpointed)
        return self.last(torch.relu(self.head(x)))


TOKENS = torch.arange(10).view(2, 5) % 7


def test_everything_that_has_a_gradient_is_stepped():
    torch.manual_seed(0)
    model = Wild().double()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AdaFisher(model)
    loss_of(model(TOKENS)).backward()
    optimizer.step()
    for name, param in model.named_parameters():
        moved = param.grad is not None and bool((param.grad != 0).any())
        assert torch.equal(param, before[name]) != moved and (param.grad is None) == (not param.requires_grad)
        assert ("step" in optimizer.state.get(param, {})) == param.requires_grad
    structures = {row.name: row.structure for row in optimizer.report()}
    known = {"shared.weight + bias": "H 5, S 4", "last.weight + bias": "H 8, S 3", "shift.weight + bias": "H 2, S 4"}
    assert {name: text for name, text in structures.items() if text != "gradient"} == known


@pytest.mark.parametrize("checkpointed", [None, dict(use_reentrant=False), dict(use_reentrant=True)], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_one_update_a_step_from_all_uses(checkpointed, parts):
    """Parts of an accumulated gradient, a layer used twice, a checkpoint; against a module that notes what it sees."""
    torch.manual_seed(0)
    model, seen = Wild(checkpointed).double(), []
    plain = Wild().double()
    plain.load_state_dict(model.state_dict())

    class Noting(nn.Linear):
        def forward(self, input):
            outputs = super().forward(input)
            seen.append((input.detach().clone(), outputs))
            outputs.retain_grad()
            return outputs.clone()  # what the activation overwrites

    plain.shared.__class__ = Noting
    optimizer = AdaFisher(model)
    for net in (model, plain):
        for tokens in TOKENS.split(2 // parts):
            (loss_of(net(tokens)) / parts).backward()
    h, s = (torch.cat(tensors).flatten(0, 1) for tensors in zip(*[(x, y.grad) for x, y in seen], strict=True))
    optimizer.step()
    state = optimizer.state[model.shared.weight]
    assert state["updates"] == 1 and len(seen) == 2 * parts and len(h) == 20
    for name, raw in zip("HS", loops(model.shared, h, s), strict=True):
        normal = (raw - raw.min()) / (raw.max() - raw.min() + EPSILON)
        torch.testing.assert_close(state[name], 0.08 + 0.008 * normal, rtol=1e-9, atol=1e-12)


@over_classes
def test_what_is_no_known_layer_has_the_step_of_one_without_curvature(kind):
    """That is M lr / lambda, beside layers that have curvature; and layers in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4)).double()
    model[1].eval()
    optimizer = kind(model, lr=0.01, beta=0.9, damping=0.1, weight_decay=0.2)
    expected = [param.detach().clone() for param in model.parameters()]
    momenta = [torch.zeros_like(param) for param in expected]
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model(TOKENS)).backward()
        for x, m, param in zip(expected, momenta, model.parameters(), strict=True):
            decoupled = kind is AdaFisherW
            m.mul_(0.9).add_(0.1 * (param.grad + (0.0 if decoupled else 0.2) * x))
            x -= 0.01 * (m / (1 - 0.9 ** (t + 1)) / 0.1 + (0.2 if decoupled else 0.0) * x)
        optimizer.step()
        for x, param in zip(expected, model.parameters(), strict=True):
            torch.testing.assert_close(param.detach(), x, **EXACT)
    assert {row.structure for row in optimizer.report()} == {"gradient"}


def test_a_frozen_weight_leaves_the_bias_its_curvature():
    model = nn.Linear(3, 2).double()
    model.weight.requires_grad_(False)
    optimizer, before = AdaFisher(model), model.bias.detach().clone()
    model(randn(4, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    expected = -1e-3 * model.bias.grad / (state["S"] * state["H"][-1] + 1e-3)
    torch.testing.assert_close(model.bias.detach() - before, expected, **EXACT)


def test_statistics_that_are_not_finite_are_skipped():
    """Before there are any, the step is that without curvature."""
    model, good = nn.Linear(3, 2).double(), randn(4, 3, dtype=torch.float64)
    optimizer = AdaFisher(model, update_interval=1, lr=0.01, damping=0.1, beta=0.0)
    state = optimizer.state[model.weight]

    def step(inputs):
        optimizer.zero_grad()
        model(inputs).sum().backward()
        for param in model.parameters():
            param.grad.fill_(1.0)
        before = model.weight.detach().clone()
        optimizer.step()
        return before - model.weight.detach()

    bad = good.clone()
    bad[1, 2] = float("inf")
    torch.testing.assert_close(step(bad), torch.full((2, 3), 0.1, dtype=torch.float64), **EXACT)
    assert state["skipped"] == 1 and "H" not in state
    assert optimizer.report()[0].structure == "gradient"
    step(good)
    kept = {name: state[name].clone() for name in "HS"}
    step(bad)
    assert (state["updates"], state["skipped"], optimizer.report()[0].skipped) == (1, 2, 2)
    for name, vector in kept.items():
        assert_bitwise(state[name], vector)


# ---- as an optimizer


def train(model, optimizer, steps, first=0):
    for t in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model(batch(t).to(model[0].weight.dtype))).backward()
        optimizer.step()


@over_classes
@pytest.mark.parametrize("steps", [0, 7])
def test_a_resumed_run_has_the_same_bits(kind, steps):
    options = dict(lr=1e-5, update_interval=3, weight_decay=0.1, variant="paper")
    torch.manual_seed(0)
    model = network()
    optimizer = kind(model, **options)
    train(model, optimizer, steps)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    other = network()
    resumed = kind(other, **options)
    weights, state = torch.load(buffer)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, 5, first=steps)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(a, b)
    assert resumed.state[other[0].weight]["updates"] == math.ceil((steps + 5) / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_in_float32_at_least(dtype):
    """4,096 rows of 20: their squares overflow float16. A loaded state keeps its dtype."""
    model = nn.Linear(3, 2).to(dtype)
    optimizer = AdaFisher(model)
    model(torch.full((4096, 3), 20.0, dtype=dtype)).mean().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert state["H"].dtype == state["S"].dtype == torch.promote_types(dtype, torch.float32)
    assert state["updates"] == 1 and state["average"].dtype == dtype and bool(model.weight.isfinite().all())
    resumed = AdaFisher(model)
    resumed.load_state_dict(optimizer.state_dict())
    assert_bitwise(resumed.state[model.weight]["H"], state["H"])


@over_classes
def test_channels_last_weights_take_the_same_steps(kind):
    """Their elements lie in another order than the entries of H."""
    torch.manual_seed(0)
    model = network()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert not twin[3].weight.is_contiguous()
    options = dict(lr=1e-4, damping=0.02, weight_decay=0.1, variant="paper", update_interval=1)
    optimizers = [kind(net, **options) for net in (model, twin)]
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        train(net, optimizer, 4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_tensors_of_every_dtype_in_one_model():
    """Those of 16 bits are stepped in float32: rounded once when read back, beside a dozen roundings of the step."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    model = nn.ModuleList(nn.Linear(3, 2, dtype=dtype) for dtype in dtypes)
    optimizer = AdaFisher(model, lr=0.01, beta=0.0, damping=0.1)
    before = [param.detach().clone() for param in model.parameters()]
    for i, param in enumerate(model.parameters()):
        param.grad = randn(*param.shape, dtype=param.dtype, seed=i)
    optimizer.step()
    for param, old in zip(model.parameters(), before, strict=True):
        assert optimizer.state[param]["average"].dtype == param.dtype
        eps = torch.finfo(param.dtype).eps
        expected = old.double() - 0.1 * param.grad.double()
        torch.testing.assert_close(param.double(), expected, rtol=4 * eps, atol=4 * eps)


def test_a_scaled_loss_has_the_same_steps():
    torch.manual_seed(0)
    model = network()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = AdaFisher(model, grad_scaler=scaler), AdaFisher(twin)
    scaler.scale(loss_of(model(batch(0)))).backward()
    loss_of(twin(batch(0))).backward()
    scaler.step(scaled)
    plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):  # a power of two
        torch.testing.assert_close(a, b, **EXACT)


def test_statistics_only_where_they_are_due():
    model = nn.Linear(3, 2)
    optimizer = AdaFisher(model, update_interval=3)
    wanted = []
    for t in range(7):
        wanted.append(optimizer._wants(model))
        model(randn(4, 3, dtype=torch.float32, seed=t)).sum().backward()
        optimizer.step()
        assert optimizer._capture.uses(model) == []
    assert wanted == [True, False, False, True, False, False, True]
    assert optimizer.state[model.weight]["updates"] == 3


def test_schedulers_closures_and_groups():
    """Curvature is that of the weight's group, the rest each one's own."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    twin, inputs = copy.deepcopy(model), randn(4, 3, dtype=torch.float64)
    groups = [dict(params=[model.bias], lr=0.02, decay=0.1), dict(params=[model.weight], lr=0.0, decay=0.8)]
    optimizer, plain = AdaFisher(model, groups=groups), AdaFisher(twin, lr=0.01)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = copy.deepcopy(model)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == before(inputs).sum().item()
    twin(inputs).sum().backward()
    plain.step()
    assert_bitwise(model.weight, before.weight)
    torch.testing.assert_close(model.bias - before.bias, 2 * (twin.bias - before.bias), **EXACT)


def test_a_parameter_without_a_gradient_does_not_count_steps():
    model = nn.Linear(3, 2)
    optimizer = AdaFisher(model)
    for t in range(3):
        optimizer.zero_grad()
        model(randn(4, 3, dtype=torch.float32)).sum().backward()
        if t == 1:
            model.bias.grad = None
        optimizer.step()
    assert [optimizer.state[param]["step"] for param in model.parameters()] == [3, 2]


def test_the_report_counts_bytes():
    model = nn.Linear(3, 2)
    optimizer = AdaFisher(model)
    model(randn(4, 3, dtype=torch.float32)).sum().backward()
    optimizer.step()
    (row,) = optimizer.report()
    assert (row.structure, row.count, row.size, row.bytes) == ("H 4, S 2", 2, 4, 4 * (4 + 2 + 8))


BAD = {
    "lr": -1.0,
    "beta": 1.0,
    "damping": 0.0,
    "decay": 1.5,
    "update_interval": 0,
    "weight_decay": float("nan"),
    "variant": "half",
    "relative_damping": 0.0,
}


@over_classes
@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(kind, name):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: expected {name} "):
        kind(nn.Linear(2, 2), **{name: BAD[name]})
    with pytest.raises(ValueError, match=f"^{kind.__name__}: expected {name} "):
        kind(model := nn.Linear(2, 2), groups=[{"params": model.parameters(), name: BAD[name]}])


def test_what_is_refused():
    with pytest.raises(TypeError, match="^AdaFisher: expected lr to be a number"):
        AdaFisher(nn.Linear(2, 2), lr="fast")
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = AdaFisher(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="^AdaFisher: expected dense gradients"):
        optimizer.step()
    with pytest.raises(TypeError, match="^AdaFisher: cannot be copied or pickled"):
        pickle.dumps(optimizer)
