"""The fused op against the same work in ``torch.linalg``: ``make bench``, or pytest benchmarks/bench_kernels.py.

Every size is checked against float64 before it is timed. The extra columns: nanoseconds per block, and for the kernels
GB/s over the bytes that the op must move, 8 T + 12 n + 4 per float32 block with T = n(n+1)/2.
"""

import pytest
import torch

from benchmarks.baseline import fused_bytes, linalg_step
from mbf_kernels import SymmetricBlocks, accumulate_factor_solve_

BLOCKS = {4: 200_000, 9: 100_000, 16: 40_000, 25: 16_000, 32: 10_000, 64: 2_500, 128: 500}
DECAY, DAMPING = 0.95, 0.1


def problem(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F [B, n, n] positive definite, g and the right-hand side [B, n]."""
    generator = torch.Generator().manual_seed(n)
    samples = torch.randn(BLOCKS[n], 2, n, generator=generator)
    dense = torch.bmm(samples.mT, samples) / 2
    g, rhs = torch.randn(2, BLOCKS[n], n, generator=generator)
    return dense, g, rhs


def record(benchmark, n: int, moved: int | None = None) -> None:
    median = benchmark.stats.stats.median
    benchmark.extra_info["ns_per_block"] = median / BLOCKS[n] * 1e9
    if moved:
        benchmark.extra_info["gigabytes_per_second"] = moved / median * 1e-9


@pytest.mark.parametrize("n", BLOCKS)
def bench_fused(benchmark, n):
    dense, g, rhs = problem(n)
    fisher = SymmetricBlocks.from_dense(dense)
    x, info = accumulate_factor_solve_(fisher.clone(), g, rhs, decay=DECAY, damping=DAMPING)
    assert not info.any()
    truth = linalg_step(dense.double(), g.double(), rhs.double(), DECAY, DAMPING)
    error = torch.linalg.vector_norm(x - truth) / torch.linalg.vector_norm(truth)
    # relative error of a solve: condition number, here at most trace(F)/lambda + 1, times n eps
    condition = dense.diagonal(dim1=1, dim2=2).sum(1).max() / DAMPING + 1
    assert error <= condition * n * torch.finfo(torch.float32).eps
    benchmark.group = f"n = {n}"
    benchmark(accumulate_factor_solve_, fisher, g, rhs, decay=DECAY, damping=DAMPING)
    record(benchmark, n, BLOCKS[n] * fused_bytes(n))


@pytest.mark.parametrize("n", BLOCKS)
def bench_torch_linalg(benchmark, n):
    benchmark.group = f"n = {n}"
    benchmark.pedantic(linalg_step, args=(*problem(n), DECAY, DAMPING), rounds=5, warmup_rounds=1)
    record(benchmark, n)
