"""Two-level K-FAC against dense algebra over all layers: the Fisher matrix of all parameters, R0 and F_c."""

import copy

import pytest
import torch
from mbf_optim import KFAC, TwoLevelKFAC, two_level
from mbf_optim.affine import Rows, affine_layers
from mbf_optim.sample_gradients import Factored, Whole, kept, sample_gradients
from mbf_optim.two_level import SPACES, SUMS, coarse_matrix, covariances
from test_capture import own_gradients
from test_kfac import PLAIN, dense_factors, loss_of, network_of, vec
from torch import nn

from mbf_kernels import factor
from mbf_kernels.testing import assert_bitwise, randn

DAMPING = 0.3
over_spaces = pytest.mark.parametrize("coarse", SPACES)
NETWORKS = {
    "linear": ([nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)], (8, 4)),
    "mixed": (
        [nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(8, 2)],
        (8, 2, 4, 3),
    ),
}
over_networks = pytest.mark.parametrize("network", NETWORKS)


def made(network):
    torch.manual_seed(0)
    modules, shape = NETWORKS[network]
    model = nn.Sequential(*copy.deepcopy(modules)).double()
    for param in model.parameters():
        nn.init.normal_(param, std=0.5)
    return model, randn(*shape, dtype=torch.float64)


def flat(matrices):
    """Of all layers one vector, groups one after the other."""
    return torch.cat([vec(block) for matrix in matrices for block in matrix])


class Dense:
    """All that the method uses, as matrices."""

    def __init__(self, model, inputs):
        self.layers = affine_layers(model)
        own = [own_gradients(model, layer, inputs, loss_of) for layer in self.layers]
        columns = torch.stack([flat([part[n] for part in own]) for n in range(len(inputs))], 1)
        self.fisher = columns @ columns.T / len(inputs) + DAMPING * torch.eye(len(columns)).double()
        self.gradient = columns.mean(1)
        self.factors = [dense_factors(model, inputs, layer) for layer in self.layers]
        blocks = []
        for a, g in self.factors:
            pi = (a.diagonal(dim1=1, dim2=2).mean(1) / g.diagonal(dim1=1, dim2=2).mean(1)).sqrt()
            for group in range(len(a)):
                damped = [
                    matrix[group] + scale * DAMPING**0.5 * torch.eye(matrix.shape[1]).double()
                    for matrix, scale in ((a, pi[group]), (g, 1 / pi[group]))
                ]
                blocks.append(torch.linalg.inv(torch.kron(*damped)))
        self.kfac = torch.block_diag(*blocks)
        self.zeta = self.kfac @ self.gradient

    def space(self, coarse):
        """R0, a row for each vector."""
        sizes = [torch.Size(layer.shape).numel() for layer in self.layers]
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        residual = self.gradient - self.fisher @ self.zeta
        rows = []
        for order in (1, 2) if coarse.startswith("krylov") else (1,):
            for i, (a, g) in enumerate(self.factors):
                part = slice(offsets[i], offsets[i + 1])
                kfac = self.kfac[part, part]
                if coarse == "spectral":
                    lowest = [[torch.linalg.eigh(m)[1][:, 0] for m in pair] for pair in zip(a, g, strict=True)]
                    vector = torch.cat([torch.kron(*pair) for pair in lowest])
                elif coarse in ("nicolaides", "krylov"):
                    vector = torch.linalg.matrix_power(kfac, order - 1) @ torch.ones(sizes[i]).double()
                else:
                    vector = torch.linalg.matrix_power(kfac, order) @ residual[part]
                row = torch.zeros(len(self.gradient)).double()
                row[part] = vector / vector.abs().max()
                rows.append(row)
        return torch.stack(rows)

    def energy(self, delta):
        error = delta - torch.linalg.solve(self.fisher, self.gradient)
        return error @ self.fisher @ error


def stepped(model, inputs, **options):
    """The direction of one step."""
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = TwoLevelKFAC(model, damping=DAMPING, **PLAIN, **options)
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    old = iter(before)
    moved = [layer.joined(*[(next(old) - p.detach()) / 0.1 for p in layer.params]) for layer in affine_layers(model)]
    return flat(moved), optimizer


