"""A bad block hurts only itself: it keeps its state, its solution is zero, info tells, its neighbours
keep every bit."""

import pytest
import torch

from mbf_kernels import (
    SymmetricBlocks,
    accumulate_,
    accumulate_factor_solve_,
    factor,
    mbf_shared_step_,
    mbf_step_,
    solve,
)
from mbf_kernels.testing import assert_bitwise, assert_padding_zero, randn, spd_blocks

COUNT = 37  # more than a tile, not a multiple of any lane count
BAD = (0, 5, 31, 32, 36)  # both ends, and both sides of the tile's edge
SIZES = (1, 4, 9, 20, 21, 33, 64, 129)
DTYPES = (torch.float32, torch.float64)
GOOD = [b for b in range(COUNT) if b not in BAD]
STEP = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.5, weight_decay=0.1)

over_sizes = pytest.mark.parametrize("size", SIZES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_poisons = pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)


def fishers(size, dtype, device):
    return SymmetricBlocks.from_dense(spd_blocks("well", COUNT, size, dtype, device))


def vectors(size, dtype, device, seed):
    return randn(COUNT, size, dtype=dtype, device=device, seed=seed)


def poisoned(blocks, element, value):
    """The blocks with one diagonal element of the BAD ones replaced."""
    dense = blocks.to_dense()
    dense[list(BAD), element, element] = value
    row, column = torch.tril_indices(blocks.size, blocks.size)
    return SymmetricBlocks.from_packed(dense[:, row, column])


