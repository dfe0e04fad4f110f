"""The KPSVD family against dense definitions: the SVD of an explicitly rearranged Fisher matrix, and dense solves."""

import copy
import math

import pytest
import torch
from mbf_optim import KPSVD
from mbf_optim.affine import Rows, affine_layers
from mbf_optim.kpsvd import METHODS
from mbf_optim.rearranged import Pair, Rearranged
from mbf_optim.singular_pairs import top_pair, two_pairs
from mbf_optim.symmetric import Matrices, Samples
from test_kfac import NETWORKS, PLAIN, loss_of, network_of, vec
from torch import nn

from mbf_kernels.testing import assert_bitwise, randn

TIGHT = dict(tolerance=0.0)  # then 100 eps


def rows_of(samples, locations, groups=1, p=4, q=3, seed=0):
    """Of which F is far from one product: gradients grow with inputs."""
    a = randn(samples, locations, groups, p, dtype=torch.float64, seed=seed)
    g = randn(samples, locations, groups, q, dtype=torch.float64, seed=seed + 1) * (1 + a[..., :1] ** 2)
    return Rows(a, g, locations)


def dense_fisher(rows, group=0):
    """(1/m) sum_n vec(dW_n) vec(dW_n)^T."""
    gradients = torch.einsum("mtq,mtp->mqp", rows.gradients[:, :, group], rows.inputs[:, :, group])
    vectors = torch.stack([vec(gradient) for gradient in gradients])
    return vectors.T @ vectors / len(vectors)


def dense_rearranged(fisher, p, q):
    """[p^2, q^2]: what maps R (x) S to vec(R) vec(S)^T."""
    return fisher.view(p, q, p, q).permute(0, 2, 1, 3).reshape(p * p, q * q)


def symmetric_part(matrix, p, q):
    """Of a rearranged matrix what maps symmetric matrices to symmetric ones: pairs of locations add products of
    antisymmetric matrices to F, which have no inverse of their own."""
    for n, side in ((p, 0), (q, 1)):
        swap = torch.arange(n * n).view(n, n).T.flatten()
        matrix = (matrix + matrix.index_select(side, swap)) / 2
    return matrix


def dense(pair, group=0):
    return torch.kron(pair.left[group], pair.right[group])


def relative_error(rows, pairs):
    fisher = dense_fisher(rows)
    return ((fisher - sum(dense(pair) for pair in pairs)).norm() / fisher.norm()).item()


CASES = {  # samples, locations, groups; the spaces that p = 4 and q = 3 give
    "matrices": ((40, 1, 1), (Matrices, Matrices)),
    "locations": ((12, 5, 1), (Matrices, Matrices)),
    "groups": ((12, 3, 2), (Matrices, Matrices)),
    "both": ((10, 1, 1), (Samples, Matrices)),
    "samples": ((5, 1, 1), (Samples, Samples)),
    "more samples than dimensions": ((8, 1, 1), (Samples, Samples)),
    "samples of groups": ((7, 1, 2), (Samples, Samples)),
}
over_cases = pytest.mark.parametrize("case", CASES)


def rearranged(case):
    torch.manual_seed(0)
    shape, spaces = CASES[case]
    rows = rows_of(*shape)
    z = Rearranged(rows, 4)
    assert (type(z.left), type(z.right)) == spaces
    return rows, z


@over_cases
def test_vectors(case):
    """Products with Z and with Z less a pair, and lengths and angles, against those of matrices."""
    rows, z = rearranged(case)
    starts = [x + x.mT for x in (randn(rows.inputs.shape[2], 3, 3, dtype=torch.float64, seed=seed) for seed in (8, 9))]
    for deflated, operator in enumerate((z, z.less(z.means()))):
        images = [operator.times(z.right.vector(start)) for start in starts]
        backs = [operator.transposed_times(image) for image in images]
        (left, right), (other, _) = (z.matrices(Pair(u, v)) for u, v in zip(images, backs, strict=True))
        close((images[0] * images[1]).sum((1, 2)), (left * other).sum((1, 2)))
        close(backs[0].flatten(1).norm(dim=1), right.flatten(1).norm(dim=1))
        for group in range(len(right)):
            fisher = dense_fisher(rows, group) - deflated * torch.kron(*(x[0] for x in kfac_pair(rows, group)))
            matrix = symmetric_part(dense_rearranged(fisher, 4, 3), 4, 3)
            close(left[group].flatten(), matrix @ starts[0][group].flatten())
            close(right[group].flatten(), matrix.T @ left[group].flatten())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_products_do_not_depend_on_how_samples_are_split(monkeypatch):
    rows = rows_of(12, 5)
    right = torch.eye(3, dtype=torch.float64)[None]
    whole = Rearranged(rows, 4).times(right)
    monkeypatch.setattr("mbf_optim.symmetric.CHUNK", 60)  # two samples at a time
    torch.testing.assert_close(Rearranged(rows, 4).times(right), whole, rtol=1e-13, atol=1e-13)


