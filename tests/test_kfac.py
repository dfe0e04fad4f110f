"""K-FAC against its dense definition: factors from Jacobians, torch.kron, and a dense solve."""

import copy
import gc
import io
import math
import pickle

import pytest
import torch
from mbf_optim import KFAC
from mbf_optim.affine import affine_layers
from mbf_optim.kronecker import gram
from mbf_optim.sampling import DISTRIBUTIONS
from torch import nn
from torch.func import grad, jacrev

from mbf_kernels.testing import assert_bitwise, randn

PLAIN = dict(lr=0.1, momentum=0.0, kl_clip=None, update_interval=1, factor_interval=1)
NETWORKS = {
    "linear": (lambda: [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)], (6, 4)),
    "sequences": (lambda: [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)], (6, 5, 4)),
    "convolutions": (
        lambda: [nn.Conv2d(2, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2, stride=2), nn.Flatten()],
        (5, 2, 4, 3),
    ),
    "mixed": (
        lambda: [nn.Conv1d(2, 3, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)],
        (5, 2, 7),
    ),
}
over_networks = pytest.mark.parametrize("network", NETWORKS)


def network_of(name, seed=0):
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    return nn.Sequential(*make()).double(), randn(*shape, dtype=torch.float64, seed=seed)


def loss_of(outputs):
    """Of a sample the sum."""
    weights = torch.linspace(1, 2, outputs[0].numel(), dtype=outputs.dtype).view(outputs.shape[1:])
    return ((outputs.sin() + outputs.square()) * weights).flatten(1).sum(1)


def vec(matrix):
    """Columns stacked."""
    return matrix.mT.reshape(-1)


def dense_factors(model, inputs, layer):
    """A and G of every group by definition: a from the Jacobian of the outputs by the weights, g from a tap behind the
    layer; one sample and one location at a time."""

    def run(sample, tap):
        x = sample[None]
        for module in model:
            x = module(x)
            x = x + tap if module is layer.module else x
        return loss_of(x)[0]

    def seen(sample):
        x = sample[None]
        for module in model:
            if module is layer.module:
                return x
            x = module(x)
        raise AssertionError

    groups, q, p = layer.shape
    a_sum, g_sum, m, locations = torch.zeros(groups, p, p).double(), torch.zeros(groups, q, q).double(), len(inputs), 0
    module = layer.module
    for sample in inputs:
        x = seen(sample).detach()
        output = module(x).detach()
        gradient = grad(lambda tap, sample=sample: run(sample, tap))(torch.zeros_like(output))
        names = [name for name, _ in module.named_parameters()]
        by_weights = jacrev(
            lambda params, x=x, names=names: torch.func.functional_call(
                module, dict(zip(names, params, strict=True)), (x,)
            )
        )([param.detach() for param in module.parameters()])
        channel = 1 if isinstance(module, nn.Conv1d | nn.Conv2d) else output.ndim - 1
        gradient = gradient.movedim(channel, -1).reshape(-1, groups, q)
        jacobians = [j.movedim(channel, len(output.shape) - 1).flatten(0, output.ndim - 2) for j in by_weights]
        locations = len(gradient)
        for t in range(locations):
            for group in range(groups):
                first = group * q  # of the group's outputs: its row of the weight sees the patch
                a = jacobians[0][t, first, first].reshape(-1)
                a = torch.cat([a, jacobians[1][t, first, first].reshape(1)]) if len(jacobians) > 1 else a
                a_sum[group] += torch.outer(a, a)
                g_sum[group] += torch.outer(gradient[t, group], gradient[t, group])
    return a_sum.detach() / m, g_sum.detach() / (m * locations)


def dense_direction(a, g, gradient, damping, form):
    eye_a, eye_g = torch.eye(len(a)).double(), torch.eye(len(g)).double()
    if form == "exact":
        matrix = torch.kron(a, g) + damping * torch.kron(eye_a, eye_g)
    else:
        pi = math.sqrt(a.trace() / len(a) / (g.trace() / len(g))) if form == "factored" else 1.0
        matrix = torch.kron(a + pi * math.sqrt(damping) * eye_a, g + math.sqrt(damping) / pi * eye_g)
    return torch.linalg.solve(matrix, vec(gradient)).view(gradient.mT.shape).mT


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_the_matrix_of_products(n):
    rows = randn(7, 3, 2, n, dtype=torch.float64)
    matrix = gram(rows)
    torch.testing.assert_close(matrix, torch.einsum("mtgi,mtgj->gij", rows, rows), rtol=1e-12, atol=1e-12)
    assert torch.equal(matrix, matrix.mT)