@over_sizes
@over_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -5.0], ids=str)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_factor(backend, device, size, dtype, value, where):
    """info counts to the first pivot that is not positive and finite, as LAPACK does; L and x are zero."""
    element = {"first": 0, "middle": size // 2, "last": size - 1}[where]
    f = fishers(size, dtype, device)
    good, _ = factor(f, damping=0.1)
    lower, info = factor(poisoned(f, element, value), damping=0.1)
    expected = torch.zeros(COUNT, dtype=torch.int32, device=device)
    expected[list(BAD)] = element + 1
    assert_bitwise(info, expected)
    assert not lower.to_dense()[list(BAD)].any()
    assert_padding_zero(lower)
    rhs = vectors(size, dtype, device, 1)
    x = solve(lower, rhs)
    assert not x[list(BAD)].any() and not solve(lower, rhs[..., None])[list(BAD)].any()
    if backend != "reference":
        assert_bitwise(lower.to_dense()[GOOD], good.to_dense()[GOOD])
        assert_bitwise(x[GOOD], solve(good, rhs)[GOOD])


@over_dtypes
def test_zero_and_indefinite_blocks_without_damping(backend, device, dtype):
    dense = torch.stack([torch.zeros(3, 3), torch.eye(3), torch.tensor([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])]).to(
        device, dtype
    )
    lower, info = factor(SymmetricBlocks.from_dense(dense), damping=0.0)
    assert info.tolist() == [1, 0, 2]
    assert not lower.to_dense()[[0, 2]].any()
    if backend == "reference":  # some BLAS's zeros are negative
        assert torch.equal(lower.to_dense()[1], dense[1])
    else:
        assert_bitwise(lower.to_dense()[1], dense[1])


@over_sizes
@over_dtypes
@over_poisons
@pytest.mark.parametrize("samples", [None, 2])
def test_accumulate(backend, device, size, dtype, poison, samples):
    """A gradient that is not finite leaves its F as it was."""
    g = randn(*(() if samples is None else (samples,)), COUNT, size, dtype=dtype, device=device)
    bad = g.clone()
    bad[..., list(BAD), size // 2] = poison
    f, expected = fishers(size, dtype, device), fishers(size, dtype, device)
    before = f.to_dense()
    accumulate_(f, bad, decay=0.9)
    accumulate_(expected, g, decay=0.9)
    assert_bitwise(f.to_dense()[list(BAD)], before[list(BAD)])
    if backend != "reference":
        assert_bitwise(f.to_dense()[GOOD], expected.to_dense()[GOOD])
    assert f.to_dense()[GOOD].isfinite().all() and not (f.to_dense()[GOOD] == before[GOOD]).all(-1).all(-1).any()
    assert_padding_zero(f)


@over_dtypes
def test_a_square_that_overflows_is_bad(backend, device, dtype):
    g, f = vectors(9, dtype, device, 1), fishers(9, dtype, device)
    g[5, 3] = torch.finfo(dtype).max / 2
    before = f.to_dense()
    x, info = accumulate_factor_solve_(f, g, torch.ones_like(g), decay=0.9, damping=0.1)
    assert info.nonzero().tolist() == [[5]] and info[5] == 4
    assert_bitwise(f.to_dense()[5], before[5])
    accumulate_(f, g, decay=0.9)
    assert_bitwise(f.to_dense()[5], before[5])
    assert not x[5].any() and f.to_dense().isfinite().all()


@over_sizes
@over_dtypes
@over_poisons
@pytest.mark.parametrize("culprit", ["g", "rhs"])
def test_fused(backend, device, size, dtype, poison, culprit):
    element = size // 2
    good = {"g": vectors(size, dtype, device, 1), "rhs": vectors(size, dtype, device, 2)}
    bad = {name: t.clone() for name, t in good.items()}
    bad[culprit][list(BAD), element] = poison
    f, expected_f = fishers(size, dtype, device), fishers(size, dtype, device)
    before = f.to_dense()
    x, info = accumulate_factor_solve_(f, **bad, decay=0.9, damping=0.5)
    expected_x, _ = accumulate_factor_solve_(expected_f, **good, decay=0.9, damping=0.5)
    assert info[list(BAD)].tolist() == [element + 1] * len(BAD) and not info[GOOD].any()
    assert_bitwise(f.to_dense()[list(BAD)], before[list(BAD)])
    assert not x[list(BAD)].any() and x.isfinite().all()
    if backend != "reference":
        assert_bitwise(x[GOOD], expected_x[GOOD])
        assert_bitwise(f.to_dense()[GOOD], expected_f.to_dense()[GOOD])
    assert_padding_zero(f)


def step(size, dtype, device, culprit=None, poison=None, element=0, **options):
    """One mbf_step_ of three tensors, bad blocks in the middle one: before, after, info, skipped."""
    tensors = {
        name: [vectors(size, dtype, device, 10 * i + seed) for i in range(3)]
        for seed, name in enumerate(("params", "grads", "momenta"))
    }
    tensors["fishers"] = [fishers(size, dtype, device) for _ in range(3)]
    if culprit == "fishers":
        tensors["fishers"][1] = poisoned(tensors["fishers"][1], element, poison)
    elif culprit:
        tensors[culprit][1][list(BAD), element] = poison
    before = [tensors["params"][1].clone(), tensors["momenta"][1].clone(), tensors["fishers"][1].to_dense()]
    skipped = [torch.tensor(7, device=device) for _ in range(3)]
    infos = mbf_step_(*tensors.values(), **STEP, **options, skipped=skipped)
    after = [
        [p, m, f.to_dense()] for p, m, f in zip(*(tensors[k] for k in ("params", "momenta", "fishers")), strict=True)
    ]
    return before, after, infos, [int(s) for s in skipped]


@pytest.mark.parametrize("size", [1, 9, 20, 21, 40, 129])
@over_dtypes
@pytest.mark.parametrize("culprit, poison", [
    ("grads", torch.nan), ("grads", torch.inf), ("grads", -torch.inf), ("momenta", torch.nan),
    ("momenta", torch.inf), ("fishers", torch.nan), ("fishers", torch.inf), ("fishers", -50.0),
])  # fmt: skip
@pytest.mark.parametrize("graft", [None, "adam"])
def test_step(backend, device, size, dtype, culprit, poison, graft):
    """F, momentum and weights of a bad block keep their bits; it is counted; all else is as in a good run."""
    element = size // 2
    before, after, infos, skipped = step(size, dtype, device, culprit, poison, element, graft=graft)
    _, expected, clean, untouched = step(size, dtype, device, graft=graft)
    assert [int(i.count_nonzero()) for i in infos] == [0, len(BAD), 0] and not any(i.any() for i in clean)
    assert infos[1][list(BAD)].tolist() == [element + 1] * len(BAD)
    assert skipped == [7, 7 + len(BAD), 7] and untouched == [7, 7, 7]
    for old, new, good in zip(before, after[1], expected[1], strict=True):
        assert_bitwise(new[list(BAD)], old[list(BAD)])
        if backend != "reference":
            assert_bitwise(new[GOOD], good[GOOD])
        assert new[GOOD].isfinite().all()
    if backend != "reference":
        for i in (0, 2):
            for new, good in zip(after[i], expected[i], strict=True):
                assert_bitwise(new, good)


@over_dtypes
def test_a_solution_that_overflows_is_bad(backend, device, dtype):
    """F = 0, a tiny damping and a huge momentum: every input and pivot is finite, the solution is not."""
    w, g, m = (torch.zeros(3, 4, dtype=dtype, device=device) for _ in range(3))
    m[1] = torch.finfo(dtype).max / 8
    kept = m.clone()
    f = SymmetricBlocks.zeros(3, 4, dtype, device)
    (info,) = mbf_step_([w], [g], [m], [f], lr=0.1, momentum=0.9, decay=0.9, damping=1e-6)
    assert info.tolist() == [0, 1, 0]
    assert not w.any() and not f.data.any()
    assert_bitwise(m[1], kept[1])


@over_dtypes
@pytest.mark.parametrize("size", [9, 22, 129])
def test_cached_factor_of_a_bad_block_is_zero(backend, device, size, dtype):
    """A later step that uses the cached factor leaves that block finite and its neighbours moving."""
    w, g, m = (vectors(size, dtype, device, s) for s in range(3))
    g[list(BAD)] = torch.nan
    f, factors = fishers(size, dtype, device), [SymmetricBlocks.zeros(COUNT, size, dtype, device)]
    start = w.clone()
    mbf_step_([w], [g], [m], [f], **STEP, factors=factors)
    assert not factors[0].to_dense()[list(BAD)].any() and factors[0].to_dense()[GOOD].any(-1).any(-1).all()
    assert_padding_zero(factors[0])
    mbf_step_([w], [torch.ones_like(g)], [m], [f], **STEP, factors=factors, refactor=False)
    assert w.isfinite().all() and m.isfinite().all() and (w != start)[GOOD].any(-1).all()


# ---- mbf_shared_step_: mini-blocks that share matrices

SAMPLES, MATRICES = 14, 3  # more than two tiles of mini-blocks
AT = (7, 1)  # the bad mini-block


class Shared:
    """Two tensors [S, R, n] of one call, the first of which is to be spoilt."""

    def __init__(self, size, dtype, device, scale=1.0):
        def draw(seed):
            shape = (SAMPLES, MATRICES, size)
            return [scale * randn(*shape, dtype=dtype, device=device, seed=10 * i + seed) for i in range(2)]

        self.params, self.grads, self.momenta, self.squares = (draw(seed) for seed in range(4))
        self.squares = [v.square() for v in self.squares]
        dense = [scale**2 * spd_blocks("well", MATRICES, size, dtype, device, seed) for seed in range(2)]
        self.fishers = [SymmetricBlocks.from_dense(f) for f in dense]
        self.skipped = [torch.tensor(7, device=device) for _ in range(2)]

    def step(self, **options):
        lists = (self.params, self.grads, self.momenta, self.squares, self.fishers)
        return mbf_shared_step_(*lists, skipped=self.skipped, **(STEP | options))

    def written(self, i=0):
        """Copies of W, M and v, [S, R, n], and of F, [R, n, n]."""
        vectors = [t[i].clone() for t in (self.params, self.momenta, self.squares)]
        return [*vectors, self.fishers[i].to_dense()]


def assert_same_or_near(backend, actual, expected):
    """The bits where kernels promise them; elsewhere the figures."""
    if backend == "cpu":
        return assert_bitwise(actual.contiguous(), expected.contiguous())
    torch.testing.assert_close(actual, expected)


SHARED_CASES = [(1, torch.float64), (9, torch.float32), (17, torch.float32), (22, torch.float64), (129, torch.float32)]
over_shared_cases = pytest.mark.parametrize("size, dtype", SHARED_CASES)
over_grafts = pytest.mark.parametrize("graft", [None, "adam"])


@over_shared_cases
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@over_grafts
@pytest.mark.parametrize("culprit", ["grads", "momenta", "squares"])
def test_shared_step_with_a_bad_mini_block(backend, device, size, dtype, culprit, poison, graft):
    """It keeps W, M and v, and is counted. A bad gradient stops its matrix from changing, but not its neighbours."""
    if culprit == "squares" and graft is None:
        pytest.skip("not looked at")
    bad, good, old_f = (Shared(size, dtype, device) for _ in range(3))
    getattr(bad, culprit)[0][(*AT, size // 2)] = poison
    before = bad.written()
    old_f.step(graft=graft, update=False)
    for problem in (bad, good):
        infos = problem.step(graft=graft)
        assert not any(info.any() for info in infos)
    assert [int(s) for s in bad.skipped] == [8, 7] and [int(s) for s in good.skipped] == [7, 7]
    kept_f = culprit == "grads"
    for i, (old, new) in enumerate(zip(before, bad.written(), strict=True)):
        expected, stale = good.written()[i], old_f.written()[i]
        if i == 3:
            assert_bitwise(new[AT[1]], (old if kept_f else new)[AT[1]])
            others = [r for r in range(MATRICES) if r != AT[1] or not kept_f]
            assert_same_or_near(backend, new[others], expected[others])
            continue
        assert_bitwise(new[AT], old[AT])
        if kept_f and i == 0:
            expected[:, AT[1]] = stale[:, AT[1]]
        elsewhere = torch.ones(SAMPLES, MATRICES, dtype=torch.bool, device=device)
        elsewhere[AT] = False
        assert_same_or_near(backend, new[elsewhere], expected[elsewhere])
        assert new[elsewhere].isfinite().all()
    for new, expected in zip(bad.written(1), good.written(1), strict=True):
        assert_same_or_near(backend, new, expected)
    assert_padding_zero(bad.fishers[0])


@over_shared_cases
@over_grafts
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -50.0], ids=str)
def test_shared_step_with_a_bad_matrix(backend, device, size, dtype, value, graft):
    """All of its mini-blocks keep what they had and are counted; info is LAPACK's; a cached factor stays."""
    bad, good = (Shared(size, dtype, device) for _ in range(2))
    dense, element = bad.fishers[0].to_dense(), size // 2
    dense[AT[1], element, element] = value
    row, column = torch.tril_indices(size, size)
    bad.fishers[0] = SymmetricBlocks.from_packed(dense[:, row, column])
    before = bad.written()
    identity = torch.eye(size, dtype=dtype, device=device).repeat(MATRICES, 1, 1)
    factors = [SymmetricBlocks.from_dense(identity) for _ in range(2)]
    infos = bad.step(graft=graft, factors=factors)
    good.step(graft=graft)
    assert infos[0].tolist() == [0, element + 1, 0] and not infos[1].any()
    assert [int(s) for s in bad.skipped] == [7 + SAMPLES, 7]
    for i, (old, new, expected) in enumerate(zip(before, bad.written(), good.written(), strict=True)):
        at, others = ([AT[1]], [0, 2]) if i == 3 else ((slice(None), AT[1]), (slice(None), [0, 2]))
        if i < 3 or value != -50:
            assert_bitwise(new[at].contiguous(), old[at].contiguous())
        assert_same_or_near(backend, new[others], expected[others])
    kept = factors[0].to_dense()[AT[1]].tril()
    assert_bitwise(kept, identity[0])
    assert not (factors[0].to_dense()[0].tril() == identity[0]).all()


@over_dtypes
@pytest.mark.parametrize("size", [9, 22, 129])
def test_shared_step_with_a_bad_cached_factor(backend, device, size, dtype):
    """A factor of zeros is a matrix that cannot be factored."""
    problem = Shared(size, dtype, device)
    before = problem.written()
    identity = torch.eye(size, dtype=dtype, device=device).repeat(MATRICES, 1, 1)
    spoilt = identity.clone()
    spoilt[AT[1]] = 0
    factors = [SymmetricBlocks.from_dense(spoilt), SymmetricBlocks.from_dense(identity)]
    infos = problem.step(factors=factors, refactor=False, update=False)
    assert infos[0].tolist() == [0, 1, 0] and int(problem.skipped[0]) == 7 + SAMPLES
    for old, new in zip(before[:3], problem.written()[:3], strict=True):
        assert_bitwise(new[:, AT[1]].contiguous(), old[:, AT[1]].contiguous())
    assert (problem.params[0] != before[0])[:, [0, 2]].any(-1).all()


@over_dtypes
@over_grafts
@pytest.mark.parametrize("size", [1, 9, 22, 129])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e18, 1e25], ids=str)
def test_shared_step_of_any_magnitude(backend, device, size, dtype, graft, scale):
    """Everything stays finite, what overflows is skipped; the length of a grafted step is Adam's whatever the scale."""
    problem = Shared(size, dtype, device, scale=1e-10)
    problem.params = [torch.zeros_like(p) for p in problem.params]
    for tensors in (problem.momenta, problem.squares, [f.data for f in problem.fishers]):
        for t in tensors:
            t.zero_()
    problem.grads = [scale * randn(*g.shape, dtype=dtype, device=device, seed=5) for g in problem.grads]
    weights = dict(momentum_weight=0.1, square_weight=0.001) if graft else {}
    infos = problem.step(graft=graft, relative=True, weight_decay=0.0, eps=0.0, **weights)
    assert not any(info.any() for info in infos)
    assert all(t.isfinite().all() for i in range(2) for t in problem.written(i))
    overflow = scale == 1e25 and dtype == torch.float32
    if overflow:
        assert not any(f.data.any() for f in problem.fishers)
    if overflow and graft:
        assert not problem.params[0].any() and int(problem.skipped[0]) > 7
    elif graft and (scale > 1e-15 or dtype == torch.float64):  # else g^2 is zero, and no length is known
        # |u| = sqrt(n): every element of mhat is g and of vhat g^2
        length = problem.params[0].double().norm(dim=2)
        torch.testing.assert_close(length, torch.full_like(length, STEP["lr"] * size**0.5), rtol=1e-5, atol=0)