@over_cases
def test_singular_pairs_are_those_of_the_dense_matrix(case):
    """The two largest of Z, and the largest of Z less K-FAC's pair."""
    rows, z = rearranged(case)
    first, sigma = top_pair(z, z.right.random(), 1e-14, 2000)
    second, _ = top_pair(z.less(first), z.right.random(), 1e-14, 2000, sigma)
    correction, _ = top_pair(z.less(z.means()), z.right.random(), 1e-14, 2000, sigma)
    pairs = [z.matrices(pair) for pair in (first, second, *two_pairs(z, z.right.random(), 1e-14, 200, 8), correction)]
    for group in range(rows.inputs.shape[2]):
        fisher = dense_fisher(rows, group)
        both, rest = (
            torch.linalg.svd(symmetric_part(dense_rearranged(matrix, 4, 3), 4, 3))
            for matrix in (fisher, fisher - torch.kron(*(x[0] for x in kfac_pair(rows, group))))
        )
        for pair, i, (u, s, vt) in zip(pairs, (0, 1, 0, 1, 0), (both, both, both, both, rest), strict=True):
            product = torch.outer(pair.left[group].flatten(), pair.right[group].flatten())
            torch.testing.assert_close(product, s[i] * torch.outer(u[:, i], vt[i]), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(pair.left[group].norm() ** 2, s[i])
    for matrix in pairs[0]:
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_samples_and_matrices_agree_in_float32(method, spread, monkeypatch):
    """Also where inputs differ by a hundredth, so that the second pair comes of vectors that nearly cancel."""
    rows = rows_of(30, 1, p=8, q=6)
    rows = Rows(1 + spread * rows.inputs, rows.gradients, 1)
    fisher = dense_fisher(rows)
    optimizer = KPSVD(nn.Linear(8, 6, bias=False), method=method, **TIGHT)
    products = {}
    for name, dtype, limit in (
        ("truth", torch.float64, 0),
        ("matrices", torch.float32, 0),
        ("samples", torch.float32, 9),
    ):
        torch.manual_seed(0)
        monkeypatch.setitem(METHODS, method, limit)
        pairs = optimizer._pairs(Rows(*(part.to(dtype) for part in rows[:2]), 1), {}, optimizer.param_groups[0])
        products[name] = [dense(pair).double() for pair in pairs]
    for name in ("matrices", "samples"):
        for product, truth in zip(products[name], products["truth"], strict=True):
            error = (product - truth).norm() / fisher.norm()
            assert error < 1e-4, (name, error)


@pytest.mark.parametrize("iterations", [0, 9])
def test_large_matrices_in_float32(iterations, monkeypatch):
    """Sums over half a million elements of very different sizes keep their digits: Lanczos' method ends at once."""
    torch.manual_seed(0)
    rows = Rows(torch.randn(60, 1, 1, 700).relu() * torch.logspace(0, -3, 700), torch.rand(60, 1, 1, 20), 1)
    a, g = (part[:, 0, 0].double() for part in rows[:2])
    sigma = torch.linalg.eigvals((a @ a.T).square() @ (g @ g.T).square()).real.max().sqrt().item() / 60
    z, products = Rearranged(rows, iterations), []
    monkeypatch.setattr(Rearranged, "times", lambda z, v, times=Rearranged.times: products.append(1) or times(z, v))
    _, found = top_pair(z, z.right.random(), 1e-6, 50)
    assert found.item() == pytest.approx(sigma, rel=1e-6)
    products.clear()
    first, _ = two_pairs(z, z.right.random(), 1e-5, 50, 8)
    assert first.left.square().sum().item() == pytest.approx(sigma, rel=1e-6) and len(products) <= 16


def test_singular_values_from_gram_matrices():
    """sqrt(eig((a a^T)^o2 (g g^T)^o2)) / m, another way to the same numbers."""
    torch.manual_seed(0)
    rows = rows_of(9, 1)
    a, g = rows.inputs[:, 0, 0], rows.gradients[:, 0, 0]
    product = (a @ a.T).square() @ (g @ g.T).square()
    expected = torch.linalg.eigvals(product).real.clamp_min(0).sqrt().max() / 9
    z = Rearranged(rows, 4)
    _, sigma = top_pair(z, z.right.random(), 1e-14, 2000)
    torch.testing.assert_close(sigma.squeeze(), expected)


class Watched(KPSVD):
    """Keeps the rows and pairs of every refresh."""

    def _pairs(self, rows, state, group):
        pairs = super()._pairs(rows, state, group)
        self.seen = [*getattr(self, "seen", []), (rows, pairs)]
        return pairs


@pytest.mark.parametrize("network", ["linear", "sequences", "mixed"])
def test_errors_are_ordered_at_every_refresh(network):
    """err(deflation) = err(lanczos) = tail of the SVD over symmetric matrices <= err(kpsvd) <= err(K-FAC);
    err(deflation) <= err(corrected) <= err(K-FAC), and the corrected one squared is K-FAC's less sigma^2."""
    model, inputs = network_of(network)
    errors = {}
    for method in METHODS:
        torch.manual_seed(1)
        optimizer = Watched(model, method=method, **TIGHT, **PLAIN | dict(lr=0.0))
        for t in range(3):
            optimizer.zero_grad()
            loss_of(model(inputs * (1 + 0.1 * t))).mean().backward()
            optimizer.step()
        errors[method] = [relative_error(rows, pairs) for rows, pairs in optimizer.seen]
        errors["kfac"] = [relative_error(rows, [kfac_pair(rows)]) for rows, _ in optimizer.seen]
        seen = optimizer.seen
    small = 1e-7  # errors whose squares are at rounding
    for i, (rows, _) in enumerate(seen):
        p, q = rows.inputs.shape[3], rows.gradients.shape[3]
        fisher = dense_fisher(rows)
        s = torch.linalg.svdvals(symmetric_part(dense_rearranged(fisher, p, q), p, q)) / fisher.norm()
        tails = [(1 - s[:k].square().sum()).clamp_min(0).sqrt().item() for k in (1, 2)]
        at = {name: values[i] for name, values in errors.items()}
        assert at["kpsvd"] == pytest.approx(tails[0], rel=1e-6, abs=small)
        assert at["deflation"] == pytest.approx(tails[1], rel=1e-6, abs=small)
        assert at["lanczos"] == pytest.approx(tails[1], rel=1e-6, abs=small)
        assert at["kpsvd"] <= at["kfac"] + small
        assert at["deflation"] - small <= at["kfac_corrected"] <= at["kfac"] + small
        residual = dense_rearranged(fisher - dense(kfac_pair(rows)), p, q)
        largest = torch.linalg.svdvals(symmetric_part(residual, p, q))[0].item() / fisher.norm().item()
        assert at["kfac_corrected"] ** 2 == pytest.approx(at["kfac"] ** 2 - largest**2, rel=1e-6, abs=small)


def kfac_pair(rows, group=0):
    a, g = rows.inputs[:, :, group].flatten(0, 1), rows.gradients[:, :, group].flatten(0, 1)
    return Pair((a.T @ a / len(rows.inputs))[None], (g.T @ g / len(g))[None])


@pytest.mark.parametrize("square, values", [(1.0, (0.5, 0.5)), (3.0, (1.5, 0.5))])
def test_two_clusters(square, values):
    """Orthogonal inputs with orthogonal gradients: two products are exact, K-FAC's relative error is 1/sqrt(2)."""
    torch.manual_seed(0)
    eye = torch.eye(2, dtype=torch.float64)
    gradients = eye * torch.tensor([math.sqrt(square), 1.0], dtype=torch.float64)[:, None]
    rows = Rows(eye.view(2, 1, 1, 2), gradients.view(2, 1, 1, 2), 1)
    torch.testing.assert_close(
        torch.linalg.svdvals(dense_rearranged(dense_fisher(rows), 2, 2))[:2], torch.tensor(values, dtype=torch.float64)
    )
    optimizer = KPSVD(nn.Linear(2, 2, bias=False).double(), **TIGHT)
    group = optimizer.param_groups[0]
    assert relative_error(rows, [kfac_pair(rows)]) == pytest.approx(0.5**0.5)
    for method in ("deflation", "lanczos", "kfac_corrected"):
        assert relative_error(rows, optimizer._pairs(rows, {}, group | dict(method=method))) < 1e-12
    alone = relative_error(rows, optimizer._pairs(rows, {}, group | dict(method="kpsvd")))
    assert alone == pytest.approx(values[1] / math.hypot(*values))


@pytest.mark.parametrize("p, q", [(4, 3), (1, 3), (4, 1), (1, 1)])
def test_one_sample_is_one_product(p, q):
    """The second is zero, whatever the method, and K-FAC is exact."""
    torch.manual_seed(0)
    rows = rows_of(1, 1, p=p, q=q)
    optimizer = KPSVD(nn.Linear(p, q, bias=False).double(), **TIGHT)
    for method in METHODS:
        pairs = optimizer._pairs(rows, {}, optimizer.param_groups[0] | dict(method=method))
        assert relative_error(rows, pairs) < 1e-12 and relative_error(rows, pairs[:1]) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("samples, locations", [(3, 1), (30, 1), (3, 2)])
@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_without_gradients_all_is_zero(method, samples, locations, size):
    """In one group; the other one has its product."""
    torch.manual_seed(0)
    rows = rows_of(samples, locations, groups=2)
    rows = Rows(*(part.float() for part in rows[:2]), locations)
    rows.gradients[:, :, 0] = size
    optimizer = KPSVD(nn.Linear(4, 3, bias=False).double(), method=method, **TIGHT)
    pairs = optimizer._pairs(rows, {}, optimizer.param_groups[0])
    assert all(bool(part.isfinite().all()) for pair in pairs for part in pair)
    assert all(not dense(pair).any() for pair in pairs)
    assert dense(pairs[0], 1).any()


def test_deep_linear_networks_are_one_product():
    """Half the squared error, all residuals equally likely: F = A (x) G, so K-FAC, KPSVD and F agree."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)).double()
    inputs = randn(7, 4, dtype=torch.float64).repeat_interleave(2, 0)  # each with both residuals

    def residual(outputs):
        return math.sqrt(2) * torch.eye(2, dtype=outputs.dtype).repeat(7, 1)

    for method in METHODS:
        optimizer = Watched(model, method=method, distribution=residual, **TIGHT, **PLAIN | dict(lr=0.0))
        loss_of(model(inputs)).mean().backward()
        optimizer.step()
        for rows, pairs in optimizer.seen:
            assert relative_error(rows, [kfac_pair(rows)]) < 1e-7 and relative_error(rows, pairs) < 1e-7


# ---- directions


def dense_direction(pairs, gradient, damping, inverse):
    """One product: sqrt(lambda) on both; two: lambda on both of the first."""
    damped = [m + (damping if len(pairs) > 1 else math.sqrt(damping)) * torch.eye(len(m)).double() for m in pairs[0]]
    matrix = torch.kron(*damped)
    if len(pairs) > 1 and inverse == "signed":
        matrix = matrix + torch.kron(*pairs[1])
    if len(pairs) > 1 and inverse == "absolute":  # |.| of the second in the metric of the first
        roots = [power(m, 0.5) for m in damped]
        whitened = [absolute(power(m, -0.5) @ x @ power(m, -0.5)) for m, x in zip(damped, pairs[1], strict=True)]
        matrix = matrix + torch.kron(*[root @ x @ root for root, x in zip(roots, whitened, strict=True)])
    return torch.linalg.solve(matrix, vec(gradient)).view(gradient.mT.shape).mT, matrix


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def absolute(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.abs() @ vectors.T


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("inverse", ["signed", "absolute"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_dense_one(network, method, inverse):
    torch.manual_seed(0)
    model, inputs = network_of(network)
    before = [param.detach().clone() for param in model.parameters()]
    damping = 3.0  # so that 1 + s2 s1 stays above the floor
    optimizer = KPSVD(model, method=method, damping=damping, inverse=inverse, floor=1e-6, **TIGHT, **PLAIN)
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    old = iter(before)
    for layer in affine_layers(model):
        state = optimizer.state[layer.weight]
        gradient = layer.joined(*[param.grad for param in layer.params])
        moved = layer.joined(*[param.detach() - next(old) for param in layer.params]) / -0.1
        for group in range(layer.groups):
            names = [("R", "S"), ("R2", "S2")][: 1 if method == "kpsvd" else 2]
            pairs = [[state[name][group] for name in both] for both in names]
            expected, matrix = dense_direction(pairs, gradient[group], damping, inverse)
            assert torch.linalg.eigvalsh(matrix).min() > 0
            torch.testing.assert_close(moved[group], expected, rtol=1e-9, atol=1e-9)


def test_the_floor_bounds_the_step():
    """Where both products nearly cancel the signed inverse is bounded by that of the first over the floor."""
    model = nn.Linear(2, 2, bias=False).double()
    optimizer = KPSVD(model, method="deflation", damping=1e-3, floor=0.25, **PLAIN)
    eye, turn = torch.eye(2).double()[None], torch.tensor([[1.0, 0.0], [0.0, -1.0]]).double()[None]
    optimizer.state[model.weight] |= {"R": eye, "S": eye, "R2": turn, "S2": turn}
    (layer,) = optimizer._layers
    optimizer._refresh([layer], {id(layer): optimizer.param_groups[0]})
    direction = optimizer._direction(layer, torch.ones(1, 2, 2).double(), optimizer.param_groups[0])
    # 1 + s2 s1 is 1 +- 1/1.001^2: where the signs agree about 2, elsewhere about 0.002, which the floor lifts
    base, same = 1.001**-2, 1 / (1 + 1.001**-2)
    expected = torch.tensor([[same, 4.0], [4.0, same]]).double() * base
    torch.testing.assert_close(direction[0], expected)


def test_averages_do_not_cancel():
    """The second product has no sign of its own: it is turned to agree with the average."""
    torch.manual_seed(0)
    model, inputs = network_of("linear")
    optimizer = KPSVD(model, method="kfac_corrected", decay=0.5, **TIGHT, **PLAIN | dict(lr=0.0))
    lengths = []
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model(inputs)).mean().backward()
        optimizer.step()
        lengths.append(optimizer.state[model[0].weight]["R2"].norm().item())
        optimizer.state[model[0].weight]["S2"].neg_()  # a start that leads to the other sign
        optimizer.state[model[0].weight]["R2"].neg_()
    assert lengths == pytest.approx([lengths[0]] * 6, rel=1e-8)


# ---- as an optimizer


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_the_same_bits(method):
    def train(model, optimizer, first, steps):
        for t in range(first, first + steps):
            optimizer.zero_grad()
            loss_of(model(randn(6, 4, dtype=torch.float64, seed=t))).mean().backward()
            optimizer.step()

    options = dict(method=method, update_interval=2, factor_interval=4)
    torch.manual_seed(0)
    model, _ = network_of("linear")
    optimizer = KPSVD(model, **options)
    train(model, optimizer, 0, 5)
    other, _ = network_of("linear", seed=1)
    resumed = KPSVD(other, **options)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, 5, 6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(a, b)


def test_the_method_may_change():
    model, inputs = network_of("mixed")
    optimizer = KPSVD(model, **PLAIN)
    for method in (*METHODS, *reversed(METHODS)):
        optimizer.param_groups[0]["method"] = method
        optimizer.zero_grad()
        loss_of(model(inputs)).mean().backward()
        optimizer.step()
        rows = [row for row in optimizer.report() if row.structure != "gradient"]
        assert all(row.structure.startswith("1 x" if method == "kpsvd" else "2 x") for row in rows)
        assert all(param.isfinite().all() for param in model.parameters())


def test_statistics_that_are_not_finite_are_skipped():
    model, inputs = network_of("linear")
    optimizer = KPSVD(model, method="deflation", **PLAIN)
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    kept = {name: value.clone() for name, value in optimizer.state[model[0].weight].items() if name in ("R", "S2")}
    optimizer.zero_grad()
    (model(inputs).sum() * float("nan")).backward()
    for param in model.parameters():
        param.grad.zero_()
    optimizer.step()
    assert all(torch.equal(optimizer.state[model[0].weight][name], value) for name, value in kept.items())
    assert [row.skipped for row in optimizer.report()] == [1, 1]


BAD = {"method": "svd", "inverse": "both", "floor": 0.0, "tolerance": float("nan"), "damping": 0.0, "decay": 2.0}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    with pytest.raises(ValueError, match=f"^KPSVD: expected {name} "):
        KPSVD(nn.Linear(2, 2), **{name: BAD[name]})


# ---- what a warm start could miss


@pytest.mark.parametrize("method", METHODS)
def test_curvature_comes_back_after_a_batch_without(method):
    """A head of zeros at first: no gradient reaches the layer before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    nn.init.zeros_(model[2].weight)
    optimizer = KPSVD(model, lr=0.1, method=method, update_interval=1, factor_interval=1, kl_clip=None)
    for t in range(10):
        optimizer.zero_grad()
        outputs = model(randn(16, 5, dtype=torch.float64, seed=t))
        nn.functional.cross_entropy(outputs, torch.arange(16) % 3).backward()
        optimizer.step()
    state = optimizer.state[model[0].weight]
    assert all(state[name].norm() > 1e-4 for name in ("R", "S", "R2", "S2") if name in state)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_had_no_gradient_before_are_found(method):
    """All on one output at first, then all on the other: the start is orthogonal to what there is."""
    model = nn.Linear(4, 2, bias=False).double()
    optimizer = KPSVD(model, lr=0.0, method=method, update_interval=1, decay=0.0)
    for t in range(3):
        optimizer.zero_grad()
        outputs = model(randn(8, 4, dtype=torch.float64, seed=t))
        (outputs[:, 1 if t else 0] * randn(8, dtype=torch.float64, seed=t)).mean().backward()
        optimizer.step()
    curvature = optimizer.state[model.weight]["S"][0].diagonal()
    assert curvature[1] > 0.1 and curvature[0].abs() < 1e-4 * curvature[1]


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e7])
def test_lanczos_at_any_scale(scale):
    """In float32, whose squares of squares of 1e-10 and 1e10 are out of range."""
    rows = Rows(randn(64, 1, 1, 20, dtype=torch.float32), scale * randn(64, 1, 1, 10, dtype=torch.float32, seed=1), 1)
    z = Rearranged(rows, 4)
    products = []
    times = z.times
    z.times = lambda v: products.append(v) or times(v)
    pairs = two_pairs(z, z.right.random(), 1e-3, 100, 8)
    exact = Rearranged(Rows(rows.inputs.double(), rows.gradients.double() / scale, 1), 4)
    first, sigma = top_pair(exact, exact.right.random(), 1e-10, 2000)
    _, second = top_pair(exact.less(first), exact.right.random(), 1e-10, 2000, sigma)
    for pair, expected in zip(pairs, (sigma, second), strict=True):
        actual = (pair.left.double().norm() * pair.right.double().norm()) / scale**2
        assert abs(actual - expected.item()) <= 2e-3 * sigma.item()
    assert len(products) < 100


def test_the_method_of_a_group_may_change():
    """Averages start anew: K-FAC's A and G are not the factors of a singular pair."""
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())

    def step(model, optimizer, t):
        optimizer.zero_grad()
        model(randn(16, 5, dtype=torch.float64, seed=t)).sin().sum(1).mean().backward()
        optimizer.step()

    optimizer = KPSVD(model, lr=0.0, momentum=0.0, method="kfac_corrected", damping=0.1)
    for t in range(30):
        step(model, optimizer, t)
    optimizer.param_groups[0] |= {"method": "kpsvd", "lr": 0.1}
    step(model, optimizer, 30)
    fresh = KPSVD(twin, lr=0.1, momentum=0.0, method="kpsvd", damping=0.1)
    step(twin, fresh, 30)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert optimizer.state[model[0].weight].keys() == fresh.state[twin[0].weight].keys()


def test_the_default_damping_is_that_of_a_groups_method():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "method": "lanczos"}]
    assert [group["damping"] for group in KPSVD(model, groups=groups).param_groups] == [1e-2, 1e-1]