@over_networks
@pytest.mark.parametrize("form", ["factored", "unbalanced", "exact"])
def test_a_step_is_the_dense_one(network, form):
    model, inputs = network_of(network)
    before = [param.detach().clone() for param in model.parameters()]
    layers = affine_layers(model)
    dense = [dense_factors(model, inputs, layer) for layer in layers]
    optimizer = KFAC(model, damping=0.3, damping_form=form, **PLAIN)
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    old = iter(before)
    for layer, (a, g) in zip(layers, dense, strict=True):
        state = optimizer.state[layer.weight]
        torch.testing.assert_close(state["A"], a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state["G"], g, rtol=1e-9, atol=1e-12)
        gradient = layer.joined(*[param.grad for param in layer.params])
        moved = layer.joined(*[param.detach() - next(old) for param in layer.params]) / -0.1
        expected = torch.stack([dense_direction(*parts, 0.3, form) for parts in zip(a, g, gradient, strict=True)])
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@over_networks
def test_a_sum_of_losses_has_the_same_factors(network):
    model, inputs = network_of(network)
    twin = copy.deepcopy(model)
    optimizers = KFAC(model, **PLAIN), KFAC(twin, mean_loss=False, **PLAIN)
    loss_of(model(inputs)).mean().backward()
    loss_of(twin(inputs)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    for mine, other in zip(*(affine_layers(net) for net in (model, twin)), strict=True):
        for name in "AG":
            torch.testing.assert_close(optimizers[0].state[mine.weight][name], optimizers[1].state[other.weight][name])


def test_factors_are_averaged_and_inverted_on_schedule():
    """e = min(1 - 1/k, decay); inverses with every update in the first 20 steps, then every factor_interval."""
    model, _ = network_of("linear")
    options = PLAIN | dict(update_interval=2, factor_interval=8, lr=0.0)
    optimizer = KFAC(model, decay=0.6, **options)
    layer, expected, updates, inverses = affine_layers(model)[0], 0.0, 0, []
    for t in range(34):
        optimizer.zero_grad()
        inputs = randn(6, 4, dtype=torch.float64, seed=t)
        loss_of(model(inputs)).mean().backward()
        optimizer.step()
        state = optimizer.state[layer.weight]
        if t % 2 == 0:
            updates += 1
            a = torch.cat([inputs, torch.ones(6, 1).double()], 1)
            keep = min(1 - 1 / updates, 0.6)
            expected = keep * expected + (1 - keep) * a.T @ a / 6
        torch.testing.assert_close(state["A"][0], expected)
        inverses.append(state["A_inverse"].clone())
    changed = [t for t in range(1, 34) if not torch.equal(inverses[t], inverses[t - 1])]
    assert changed == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 32]


def test_one_step_of_a_linear_layer_is_least_squares():
    """Half the squared error: F = A (x) I exactly. The drawn residuals have covariance I."""
    inputs, targets = randn(12, 4, dtype=torch.float64), randn(12, 3, dtype=torch.float64, seed=1)
    model = nn.Linear(4, 3).double()

    def residual(outputs):
        return math.sqrt(3) * torch.eye(3, dtype=outputs.dtype).repeat(4, 1)

    optimizer = KFAC(model, damping=0.0, distribution=residual, **PLAIN | dict(lr=1.0))
    ((model(inputs) - targets).square().sum(1) / 2).mean().backward()
    optimizer.step()
    ones = torch.cat([inputs, torch.ones(12, 1).double()], 1)
    solution = torch.linalg.lstsq(ones, targets).solution.T
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1), solution, rtol=1e-9, atol=1e-9)


def test_a_convolution_with_one_location_is_a_linear_layer():
    conv, linear = nn.Conv2d(2, 3, (3, 2)).double(), nn.Linear(12, 3).double()
    linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})
    inputs = randn(7, 2, 3, 2, dtype=torch.float64)
    for model, x in ((conv, inputs), (linear, inputs.flatten(1))):
        optimizer = KFAC(model, damping=0.1, **PLAIN)
        loss_of(model(x).flatten(1)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=1e-12, atol=1e-12)


