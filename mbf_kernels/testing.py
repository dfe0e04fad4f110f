"""Problem generators and accuracy assertions, shared by the tests and the benchmarks.

Every tolerance follows from LAPACK's own pass mark: a factorization or a solution is right when its test
ratio, its residual in units of n * eps, stays below 30. A comparison that meets a NaN fails.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks

RATIO = 30.0  # the threshold of LAPACK's test programs
KINDS = ("well", "ill", "clustered", "correlated", "fisher")  # what spd_blocks can draw


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype=torch.float64, device=None, seed: int = 0) -> Tensor:
    """Normal numbers: the same for every dtype (rounded from float64) and device."""
    drawn = torch.randn(shape, dtype=torch.float64, device="cpu", generator=rng(seed))
    return drawn.to(device=device or torch.get_default_device(), dtype=dtype)


def spd_blocks(kind: str, count: int, size: int, dtype=torch.float64, device=None, seed: int = 0) -> Tensor:
    """`count` exactly symmetric positive definite blocks [count, size, size] of one of KINDS.

    The condition number of the worst kinds is 0.1 / (n eps), so a correct Cholesky still exists in `dtype`.
    """
    worst = max(10.0, 0.1 / (size * torch.finfo(dtype).eps))
    if kind == "correlated":  # a strong common part: nearly equal gradients
        dense = torch.ones(count, size, size, dtype=torch.float64, device="cpu")
        dense += size / worst * torch.eye(size, dtype=torch.float64, device="cpu")
    elif kind == "fisher":  # three outer products of any magnitude, and a small relative ridge
        scale = 10.0 ** torch.empty(count, 1, 1, dtype=torch.float64, device="cpu").uniform_(
            -6, 6, generator=rng(seed + 1)
        )
        g = randn(count, size, 3, device="cpu", seed=seed) * scale
        dense = g @ g.mT
        ridge = (1e-3 + 10 / worst) * dense.diagonal(dim1=1, dim2=2).mean(-1)
        dense += ridge[:, None, None] * torch.eye(size, dtype=torch.float64, device="cpu")
    else:
        powers = torch.linspace(0, -1, size, dtype=torch.float64, device="cpu")
        eigenvalues = {
            "well": 10.0**powers,
            "ill": worst**powers,
            "clustered": torch.ones(size, dtype=torch.float64, device="cpu"),
        }[kind]
        if kind == "clustered":  # all equal but the last
            eigenvalues[-1] = 1 / worst if size > 1 else 1
        q = _orthogonal(count, size, seed)
        dense = (q * eigenvalues) @ q.mT
    dense = ((dense + dense.mT) / 2).to(dtype)
    return dense.to(device or torch.get_default_device())


@lru_cache(maxsize=16)
def _orthogonal(count: int, size: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(count, size, size, device="cpu", seed=seed)).Q


def residual_ratio(residual: Tensor, scale: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """residual / (n eps scale), and 0 where both are 0."""
    unit = size * torch.finfo(dtype).eps * scale
    return torch.where((residual == 0) & (unit == 0), torch.zeros_like(residual), residual / unit)


def factor_ratio(a: Tensor, lower: Tensor, dtype: torch.dtype) -> Tensor:
    """LAPACK's ||A - L L^T|| / (n ||A|| eps) in the 1-norm, [B], of a, lower: [B, n, n]."""
    a, lower = a.double(), lower.double().tril()
    return residual_ratio(_norm(a - lower @ lower.mT), _norm(a), a.shape[-1], dtype)


def solve_ratio(a: Tensor, x: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """LAPACK's ||b - A x|| / (n ||A|| ||x|| eps) in the 1-norm, [B, k], of x, b: [B, n] or [B, n, k]."""
    a, x, b = a.double(), *(v.double() if v.ndim == 3 else v.double()[..., None] for v in (x, b))
    scale = _norm(a)[:, None] * x.abs().sum(1)
    return residual_ratio((b - a @ x).abs().sum(1), scale, a.shape[-1], dtype)


def _norm(a: Tensor) -> Tensor:
    return a.abs().sum(-2).amax(-1)


def assert_below(value: Tensor, bound: Tensor | float, what: str = "error") -> None:
    """Every value is finite and at most its bound."""
    value, bound = torch.as_tensor(value), torch.as_tensor(bound)
    good = value.isfinite() & (value <= bound)
    assert bool(good.all()), f"{what}: {value[~good].flatten()[:4].tolist()} of {value.max()} above {bound.max()}"


def assert_factors(a: Tensor, lower: Tensor, dtype: torch.dtype) -> None:
    assert_below(factor_ratio(a, lower, dtype), RATIO, "factor ratio")


def assert_solves(a: Tensor, x: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    assert_below(solve_ratio(a, x, b, dtype), RATIO, "solve ratio")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64, 0 where both are 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    return 0.0 if error == 0 else error / scale if scale else float("inf")


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, what: str = "relative error") -> None:
    assert_below(torch.tensor(relative_error(actual, expected)), tolerance, what)


def solution_tolerance(a: Tensor, dtype: torch.dtype, samples: int = 1) -> Tensor:
    """A bound on |x - A^-1 b| / |A^-1 b| per block: condition number times backward error.

    The backward error is LAPACK's pass mark plus the rounding of A, a mean of `samples` outer products.
    """
    eigenvalues = torch.linalg.eigvalsh(a.double())
    condition = eigenvalues[:, -1] / eigenvalues[:, 0]
    return (RATIO * a.shape[-1] + samples + 4) * torch.finfo(dtype).eps * condition


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    """The same shape, dtype and bits: NaN equals NaN, and 0 differs from -0."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    word = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    actual, expected = (t.detach().contiguous().view(word) for t in (actual, expected))
    different = actual != expected.to(actual.device)
    assert not bool(different.any()), f"{int(different.sum())} of {different.numel()} elements differ"


def padding(blocks: SymmetricBlocks) -> Tensor:
    """The storage elements that belong to no block: they are zero after every operation."""
    used = SymmetricBlocks.from_packed(torch.ones_like(blocks.to_packed())).data.bool()
    return blocks.data[~used]


def assert_padding_zero(blocks: SymmetricBlocks) -> None:
    assert bool((padding(blocks) == 0).all()), "the padding of the storage is not zero"
