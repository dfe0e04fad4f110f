"""The library's ops as measurements: random inputs, the call, the check against float64, and the bytes it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mbf_kernels
from benchmarks.baseline import fused_bytes
from mbf_kernels import SymmetricBlocks, accumulate_, accumulate_factor_solve_, factor, mbf_step_, solve
from mbf_kernels.testing import RATIO, assert_below, assert_factors, assert_solves

FUSED = "accumulate_factor_solve_"
DECAY, DAMPING = 0.95, 0.1
LAYOUTS = ("contiguous", "channels_last")
STEP = {"lr": 1e-3, "momentum": 0.9, "decay": DECAY, "damping": DAMPING, "relative": True}
STEP |= {"graft": "adam", "nesterov": True}


class Problem:
    """Random blocks F = s s^T + I, gradients and right-hand sides [B, n] on the device."""

    def __init__(self, device: str, count: int, n: int, dtype: torch.dtype, layout: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        samples, g, rhs = torch.randn(3, count, n, generator=generator, device=device, dtype=dtype)
        self.fisher = random_blocks(samples)
        if layout == "channels_last":  # element after element of all blocks, as within one output of such a weight
            g, rhs = g.mT.contiguous().mT, rhs.mT.contiguous().mT
        self.g, self.rhs = g.clone(), rhs.clone()
        self.lower: SymmetricBlocks | None = None  # the factor, once `solve` needs it

    def sample(self) -> Tensor:
        return sample_of(self.fisher)


class StepProblem:
    """Weights, gradients and momenta [outputs, inputs, n] of a convolution with kernels of n elements."""

    def __init__(self, device: str, count: int, n: int, dtype: torch.dtype, layout: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        inputs = min(64, count)
        outputs = count // inputs
        if outputs * inputs != count:
            raise ValueError(f"StepProblem: expected a count of whole outputs of {inputs} inputs, got {count}")
        self.weight, self.g, self.momentum = torch.randn(
            3, outputs, inputs, n, generator=generator, device=device, dtype=dtype
        )
        if layout == "channels_last":  # element after element of all inputs of an output
            self.weight, self.g, self.momentum = (t.mT.contiguous().mT for t in (self.weight, self.g, self.momentum))
        self.fisher = random_blocks(torch.randn(count, n, generator=generator, device=device, dtype=dtype))

    def sample(self) -> Tensor:
        return sample_of(self.fisher)


def random_blocks(samples: Tensor) -> SymmetricBlocks:
    """F = s s^T + I for samples s [B, n]."""
    lower = torch.tril_indices(samples.shape[1], samples.shape[1], device=samples.device)
    packed = samples[:, lower[0]] * samples[:, lower[1]]
    packed[:, lower[0] == lower[1]] += 1
    return SymmetricBlocks.from_packed(packed)


def sample_of(blocks: SymmetricBlocks) -> Tensor:
    """Indices of up to 4096 blocks, the first and the last among them."""
    count = min(len(blocks), 4096, max(2, 2**21 // blocks.size**2))
    return torch.linspace(0, len(blocks) - 1, count, dtype=torch.float64).long().to(blocks.data.device)


def dense(blocks: SymmetricBlocks, index: Tensor) -> Tensor:
    return SymmetricBlocks.from_packed(blocks.to_packed()[index]).to_dense().double()


def accumulated(before: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The new F in float64, and the bound on its rounding: six operations on each element."""
    g, eps = g.double(), torch.finfo(g.dtype).eps
    outer = g[:, :, None] * g[:, None, :]
    magnitude = DECAY * before.abs() + (1 - DECAY) * outer.abs()
    return DECAY * before + (1 - DECAY) * outer, 6 * eps * magnitude


def damped(matrix: Tensor) -> Tensor:
    return matrix + DAMPING * torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)


def fused(p: Problem):
    return accumulate_factor_solve_(p.fisher, p.g, p.rhs, decay=DECAY, damping=DAMPING)


def check_fused(p: Problem) -> None:
    index = p.sample()
    before, poison = dense(p.fisher, index), torch.full_like(p.rhs, float("nan"))
    del poison  # what the op does not write is NaN
    x, info = fused(p)
    truth, bound = accumulated(before, p.g[index])
    assert_below((dense(p.fisher, index) - truth).abs(), bound, "error of F")
    assert_solves(damped(truth), x[index], p.rhs[index], p.rhs.dtype)
    assert not info.any(), f"info is {int(info.max())} for a good block"
    assert x.isfinite().all(), "the solution is not finite"


