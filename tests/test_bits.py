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
    mbf_diagonal_step_,
    mbf_shared_step_,
    mbf_step_,
    native,
    rank_one_step_,
    solve,
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


@pytest.mark.parametrize("size", [1, 9, 20, 21, 64, 129])
@over_dtypes
def test_the_fused_op_is_its_parts_within_rounding(backend, device, size, dtype):
    """F and info are the same; both solve within the ratio, so x differs by at most twice that, times the condition
    number."""
    dense, g, rhs, *_ = problem(size, dtype, device)
    fused, parts = SymmetricBlocks.from_dense(dense), SymmetricBlocks.from_dense(dense)
    x, info = accumulate_factor_solve_(fused, g, rhs, decay=0.9, damping=1.0, relative=True)
    lower, expected_info = factor(accumulate_(parts, g, decay=0.9), damping=1.0, relative=True)
    assert not info.any()
    assert_same([info, fused.data], [expected_info, parts.data])
    condition = size + 1  # (|A| + mean diagonal) / mean diagonal, and |A| <= trace
    assert_relative(x, solve(lower, rhs), 2 * RATIO * size * torch.finfo(dtype).eps * condition)


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


# ---- steps of shared matrices and of tensors without blocks

SHAPES = [(130, 2), (1, 1), (65, 5), (6, 3), (64, 1)]  # mini-blocks that share, and matrices
MOMENTS = dict(lr=0.1, momentum=0.9, diagonal_decay=0.99, graft="adam", momentum_weight=0.1, square_weight=0.001)


def shared_problem(size, dtype, shapes=SHAPES):
    """Lists of W, g, M, v and dense F."""
    lists = [[randn(*shape, size, dtype=dtype, seed=10 * i + s) for i, shape in enumerate(shapes)] for s in range(4)]
    lists[3] = [v.square() for v in lists[3]]
    return [*lists, [spd_blocks("fisher", shape[1], size, dtype, seed=i) for i, shape in enumerate(shapes)]]


def run_shared(lists, graft="adam"):
    w, g, m, v, dense = ([t.clone() for t in tensors] for tensors in lists)
    fishers = [SymmetricBlocks.from_dense(f) for f in dense]
    options = MOMENTS | dict(graft=graft, decay=0.9, damping=0.01, relative=True)
    for _ in range(2):
        mbf_shared_step_(w, g, m, v, fishers, **options)
    return [w, m, v, [f.to_packed() for f in fishers]]


def run_diagonal(lists):
    w, g, m, v = ([t.clone() for t in tensors] for tensors in lists[:4])
    for _ in range(2):
        mbf_diagonal_step_(w, g, m, v, **MOMENTS)
    return [w, m, v]


def assert_same_lists(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 9, 17, 32, 33, 64, 65, 128])
@over_dtypes
def test_threads_and_repetition_change_no_bit_of_a_shared_step(cpu, size, dtype):
    lists = shared_problem(size, dtype)
    for graft in (None, "adam"):
        expected = run_shared(lists, graft)
        for count in (1, 2, 3):
            with threads(count):
                assert_same_lists(run_shared(lists, graft), expected)


@pytest.mark.parametrize("size", [9, 33])
@over_dtypes
def test_a_shared_step_of_some_tensors_or_samples(cpu, size, dtype):
    """A tensor alone has the bits that it has among others; so do mini-blocks in another order, as long as F does."""
    lists = shared_problem(size, dtype)
    expected = run_shared(lists)
    for i in range(len(SHAPES)):
        alone = run_shared([tensors[i : i + 1] for tensors in lists])
        assert_same_lists(alone, [results[i : i + 1] for results in expected])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    w, g, m, v, dense = (tensors[:1] for tensors in lists)
    results = []
    for index in (torch.arange(130), order, order[:17]):
        fishers = [SymmetricBlocks.from_dense(f) for f in dense]
        some = [[t[0][index].clone()] for t in (w, g, m, v)]
        mbf_shared_step_(*some, fishers, **MOMENTS, decay=0.9, damping=0.01, relative=True, update=False)
        results.append([some[0][0], some[2][0], some[3][0]])
    assert_same(results[1], [t[order] for t in results[0]])
    assert_same(results[2], [t[order[:17]] for t in results[0]])


