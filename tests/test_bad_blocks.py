"""A bad block hurts only itself: it keeps its state, its solution is zero, info tells, its neighbours
keep every bit."""

import pytest
import torch

from mbf_kernels import SymmetricBlocks, accumulate_, accumulate_factor_solve_, factor, mbf_step_, solve
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
