"""LAPACK's own test ratios, for every native size and some beyond, on easy and nearly singular blocks."""

import pytest
import torch

from mbf_kernels import SymmetricBlocks, accumulate_factor_solve_, factor, solve
from mbf_kernels.testing import (
    KINDS,
    RATIO,
    assert_below,
    assert_bitwise,
    assert_factors,
    assert_relative,
    assert_solves,
    randn,
    spd_blocks,
)

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("size", [*range(1, 129), 129, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratios(backend, device, size, dtype):
    """||A - L L^T|| / (n ||A|| eps) < 30 and ||b - A x|| / (n ||A|| ||x|| eps) < 30."""
    a = torch.cat([spd_blocks(kind, 3, size, dtype, device, seed=size) for kind in KINDS])
    b = randn(len(a), size, 3, dtype=dtype, device=device, seed=size + 1)
    lower, info = factor(SymmetricBlocks.from_dense(a), damping=0.0)
    assert not info.any()
    assert_factors(a, lower.to_dense(), dtype)
    assert_solves(a, solve(lower, b), b, dtype)
    assert_solves(a, solve(lower, b[..., 0]), b[..., 0], dtype)


@pytest.mark.parametrize("size", [1, 4, 9, 16, 20, 21, 25, 32, 33, 64, 100, 128, 129])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_ratio(backend, device, size, relative, dtype):
    """The fused op, on the matrix that exact arithmetic would build from its inputs.

    Building it in `dtype` adds about 5 eps |A|, far inside the 30 n eps |A| of the ratio, once n > 1.
    """
    a = torch.cat([spd_blocks(kind, 3, size, dtype, device, seed=size) for kind in KINDS])
    f = SymmetricBlocks.from_dense(a)
    g, b = (randn(len(a), size, dtype=dtype, device=device, seed=s) for s in (1, 2))
    x, info = accumulate_factor_solve_(f, g, b, decay=0.9, damping=1e-2, relative=relative)
    assert not info.any()
    g = g.double()
    truth = 0.9 * a.double() + 0.1 * g[:, :, None] * g[:, None, :]
    mean = truth.diagonal(dim1=1, dim2=2).mean(-1) if relative else truth.new_ones(len(a))
    identity = torch.eye(size, dtype=truth.dtype, device=device)
    assert_solves(truth + 1e-2 * mean[:, None, None] * identity, x, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ratio_sees_a_wrong_factor(dtype):
    """The assertions fail on a relative error of 1000 n eps, and on NaN: they are not vacuous."""
    a = spd_blocks("well", 2, 9, dtype)
    lower = torch.linalg.cholesky(a)
    assert_factors(a, lower, dtype)
    for wrong in (1 + 1000 * 9 * torch.finfo(dtype).eps, torch.nan):
        with pytest.raises(AssertionError):
            assert_factors(a, lower * wrong, dtype)
        with pytest.raises(AssertionError):
            assert_solves(a, torch.ones(2, 9, dtype=dtype) * wrong, a.sum(-1), dtype)
    with pytest.raises(AssertionError):
        assert_below(torch.tensor(torch.nan), RATIO)


@pytest.mark.parametrize("size", [1, 9, 20, 25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_denormal_pivot_is_a_pivot(cpu, size, dtype):
    """1e-2 of the smallest normal number has no finite inverse, but a root that has one. Neighbours keep their bits.

    x is b divided by the root twice: a root, its inverse and two products, each within eps.
    """
    tiny = torch.finfo(dtype).tiny
    dense = torch.eye(size, dtype=dtype).expand(40, size, size).clone()
    g = torch.zeros(40, size, dtype=dtype)
    b = randn(40, size, dtype=dtype)
    expected, _ = accumulate_factor_solve_(SymmetricBlocks.from_dense(dense), g, b, decay=1.0, damping=0.0)
    dense[7] *= tiny / 100
    b[7] *= tiny / 100
    x, info = accumulate_factor_solve_(SymmetricBlocks.from_dense(dense), g, b, decay=1.0, damping=0.0)
    assert not info.any()
    others = torch.arange(40) != 7
    assert_bitwise(x[others], expected[others])
    assert_relative(x[7], b[7].double() / dense[7, 0, 0].double(), 4 * torch.finfo(dtype).eps)