@needs("avx2", "avx512", "baseline")
@pytest.mark.parametrize("size", [1, 8, 9, 16, 17, 33, 64, 65, 128])
@over_dtypes
def test_every_instruction_set_takes_the_same_shared_step(cpu, size, dtype):
    """Within rounding: twice the backward error of a solve, times the condition number that relative damping leaves."""
    lists = shared_problem(size, dtype, [(65, 2), (7, 1)])
    results = []
    for name in native.cpu_isas():
        with isa(name):
            results.append(run_shared(lists)[0] + run_diagonal(lists)[0])
    condition = size / 0.01 + 1
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_relative(a, b, 4 * RATIO * size * torch.finfo(dtype).eps * condition)


@over_dtypes
def test_threads_and_neighbours_change_no_bit_of_a_diagonal_step(cpu, dtype):
    lengths = (1, 15, 16, 17, 0, 4097, 200003, 31)
    lists = [[randn(length, dtype=dtype, seed=10 * i + s) for i, length in enumerate(lengths)] for s in range(4)]
    lists[3] = [v.square() for v in lists[3]]
    expected = run_diagonal(lists)
    for count in (1, 2, 3):
        with threads(count):
            assert_same_lists(run_diagonal(lists), expected)
    for i in range(len(lengths)):
        alone = run_diagonal([tensors[i : i + 1] for tensors in lists])
        assert_same_lists(alone, [results[i : i + 1] for results in expected])
    shifted = [[t[3:] for t in tensors[6:7]] for tensors in lists]  # other lanes, another tail
    assert_same_lists(run_diagonal(shifted), [[results[6][3:]] for results in expected])


def run_rank_one(lists):
    w, g, m, s, h = ([t if t is None else t.clone() for t in tensors] for tensors in lists)
    rank_one_step_(w, g, m, s, h, lr=0.1, momentum=0.9, damping=0.1, weight_decay=0.1)
    return [w, m]


def rank_one_problem(dtype, device):
    shapes = [(1, 1), (3, 5), (7, 16), (33, 17), (0, 3), (4097, 1), (61, 4099), (31, 64)]
    lists = [[randn(*shape, dtype=dtype, device=device, seed=10 * i + s) for i, shape in enumerate(shapes)]
             for s in range(3)]  # fmt: skip
    for k in (0, 1):
        lists.append([randn(shape[k], dtype=dtype, device=device, seed=5 - k).square() for shape in shapes])
    lists[3][-1] = lists[4][-1] = None
    return lists


@over_dtypes
def test_neighbours_change_no_bit_of_a_step_of_rank_one(native, device, dtype):
    """A tensor alone has the bits that it has among others, a row those that it has in another matrix."""
    lists = rank_one_problem(dtype, device)
    expected = run_rank_one(lists)
    for i in range(len(lists[0])):
        assert_same_lists(run_rank_one([tensors[i : i + 1] for tensors in lists]), [[t[i]] for t in expected])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1)).to(device)[:20]
    some = [[tensors[3][order]] for tensors in lists[:4]] + [[lists[4][3]]]
    assert_same_lists(run_rank_one(some), [[t[3][order]] for t in expected])


@over_dtypes
def test_threads_change_no_bit_of_a_step_of_rank_one(cpu, dtype):
    lists = rank_one_problem(dtype, "cpu")
    expected = run_rank_one(lists)
    for count in (1, 2, 3):
        with threads(count):
            assert_same_lists(run_rank_one(lists), expected)


@needs("avx2", "avx512", "baseline")
@over_dtypes
def test_every_instruction_set_takes_the_same_step_of_rank_one(cpu, dtype):
    """Those with fused multiply-add in every bit; without it, within a dozen roundings of terms of order one."""
    results = {}
    for name in native.cpu_isas():
        with isa(name):
            results[name] = run_rank_one(rank_one_problem(dtype, "cpu"))
    assert_same_lists(results["avx2"], results["avx512"])
    for ours, others in zip(results["baseline"], results["avx2"], strict=True):
        for a, b in zip(ours, others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=100 * torch.finfo(dtype).eps)