def test_the_error_of_the_approximation_without_forming_it():
    """|F - A (x) G|^2 = |F|^2 - (2/m) sum (a^T A a)(g^T G g) + |A|^2 |G|^2, and |F|^2 from Gram matrices."""
    m, a, g = 9, randn(9, 4, dtype=torch.float64), randn(9, 3, dtype=torch.float64, seed=1)
    fisher = sum(torch.kron(torch.outer(x, x), torch.outer(y, y)) for x, y in zip(a, g, strict=True)) / m
    big_a, big_g = a.T @ a / m, g.T @ g / m
    error = (fisher - torch.kron(big_a, big_g)).norm() ** 2
    norm = ((a @ a.T) ** 2 * (g @ g.T) ** 2).sum() / m**2
    mixed = (((a @ big_a) * a).sum(1) * ((g @ big_g) * g).sum(1)).sum()
    torch.testing.assert_close(error, norm - 2 / m * mixed + big_a.norm() ** 2 * big_g.norm() ** 2)


@pytest.mark.parametrize("kl_clip", [1e-4, 1e3])
def test_the_clip_of_all_layers(kl_clip):
    model, inputs = network_of("mixed")
    twin = copy.deepcopy(model)
    before = [param.detach().clone() for param in model.parameters()]
    optimizers = KFAC(model, **PLAIN), KFAC(twin, **PLAIN | dict(kl_clip=kl_clip))
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        loss_of(net(inputs)).mean().backward()
        optimizer.step()
    free = [(old - new) / 0.1 for old, new in zip(before, model.parameters(), strict=True)]
    product = sum((u * param.grad).sum() for u, param in zip(free, model.parameters(), strict=True)) * 0.1**2
    factor = min(1.0, math.sqrt(kl_clip / product))
    assert (factor < 1) == (kl_clip < 1)
    for old, new, u in zip(before, twin.parameters(), free, strict=True):
        torch.testing.assert_close(new, old - 0.1 * factor * u)