def check_accumulate(p: Problem) -> None:
    index = p.sample()
    truth, bound = accumulated(dense(p.fisher, index), p.g[index])
    accumulate_(p.fisher, p.g, decay=DECAY)
    assert_below((dense(p.fisher, index) - truth).abs(), bound, "error of F")


def check_factor(p: Problem) -> None:
    index = p.sample()
    lower, info = factor(p.fisher, damping=DAMPING)
    assert_factors(damped(dense(p.fisher, index)), dense(lower, index), p.g.dtype)
    assert not info.any(), f"info is {int(info.max())} for a good block"


def check_solve(p: Problem) -> None:
    index = p.sample()
    p.lower, _ = factor(p.fisher, damping=DAMPING)
    x = solve(p.lower, p.rhs)
    assert_solves(damped(dense(p.fisher, index)), x[index], p.rhs[index], p.rhs.dtype)
    assert x.isfinite().all(), "the solution is not finite"


def step(p: StepProblem):
    return mbf_step_([p.weight], [p.g], [p.momentum], [p.fisher], **STEP)


def check_step(p: StepProblem) -> None:
    """Against the same step of a sample of the blocks, in float64, by torch.linalg.

    P / |P| has twice the relative error of a solve, which is the condition number (at most trace / lambda + 1 =
    n / damping + 1) times its backward error: LAPACK's pass mark and the rounding of the matrix. The weight is rounded
    once more.
    """
    index, n, eps = p.sample(), p.fisher.size, torch.finfo(p.g.dtype).eps
    before = dense(p.fisher, index)
    start, g, momentum = (t.reshape(-1, n)[index].double() for t in (p.weight, p.g, p.momentum))
    truth, f64 = start.clone(), SymmetricBlocks.from_dense(before)
    with mbf_kernels.use_backend("reference"):
        mbf_step_([truth], [g], [momentum], [f64], **STEP)
    (info,) = step(p)
    new, bound = accumulated(before, p.g.reshape(-1, n)[index])
    assert_below((dense(p.fisher, index) - new).abs(), bound, "error of F")
    relative = 2 * (RATIO * n + 6) * eps * (n / DAMPING + 1)
    norm = torch.linalg.vector_norm
    error = norm(p.weight.reshape(-1, n)[index].double() - truth, dim=1)
    assert_below(error, relative * norm(truth - start, dim=1) + 2 * eps * norm(truth, dim=1), "error of the weights")
    assert not info.any(), f"info is {int(info.max())} for a good block"
    assert p.weight.isfinite().all(), "a weight is not finite"


@dataclass(frozen=True)
class Op:
    problem: type[Problem] | type[StepProblem]
    call: Callable[..., object]
    check: Callable[..., None]
    moved: Callable[[int, int], int]  # bytes per block of size n and scalars of itemsize
    flops: Callable[[int], float]  # per block of size n


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def factor_flops(n: int) -> float:
    """Of a Cholesky factorisation: multiplications, additions, divisions and roots."""
    return n**3 / 3 + n**2 / 2 + n / 6


OPS = {
    "accumulate_": Op(
        Problem,
        lambda p: accumulate_(p.fisher, p.g, decay=DECAY),
        check_accumulate,
        lambda n, itemsize: itemsize * (n * (n + 1) + n),
        lambda n: 3 * triangle(n) + n,
    ),
    "factor": Op(
        Problem,
        lambda p: factor(p.fisher, damping=DAMPING),
        check_factor,
        lambda n, itemsize: itemsize * n * (n + 1) + 4,
        lambda n: n + factor_flops(n),
    ),
    "solve": Op(
        Problem,
        lambda p: solve(p.lower, p.rhs),
        check_solve,
        lambda n, itemsize: itemsize * (n * (n + 1) // 2 + 2 * n),
        lambda n: 2 * n**2,
    ),
    FUSED: Op(Problem, fused, check_fused, fused_bytes, lambda n: 3 * triangle(n) + 2 * n + factor_flops(n) + 2 * n**2),
    "mbf_step_": Op(  # beside the fused op: M, D, u, the two lengths and W, about 20 operations an element
        StepProblem,
        step,
        check_step,
        lambda n, itemsize: itemsize * (n * (n + 1) + 5 * n),
        lambda n: 3 * triangle(n) + 2 * n + factor_flops(n) + 2 * n**2 + 20 * n,
    ),
}