@pytest.mark.parametrize("samples, locations, form", [(5, 1, Factored), (5, 9, Whole)])
def test_gradients_of_samples(samples, locations, form):
    """Kept as rows and as they are: products with a matrix, and sums."""
    rows = Rows(
        randn(samples, locations, 2, 4, dtype=torch.float64),
        randn(samples, locations, 2, 3, dtype=torch.float64),
        locations,
    )
    whole = torch.einsum("mtgq,mtgp->mgqp", rows.gradients, rows.inputs)
    gradients = sample_gradients(kept(rows))
    matrix, weights = randn(2, 3, 4, dtype=torch.float64, seed=5), randn(samples, dtype=torch.float64, seed=6)
    assert type(gradients) is form
    torch.testing.assert_close(gradients.scores(matrix), torch.einsum("mgqp,gqp->m", whole, matrix))
    torch.testing.assert_close(gradients.combination(weights), torch.einsum("m,mgqp->gqp", weights, whole))


@over_networks
@over_spaces
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_the_multiplicative_correction(network, coarse, weight):
    """delta; R0 F delta = R0 grad; and the energy falls by (2 w - w^2) beta^T F_c beta."""
    model, inputs = made(network)
    dense = Dense(model, inputs)
    space = dense.space(coarse)
    matrix = space @ dense.fisher @ space.T
    beta = torch.linalg.solve(matrix, space @ (dense.gradient - dense.fisher @ dense.zeta))
    delta, optimizer = stepped(model, inputs, coarse=coarse, weight=weight)
    torch.testing.assert_close(delta, dense.zeta + weight * space.T @ beta, rtol=1e-9, atol=1e-9)
    change = dense.energy(delta) - dense.energy(dense.zeta)
    assert change.item() <= 0
    expected = -(2 * weight - weight**2) * beta @ matrix @ beta
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(optimizer.energy_change, expected, rtol=1e-9, atol=1e-12)
    if weight == 1.0:
        torch.testing.assert_close(space @ dense.fisher @ delta, space @ dense.gradient, rtol=1e-9, atol=1e-9)


def test_the_additive_correction():
    """F_c from the sums of covariances between layers, taken pair by pair."""
    model, inputs = made("linear")
    dense = Dense(model, inputs)
    seen, count = {}, len(inputs)
    for layer in dense.layers:
        layer.module.register_forward_hook(lambda module, args, output: seen.update({module: (args[0], output)}))
    outputs = model(inputs)
    gradients = torch.autograd.grad(loss_of(outputs).sum(), [seen[layer.module][1] for layer in dense.layers])
    sums = []
    for layer, g in zip(dense.layers, gradients, strict=True):
        a = seen[layer.module][0].detach()
        sums.append((a if layer.bias is None else torch.cat([a, torch.ones(count, 1).double()], 1), g))
    matrix = DAMPING * torch.eye(3).double()
    for i, (a, g) in enumerate(sums):
        for j, (b, h) in enumerate(sums):
            matrix[i, j] += (a.T @ b / count).sum() * (g.T @ h / count).sum()
    space = dense.space("nicolaides")
    beta = torch.linalg.solve(matrix, space @ dense.gradient)
    delta, optimizer = stepped(model, inputs, form="additive", weight=0.5)
    torch.testing.assert_close(delta, dense.zeta + 0.5 * space.T @ beta, rtol=1e-9, atol=1e-9)
    assert optimizer.energy_change is None


def test_the_additive_form_pools_locations():
    """Layers with 6 and 2 locations: F_c is symmetric, positive definite, and on the diagonal sum(A) sum(G)."""
    model, inputs = made("mixed")
    _, optimizer = stepped(model, inputs, form="additive")
    layers = optimizer._together({layer: None for layer in optimizer._layers})
    matrix = coarse_matrix(optimizer._covariances(layers), [layer.groups for layer in layers])
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() >= -1e-9 * matrix.norm()
    for i in (0, 2):  # layers without groups
        state = optimizer.state[layers[i].weight]
        torch.testing.assert_close(matrix[i, i], state["A"].sum() * state["G"].sum())