@over_shared_cases
@pytest.mark.parametrize("history", [0.0, 1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-45, 1e-40, 1e-30, 5e-324], ids=str)
def test_shared_step_without_second_moments(backend, device, size, dtype, history, eps):
    """v = 0 for an element of a mini-block. Its part of Adam's step is 0 where D or the denominator is, and otherwise
    D / eps: where the square of that overflows, the mini-block is bad."""
    problem = Shared(size, dtype, device)
    element = (*AT, size // 2)
    for tensors, value in ((problem.grads, 0.0), (problem.squares, 0.0), (problem.momenta, history)):
        tensors[0][element] = value
    before = problem.written()
    infos = problem.step(graft="adam", update=False, eps=eps, diagonal_decay=0.9)
    assert not any(info.any() for info in infos)
    rounded = torch.tensor(eps, dtype=dtype).item()
    bad = rounded > 0 and history > 0 and 0.9 / rounded > torch.finfo(dtype).max ** 0.5
    assert [int(s) for s in problem.skipped] == [7 + bad, 7]
    for old, new in zip(before[:3], problem.written()[:3], strict=True):
        assert new.isfinite().all()
        if bad:
            assert_bitwise(new[AT], old[AT])
        elsewhere = torch.ones(SAMPLES, MATRICES, dtype=torch.bool, device=device)
        elsewhere[AT] = False
        assert (new != old)[elsewhere].all()


@over_shared_cases
@over_grafts
@pytest.mark.parametrize("relative", [False, True])
def test_shared_step_of_zeros_only_decays(backend, device, size, dtype, graft, relative):
    """No gradient and no history: no direction, no division by zero."""
    problem = Shared(size, dtype, device)
    for tensors in (problem.grads, problem.momenta, problem.squares, [f.data for f in problem.fishers]):
        for t in tensors:
            t.zero_()
    expected = problem.params[0] * (1 - STEP["lr"] * STEP["weight_decay"])
    infos = problem.step(graft=graft, relative=relative, eps=0.0)
    assert not any(info.any() for info in infos) and [int(s) for s in problem.skipped] == [7, 7]
    torch.testing.assert_close(problem.params[0], expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert not problem.momenta[0].any() and not problem.fishers[0].data.any()


@over_grafts
def test_shared_step_with_one_dead_matrix(backend, device, graft):
    """Relative damping has no scale there: lambda is 1, and a first gradient in it still moves."""
    problem = Shared(9, torch.float64, device)
    problem.fishers[0].data.zero_()
    problem.grads[0].zero_()
    w, m = problem.params[0].clone(), problem.momenta[0].clone()
    (info, _) = problem.step(graft=graft, relative=True, update=False, weight_decay=0.0)
    assert not info.any()
    if graft is None:
        torch.testing.assert_close(problem.params[0], w - STEP["lr"] * 0.9 * m / 1)
    assert (problem.params[0] != w).all()