def test_what_is_no_known_layer_takes_sgds_step():
    """Unclipped, beside layers that have curvature; and layers without statistics, here in evaluation mode."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.known, self.norm, self.free = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.norm(self.known(x)) * self.free

    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    optimizer = KFAC(model, lr=0.1, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x = randn(8, 3, dtype=torch.float64)
    for net in (model, twin):
        net.known.eval()
    for _ in range(3):
        for net, step in ((model, optimizer.step), (twin, sgd.step)):
            net.zero_grad()
            loss_of(net(x)).mean().backward()
            step()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    rows = {row.name: row.structure for row in optimizer.report()}
    assert set(rows.values()) == {"gradient"} and {"free", "norm.weight", "known.weight + bias"} <= rows.keys()
    assert {row.name: row.structure for row in KFAC(model).report()}["known.weight + bias"] == "A 4x4, G 3x3"


def test_momentum_and_weight_decay_follow_the_direction():
    model, inputs = network_of("linear")
    twin = copy.deepcopy(model)
    optimizer = KFAC(model, **PLAIN | dict(momentum=0.8, weight_decay=0.05))
    direct = KFAC(twin, **PLAIN)
    buffers = [torch.zeros_like(param) for param in twin.parameters()]
    for _ in range(3):
        for net, opt in ((model, optimizer), (twin, direct)):
            opt.zero_grad()
            loss_of(net(inputs)).mean().backward()
        old = [param.detach().clone() for param in twin.parameters()]
        optimizer.step()
        direct.step()
        with torch.no_grad():
            for param, buffer, was in zip(twin.parameters(), buffers, old, strict=True):
                buffer.mul_(0.8).add_((was - param) / 0.1 + 0.05 * was)
                param.copy_(was - 0.1 * buffer)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---- drawn targets


def test_drawn_targets_have_the_fisher_matrix_of_the_outputs():
    """Mean 0; covariance diag(p) - p p^T, p (1 - p), 1. Bounds: five standard errors, no residual exceeds 5."""
    torch.manual_seed(0)
    count, z = 200_000, torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    p, s = z.softmax(0), z.sigmoid()
    covariances = {
        "categorical": p.diag() - torch.outer(p, p),
        "bernoulli": (s * (1 - s)).diag(),
        "gaussian": torch.eye(3).double(),
    }
    for name, covariance in covariances.items():
        residual = DISTRIBUTIONS[name](z.expand(count, 3))
        bound = 5 * (3 / count) ** 0.5  # of products of residuals, whose variance is at most 3 (Gaussian fourth moment)
        assert residual.mean(0).abs().max() < bound
        assert (residual.T @ residual / count - covariance).abs().max() < bound


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_drawing_leaves_gradients_alone(distribution):
    model, inputs = network_of("linear")
    twin = copy.deepcopy(model)
    optimizer = KFAC(model, distribution=distribution, **PLAIN)
    for net in (model, twin):
        loss_of(net(inputs)).mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    optimizer.step()
    assert optimizer.state[model[0].weight]["updates"] == 1


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_outputs_that_are_not_finite_are_not_drawn_from(distribution):
    model, inputs = network_of("linear")
    optimizer = KFAC(model, distribution=distribution, **PLAIN)
    model(inputs * float("inf")).sum().backward()
    assert not any(optimizer.state.values())


def test_drawn_statistics_are_of_the_drawn_residuals():
    """Not of the loss, and not divided by the number of samples."""
    model, inputs = nn.Linear(4, 3).double(), randn(6, 4, dtype=torch.float64)
    residual = randn(6, 3, dtype=torch.float64, seed=5)
    optimizer = KFAC(model, distribution=lambda outputs: residual, **PLAIN)
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model.weight]["G"][0], residual.T @ residual / 6)


def drawn_covariance(passes):
    """The G that KFAC has after ``passes(model, optimizer)``; the residual drawn in the n-th pass is n everywhere."""
    drawn = []

    def residual(outputs):
        drawn.append(torch.full_like(outputs, len(drawn) + 1.0))
        return drawn[-1]

    model = nn.Linear(4, 3).double()
    optimizer = KFAC(model, distribution=residual, **PLAIN)
    passes(model, optimizer)
    optimizer.step()
    return optimizer.state[model.weight]["G"][0, 0, 0].item()


def test_gradients_may_be_zeroed_between_the_passes():
    """Targets are drawn inside the forward pass: what they gave is kept."""

    def passes(model, optimizer):
        outputs = model(torch.ones(2, 4).double())
        optimizer.zero_grad()
        outputs.sum().backward()

    assert drawn_covariance(passes) == 1.0


def test_a_gradient_that_is_dropped_takes_its_statistics_along():
    def passes(model, optimizer):
        model(torch.ones(2, 4).double()).sum().backward()
        optimizer.zero_grad()
        model(torch.ones(2, 4).double()).sum().backward()

    assert drawn_covariance(passes) == 2.0**2


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_pass_without_a_gradient_has_no_statistics(zeroed):
    def passes(model, optimizer):
        model(torch.ones(2, 4).double())
        if zeroed:
            optimizer.zero_grad()
        first = model(torch.ones(2, 4).double())
        model(torch.ones(2, 4).double())
        first.sum().backward()

    assert drawn_covariance(passes) == 2.0**2


def test_accumulated_passes_all_have_statistics():
    def passes(model, optimizer):
        outputs = [model(torch.ones(2, 4).double()) for _ in range(2)]
        for output in outputs:
            output.sum().backward()

    assert drawn_covariance(passes) == (1 + 2.0**2) / 2


def test_a_scaled_loss_has_the_same_statistics():
    model, inputs = network_of("linear")
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = KFAC(model, grad_scaler=scaler, **PLAIN), KFAC(twin, **PLAIN)
    scaler.scale(loss_of(model(inputs)).mean()).backward()
    loss_of(twin(inputs)).mean().backward()
    scaler.step(scaled)
    plain.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ---- as an optimizer


def train(model, optimizer, steps, first=0):
    for t in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model(randn(6, 4, dtype=torch.float64, seed=t))).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form", ["factored", "exact"])
def test_a_resumed_run_has_the_same_bits(form):
    options = dict(update_interval=2, factor_interval=5, damping_form=form)
    model, _ = network_of("linear")
    optimizer = KFAC(model, **options)
    train(model, optimizer, 7)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    other, _ = network_of("linear", seed=1)
    resumed = KFAC(other, **options)
    weights, state = torch.load(buffer)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, 6, first=7)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(a, b)


def test_loading_keeps_the_dtype_of_statistics():
    model, _ = network_of("linear")
    optimizer = KFAC(model)
    train(model, optimizer, 1)
    other, _ = network_of("linear")
    resumed = KFAC(other.float())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[other[0].weight]["A"].dtype == torch.float64


def test_schedulers_closures_and_groups():
    model, inputs = network_of("linear")
    first, last = (list(model[i].parameters()) for i in (0, 2))
    optimizer = KFAC(model, groups=[dict(params=first, lr=0.0), dict(params=last)], **PLAIN)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = [param.detach().clone() for param in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(inputs)).mean()
        loss.backward()
        return loss

    expected = loss_of(model(inputs)).mean().item()
    assert optimizer.step(closure).item() == expected
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True]


def test_weights_and_biases_in_groups_of_their_own():
    """As for weight decay: curvature is the weight's, the rest each one's own. A bias in no group is no column."""
    model, inputs = network_of("mixed")
    twin, partial = copy.deepcopy(model), copy.deepcopy(model)
    weights, biases = ([p for p in twin.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    split = [dict(params=biases, lr=0.2), dict(params=weights, damping=0.3)]
    one, two = KFAC(model, damping=0.3, **PLAIN), KFAC(twin, groups=split, damping=7.0, **PLAIN)
    before = [param.detach().clone() for param in model.parameters()]
    for net, optimizer in ((model, one), (twin, two)):
        loss_of(net(inputs)).mean().backward()
        optimizer.step()
    for old, a, b in zip(before, model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close((b - old) * (1 if b.ndim > 1 else 0.5), a - old)
    lone = KFAC(partial, groups=[dict(params=[p for p in partial.parameters() if p.ndim > 1])], **PLAIN)
    assert [row.structure for row in lone.report()] == ["A 6x6, G 3x3", "A 9x9, G 2x2"]


def test_statistics_that_are_not_finite_are_skipped():
    model, _ = network_of("linear")
    optimizer = KFAC(model, **PLAIN)
    train(model, optimizer, 2)
    kept = {name: value.clone() for name, value in optimizer.state[model[0].weight].items() if name in "AG"}
    optimizer.zero_grad()
    model(torch.full((6, 4), float("inf"), dtype=torch.float64)).sum().backward()
    for param in model.parameters():
        param.grad.zero_()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert [row.skipped for row in optimizer.report()] == [1, 1]


def test_large_and_small_factors_have_inverses():
    """By kernels up to 128, by torch.linalg above."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(140, 127), nn.Tanh(), nn.Linear(127, 3)).double()
    optimizer = KFAC(model, damping=0.1, **PLAIN)
    loss_of(model(randn(20, 140, dtype=torch.float64))).mean().backward()
    optimizer.step()
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]
        a, g = state["A"][0], state["G"][0]
        pi = math.sqrt(a.trace() / len(a) / (g.trace() / len(g)))
        for name, matrix, damping in (("A", a, pi * 0.1**0.5), ("G", g, 0.1**0.5 / pi)):
            identity = torch.eye(len(matrix)).double()
            product = state[f"{name}_inverse"][0] @ (matrix + damping * identity)
            torch.testing.assert_close(product, identity, rtol=0, atol=1e-9)


BAD = {
    "lr": -1.0,
    "damping": -1.0,
    "momentum": 1.0,
    "decay": 1.5,
    "weight_decay": float("nan"),
    "update_interval": 0,
    "factor_interval": 1.5,
    "kl_clip": -1e-3,
    "damping_form": "half",
    "distribution": "poisson",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    with pytest.raises(ValueError, match=f"^KFAC: expected {name} "):
        KFAC(nn.Linear(2, 2), **{name: BAD[name]})


def test_what_is_refused():
    with pytest.raises(ValueError, match="^KFAC: expected damping > 0"):
        KFAC(nn.Linear(2, 2), damping=0.0, damping_form="exact")
    with pytest.raises(TypeError, match="^KFAC: expected lr to be a number"):
        KFAC(nn.Linear(2, 2), lr="fast")
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = KFAC(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="^KFAC: expected dense gradients"):
        optimizer.step()
    with pytest.raises(TypeError, match="^KFAC: cannot be copied or pickled"):
        pickle.dumps(optimizer)


def test_an_optimizer_that_is_gone_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = KFAC(model, distribution="gaussian")
    del optimizer
    gc.collect()
    assert not model._forward_hooks and not model._forward_pre_hooks and not model[0]._forward_hooks