@over_networks
def test_the_additive_operator_is_symmetric_positive_definite(network):
    """M^-1 = K-FAC^-1 + w R0^T F_c^-1 R0, row by row from the steps that unit gradients make with the first step's
    statistics. So <grad, delta> > 0 for every gradient."""
    model, inputs = made(network)
    dense = Dense(model, inputs)
    optimizer = TwoLevelKFAC(
        model,
        damping=DAMPING,
        form="additive",
        weight=0.5,
        **PLAIN | dict(update_interval=10**6, factor_interval=10**6),
    )
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    layers, rows = affine_layers(model), []
    for unit in torch.eye(len(dense.gradient)).double():
        parts = unit.split([torch.Size(layer.shape).numel() for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            blocks = part.view(layer.shape[0], layer.shape[2], layer.shape[1]).mT
            for param, gradient in zip(layer.params, layer.split(blocks), strict=True):
                param.grad = gradient.contiguous()
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        old = iter(before)
        rows.append(flat([layer.joined(*[(next(old) - p.detach()) / 0.1 for p in layer.params]) for layer in layers]))
    operator = torch.stack(rows)
    torch.testing.assert_close(operator, operator.T, rtol=1e-9, atol=1e-9)
    assert torch.linalg.eigvalsh(operator).min() > 0
    space = dense.space("nicolaides")
    back = torch.linalg.pinv(space)
    inverse = back.T @ (operator - dense.kfac) @ back
    torch.testing.assert_close(operator, dense.kfac + space.T @ inverse @ space, rtol=1e-9, atol=1e-9)
    coarse = torch.linalg.inv(inverse / 0.5)
    assert torch.linalg.eigvalsh(coarse).min() >= DAMPING * (1 - 1e-9)


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_without_weight_it_is_kfac(form):
    model, inputs = network_of("mixed")
    twin = copy.deepcopy(model)
    for net, optimizer in (
        (model, TwoLevelKFAC(model, form=form, weight=0.0, **PLAIN)),
        (twin, KFAC(twin, **PLAIN)),
    ):
        loss_of(net(inputs)).mean().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_bitwise(a, b)


def test_where_kfac_is_exact_nothing_is_corrected():
    """One linear layer, half the squared error, labels exactly: zeta = F^-1 grad."""
    torch.manual_seed(0)
    inputs = randn(6, 4, dtype=torch.float64).repeat_interleave(3, 0)
    model = nn.Linear(4, 3).double()

    def residual(outputs):
        return 3**0.5 * torch.eye(3, dtype=outputs.dtype).repeat(6, 1)

    options = PLAIN | dict(distribution=residual, damping=1e-18)
    optimizer = TwoLevelKFAC(model, **options)
    before = model.weight.detach().clone()
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    a = torch.cat([inputs, torch.ones(18, 1).double()], 1)
    zeta = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1) @ torch.linalg.inv(a.T @ a / 18)
    torch.testing.assert_close((before - model.weight) / 0.1, zeta[:, :-1], rtol=1e-6, atol=1e-7)  # 1e-18^0.5
    assert abs(optimizer.energy_change.item()) < 1e-12


@over_spaces
def test_the_energy_falls_at_every_step_of_a_run(coarse):
    """Also where the statistics are older than the gradient."""
    model, _ = made("linear")
    optimizer = TwoLevelKFAC(model, coarse=coarse, lr=0.02, update_interval=3, factor_interval=3)
    for t in range(12):
        optimizer.zero_grad()
        loss_of(model(randn(8, 4, dtype=torch.float64, seed=t))).mean().backward()
        optimizer.step()
        assert optimizer.energy_change.item() <= 0
        assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("coarse, vectors", [("nicolaides", 1), ("krylov", 2)])
def test_the_coarse_system_is_the_kernels(monkeypatch, coarse, vectors):
    """Factored by mbf_kernels, which serve up to 128 vectors."""
    sizes = []

    def counted(blocks, **options):
        sizes.append(blocks.size)
        return factor(blocks, **options)

    monkeypatch.setattr(two_level, "factor", counted)
    model, inputs = made("mixed")
    stepped(model, inputs, coarse=coarse)
    assert sizes == [vectors * len(affine_layers(model))]


def test_layers_with_other_samples_stay_with_kfac():
    """A layer that sees the rows of a batch as samples has no scalar with the others."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.last = nn.Linear(4, 3), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(torch.tanh(self.rows(x.flatten(0, 1))).view(len(x), -1))

    torch.manual_seed(0)
    model, inputs = Net().double(), randn(5, 2, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    for net, optimizer in ((model, TwoLevelKFAC(model, **PLAIN)), (twin, KFAC(twin, **PLAIN))):
        loss_of(net(inputs)).mean().backward()
        optimizer.step()
    assert_bitwise(model.last.weight, twin.last.weight)
    assert not torch.equal(model.rows.weight, twin.rows.weight)


@pytest.mark.parametrize("options", [dict(form="additive"), *[dict(coarse=coarse) for coarse in SPACES]], ids=str)
def test_nothing_is_kept_for_longer_than_it_holds(options):
    """Once damping, statistics or the whole state are others, a step is that of an optimizer without a past."""
    model, inputs = made("mixed")
    optimizer = TwoLevelKFAC(model, lr=1e-3, update_interval=4, factor_interval=2, **options)
    first = copy.deepcopy(optimizer.state_dict())
    for t in range(8):
        twin = copy.deepcopy(model)
        fresh = TwoLevelKFAC(twin, **options)
        if t == 3:
            optimizer.param_groups[0]["damping"] *= 2
        if t == 6:
            optimizer.load_state_dict(first)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for net, opt in ((model, optimizer), (twin, fresh)):
            opt.zero_grad()
            loss_of(net(inputs * (1 + t))).mean().backward()
            opt.step()
        first = copy.deepcopy(fresh.state_dict()) if t == 0 else first
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("bad", [dict(form="both"), dict(coarse="fine"), dict(weight=-1.0), dict(lr=-1.0)], ids=str)
def test_bad_options_are_refused(bad):
    with pytest.raises(ValueError, match=f"^TwoLevelKFAC: expected {next(iter(bad))} "):
        TwoLevelKFAC(nn.Linear(2, 2), **bad)


# ---- spaces that are not of full rank, and layers that do not belong together


class Branches(nn.Module):
    """A layer whose result does not count: its gradients are zero, and so is its part of residuals."""

    def __init__(self):
        super().__init__()
        self.first, self.dead, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) + 0 * self.dead(x))


@over_spaces
def test_a_dead_layer_leaves_the_others_their_correction(coarse):
    """The error falls by as much as without it: in its own part there is nothing to gain."""
    torch.manual_seed(0)
    model, inputs = Branches().double(), randn(8, 4, dtype=torch.float64)
    alive = nn.Sequential(copy.deepcopy(model.first), nn.Tanh(), copy.deepcopy(model.last))
    changes = []
    for net in (model, alive):
        _, optimizer = stepped(net, inputs, coarse=coarse)
        changes.append(optimizer.energy_change)
    assert changes[0] < -1e-5
    torch.testing.assert_close(*changes, rtol=1e-9, atol=0)


def test_vectors_that_depend_on_each_other():
    """Outputs whose gradients add up to zero: G 1 = 0, so that with exact damping K-FAC^-1 1 = 1 / lambda in the last
    layer. Then F_c is singular, and beta not unique; the error is."""

    def loss(outputs):
        return outputs[:, 0].sin() - outputs[:, 0].square() + (outputs[:, 1] - outputs[:, 0]).square()

    def differences(outputs):  # adding the same to all outputs changes nothing
        return loss(outputs - outputs[:, 2:])

    torch.manual_seed(0)
    model, inputs = (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double(),
        randn(8, 4, dtype=torch.float64),
    )
    layers = affine_layers(model)
    own = [own_gradients(model, layer, inputs, differences) for layer in layers]
    columns = torch.stack([flat([part[n] for part in own]) for n in range(8)], 1)
    fisher = columns @ columns.T / 8 + DAMPING * torch.eye(len(columns)).double()
    gradient = columns.mean(1)
    optimizer = TwoLevelKFAC(model, damping=DAMPING, coarse="krylov", damping_form="exact", **PLAIN)
    differences(model(inputs)).mean().backward()
    optimizer.step()
    blocks = [
        torch.kron(optimizer.state[layer.weight]["A"][0], optimizer.state[layer.weight]["G"][0]) for layer in layers
    ]
    blocks = [block + DAMPING * torch.eye(len(block)).double() for block in blocks]
    ones = [torch.ones(len(block)).double() for block in blocks]
    spans = [torch.stack([one, torch.linalg.solve(block, one)], 1) for block, one in zip(blocks, ones, strict=True)]
    space = torch.block_diag(*spans).T
    zeta = torch.linalg.solve(torch.block_diag(*blocks), gradient)
    rest = space @ (gradient - fisher @ zeta)
    matrix = space @ fisher @ space.T
    assert torch.linalg.cond(matrix) > 1e12
    expected = -rest @ torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True) @ rest
    assert expected < -1e-4
    torch.testing.assert_close(optimizer.energy_change, expected, rtol=1e-6, atol=0)


def test_layers_of_one_batch_only_are_looked_at_together():
    """One layer's statistics are updated at every step, the other's at every second one: between them it is alone."""
    model, inputs = made("linear")
    groups = [
        {"params": model[0].parameters(), "update_interval": 1, "factor_interval": 1},
        {"params": [*model[2].parameters(), *model[4].parameters()], "update_interval": 2, "factor_interval": 2},
    ]
    optimizer = TwoLevelKFAC(model, groups=groups, lr=1e-3)
    together = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(inputs)).mean().backward()
        optimizer.step()
        together.append([layer.name for layer in optimizer._together(dict.fromkeys(optimizer._layers))])
    assert together == [["0", "2", "4"], ["0"], ["0", "2", "4"]]


def test_the_energy_is_that_of_the_last_step():
    model, inputs = made("linear")
    _, optimizer = stepped(model, inputs)
    assert optimizer.energy_change < 0
    optimizer.param_groups[0]["weight"] = 0.0
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    assert optimizer.energy_change is None


def test_covariances_between_many_layers_are_those_of_pairs():
    """Of layers with several groups and locations, pooled to the fewer of both."""
    shapes = (6, 1), (2, 3), (6, 2), (1, 1)  # locations, groups
    sums = [
        [randn(5, *shape, dtype=torch.float64, seed=seed + 10 * i) for seed in (1, 2)] for i, shape in enumerate(shapes)
    ]
    matrix = coarse_matrix(covariances(sums), [groups for _, groups in shapes])
    for i, one in enumerate(sums):
        for j, other in enumerate(sums):
            t = min(one[0].shape[1], other[0].shape[1])
            parts = [[x.unflatten(1, (t, -1)).mean(2) for x in layer] for layer in (one, other)]
            expected = 0.0
            for g in range(parts[0][0].shape[2]):
                for h in range(parts[1][0].shape[2]):
                    a, s = ((parts[0][k][..., g] * parts[1][k][..., h]).sum() for k in (0, 1))
                    expected = expected + a * s / (25 * t)
            torch.testing.assert_close(matrix[i, j], torch.as_tensor(expected).double(), rtol=1e-12, atol=1e-12)


def test_the_additive_forms_covariances_are_averaged():
    """As A and G are; once for every update, whatever else changes."""
    model, _ = made("linear")
    optimizer = TwoLevelKFAC(model, form="additive", lr=0.0, update_interval=2, decay=0.6)
    average = None
    for t in range(7):
        optimizer.zero_grad()
        loss_of(model(randn(8, 4, dtype=torch.float64, seed=t))).mean().backward()
        optimizer.param_groups[0]["damping"] *= 1.1
        optimizer.step()
        if t % 2 == 0:
            new = covariances([[optimizer.state[layer.weight][name] for name in SUMS] for layer in optimizer._layers])
            keep = min(1 - 1 / (t // 2 + 1), 0.6)
            average = new if average is None else keep * average + (1 - keep) * new
        state = optimizer.state[model[0].weight]
        torch.testing.assert_close(state["covariances"], average, rtol=1e-12, atol=1e-12)
        assert not any(name.startswith("sample_") for name in state)  # what the other form needs


@pytest.mark.parametrize("own", [dict(form="additive"), dict(coarse="residual"), dict(coarse="nicolaides")], ids=str)
def test_a_resumed_run_has_the_same_bits(own):
    def train(model, optimizer, first, steps):
        for t in range(first, first + steps):
            optimizer.zero_grad()
            loss_of(model(randn(8, 4, dtype=torch.float64, seed=t))).mean().backward()
            optimizer.step()

    model, _ = made("linear")
    other, _ = made("linear")
    options = dict(update_interval=2, factor_interval=4, **own)
    optimizer, resumed = TwoLevelKFAC(model, **options), TwoLevelKFAC(other, **options)
    train(model, optimizer, 0, 6)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, 6, 5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(a, b)
