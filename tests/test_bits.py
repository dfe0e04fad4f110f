"""Bit-exactness of the native backends: a block's result depends on that block alone."""

import contextlib

import pytest
import torch

from mbf_kernels import (
    SymmetricBlocks,
    accumulate_,
    accumulate_factor_solve_,
    backends,
    factor,
    mbf_step_,
    native,
    solve,
    use_backend,
)
from mbf_kernels.testing import RATIO, assert_bitwise, assert_relative, randn, spd_blocks

COUNT = 101  # of small blocks
LARGE_COUNT = 35
SIZES = (1, 2, 4, 9, 16, 19, 20, 21, 25, 32, 33, 64, 65, 128)
DTYPES = (torch.float32, torch.float64)

over_sizes = pytest.mark.parametrize("size", SIZES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(size, dtype, device="cpu"):
    """F [B, n, n], and g, rhs, w, m [B, n]."""
    count = COUNT if size < 64 else LARGE_COUNT
    vectors = [randn(count, size, dtype=dtype, device=device, seed=s) for s in range(4)]
    return [spd_blocks("fisher", count, size, dtype, device), *vectors]


def run_ops(dense, g, rhs, w, m):
    """Every operation once; all results as tensors whose first dimension counts blocks."""
    f = SymmetricBlocks.from_dense(dense)
    accumulate_(f, g, decay=0.9)
    accumulate_(f, torch.stack([g, rhs, w]), decay=0.9)
    lower, info = factor(f, damping=0.1, relative=True)
    x = solve(lower, rhs)
    wide = solve(lower, torch.stack([rhs, g, w], dim=-1))
    results = [lower.to_packed(), info, x, wide]
    y, info = accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=0.01, relative=True)
    results += [f.to_packed(), y, info]
    for graft in (None, "adam"):
        w, m = w.clone(), m.clone()
        infos = mbf_step_([w], [g], [m], [f], lr=0.1, momentum=0.9, decay=0.9, damping=0.1, relative=True, graft=graft)
        results += [w, m, f.to_packed(), *infos]
    return results


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_bitwise(a, b)


@over_sizes
@over_dtypes
def test_run_to_run(native, device, size, dtype):
    tensors = problem(size, dtype, device)
    assert_same(run_ops(*tensors), run_ops(*tensors))


@over_sizes
@over_dtypes
def test_permuting_the_batch_permutes_the_result(native, device, size, dtype):
    tensors = problem(size, dtype, device)
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(1)).to(device)
    assert_same(run_ops(*(t[order] for t in tensors)), [r[order] for r in run_ops(*tensors)])


@over_sizes
@over_dtypes
def test_splitting_the_batch_splits_the_result(native, device, size, dtype):
    tensors = problem(size, dtype, device)
    parts = [
        run_ops(*part) for part in zip(*(t.tensor_split([1, 4, 37]) for t in tensors), strict=True) if len(part[0])
    ]
    assert_same([torch.cat(part) for part in zip(*parts, strict=True)], run_ops(*tensors))


@over_sizes
@over_dtypes
def test_the_fused_op_is_its_parts(cpu, size, dtype):
    """On a GPU within rounding: nvcc makes 1 / sqrt(pivot) one instruction, and solve divides by the root."""
    dense, g, rhs, *_ = problem(size, dtype, "cpu")
    fused, parts = SymmetricBlocks.from_dense(dense), SymmetricBlocks.from_dense(dense)
    for relative in (False, True):
        x, info = accumulate_factor_solve_(fused, g, rhs, decay=0.9, damping=0.1, relative=relative)
        lower, expected_info = factor(accumulate_(parts, g, decay=0.9), damping=0.1, relative=relative)
        assert_same([x, info, fused.data], [solve(lower, rhs), expected_info, parts.data])


@pytest.mark.parametrize("size", [1, 9, 20, 21, 64, 129])
@over_dtypes
def test_the_fused_op_is_its_parts_within_rounding(backend, device, size, dtype):
    """Both solve within the ratio, so they differ by at most twice that, times the condition number."""
    dense, g, rhs, *_ = problem(size, dtype, device)
    fused, parts = SymmetricBlocks.from_dense(dense), SymmetricBlocks.from_dense(dense)
    x, info = accumulate_factor_solve_(fused, g, rhs, decay=0.9, damping=1.0, relative=True)
    lower, _ = factor(accumulate_(parts, g, decay=0.9), damping=1.0, relative=True)
    assert not info.any()
    condition = size + 1  # (|A| + mean diagonal) / mean diagonal, and |A| <= trace
    assert_relative(x, solve(lower, rhs), 2 * RATIO * size * torch.finfo(dtype).eps * condition)


@pytest.fixture
def cpu():
    if backends()["cpu"] != "available":
        pytest.skip("no native CPU backend")
    with use_backend("cpu"):
        yield


@contextlib.contextmanager
def isa(name):
    before = native.cpu_isa()
    native.set_cpu_isa(name)
    try:
        assert native.cpu_isa() == name
        yield
    finally:
        native.set_cpu_isa(before)


def needs(*names):
    missing = backends()["cpu"] != "available" or any(name not in native.cpu_isas() for name in names)
    return pytest.mark.skipif(missing, reason=f"needs {' and '.join(names)}")


@needs("avx2", "avx512")
@pytest.mark.parametrize("size", range(1, 129))
@over_dtypes
def test_avx2_is_avx512(cpu, size, dtype):
    tensors = problem(size, dtype)
    with isa("avx2"):
        narrow = run_ops(*tensors)
    with isa("avx512"):
        wide = run_ops(*tensors)
    assert_same(narrow, wide)


@needs("baseline")
@over_sizes
@over_dtypes
def test_every_instruction_set_solves_the_same_problem(cpu, size, dtype):
    """The baseline has no fused multiply-add, so its bits differ; its accuracy does not."""
    dense, g, rhs, *_ = problem(size, dtype)
    solutions = []
    for name in native.cpu_isas():
        with isa(name):
            f = SymmetricBlocks.from_dense(dense)
            x, info = accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=1.0, relative=True)
            assert not info.any()
            solutions.append(x)
    for x in solutions[1:]:
        assert_relative(x, solutions[0], 2 * RATIO * size * torch.finfo(dtype).eps * (size + 1))


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="avx1024"):
        native.set_cpu_isa("avx1024")


@over_sizes
@over_dtypes
def test_threads_change_no_bit(cpu, size, dtype):
    repeats = 16 if size <= 25 else 1  # enough work to be worth sharing
    tensors = [t.repeat(repeats, *(1 for _ in t.shape[1:])) for t in problem(size, dtype)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run_ops(*tensors))
    finally:
        torch.set_num_threads(before)
    assert_same(*results)
