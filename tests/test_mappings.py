"""How the GPU kernels map blocks to threads: every mapping at the ends of its sizes, on a GPU or emulated.

The suites of the ops run each size on the mapping it takes by itself; here mappings are forced, threads are run in
different orders, and launches are filled beyond one table of problems.
"""

import re
from pathlib import Path

import pytest
import torch

from mbf_kernels import (
    SymmetricBlocks,
    accumulate_factor_solve_,
    backends,
    factor,
    mbf_step_,
    native,
    solve,
    use_backend,
)
from mbf_kernels.testing import (
    KINDS,
    assert_bitwise,
    assert_factors,
    assert_solves,
    randn,
    spd_blocks,
)

DEVICES = {"cuda": "cuda", "emulated": "cpu"}
AVAILABLE = [name for name in DEVICES if backends()[name] == "available"]
DTYPES = (torch.float32, torch.float64)
MAPPINGS = Path(__file__).parent.parent / "csrc/cuda/mappings.def"


@pytest.fixture(
    params=AVAILABLE or [pytest.param("none", marks=pytest.mark.skip(reason="no GPU kernels, emulated or not"))]
)
def gpu(request):
    """The device type of each kind of GPU kernels, in use during the test."""
    with use_backend(request.param):
        yield DEVICES[request.param]


def _served():
    """(mapping, dtype, n) at both ends of every compiled kernel's sizes."""
    text = MAPPINGS.read_text().replace("\\\n", " ")
    for dtype, scalar in zip(DTYPES, ("FLOAT", "DOUBLE"), strict=True):
        last = int(re.search(rf"MBF_MAX_THREAD_{scalar} (\d+)", text)[1])
        yield from (("thread", dtype, n) for n in (1, 2, 3, last - 1, last))
        for mapping in ("group", "block"):
            line = re.search(rf"MBF_FOR_EACH_{mapping.upper()}_{scalar}\(X\)(.*)", text)[1]
            sizes = [int(n) for n in re.findall(r"X\((\d+)", line)]
            ends = {1, 2, *sizes, *(n - 1 for n in sizes), *(n + 1 for n in sizes[:-1])}
            yield from ((mapping, dtype, n) for n in sorted(ends))


SERVED = list(_served())


def run_everything(count, size, dtype, device):
    """Every op once; all results."""
    g, rhs, w, m = (randn(count, size, dtype=dtype, device=device, seed=s) for s in range(4))
    f = SymmetricBlocks.from_dense(spd_blocks("well", count, size, dtype, device))
    lower, info = factor(f, damping=0.1, relative=True)
    results = [lower.data, info, solve(lower, rhs), solve(lower, torch.stack([rhs, g, w], dim=-1))]
    results += [*accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=0.1), f.data]
    cached = SymmetricBlocks.zeros(count, size, dtype, device)
    for refactor in (True, False):
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        results += mbf_step_(
            [w], [g], [m], [f], lr=0.1, momentum=0.9, decay=0.9, damping=0.1, relative=True, graft="adam",
            nesterov=True, factors=[cached], refactor=refactor, skipped=[skipped],
        )  # fmt: skip
        results += [w.clone(), m.clone(), f.data.clone(), cached.data.clone(), skipped]
    return results


@pytest.mark.parametrize("mapping, dtype, size", SERVED, ids=str)
def test_every_mapping_is_as_good_as_lapack(gpu, mapping, dtype, size):
    for count in (1, 7) if size <= 32 else (2,):  # of each kind
        a = torch.cat([spd_blocks(kind, count, size, dtype, gpu, seed=size) for kind in KINDS])
        rhs = randn(len(a), size, dtype=dtype, device=gpu)
        with native.cuda_mapping(mapping):
            lower, info = factor(SymmetricBlocks.from_dense(a), damping=0.0)
            x = solve(lower, rhs)
        assert not info.any()
        assert_factors(a, lower.to_dense(), dtype)
        assert_solves(a, x, rhs, dtype)


@pytest.mark.parametrize("mapping, dtype, size", SERVED, ids=str)
def test_mappings_agree(gpu, mapping, dtype, size):
    """With the default mapping, which the other suites hold against float64.

    Both solve well conditioned systems (damping a tenth of the mean diagonal, so the condition is below 10 n + 1) with
    a backward error of a few n eps; a step's weights then differ by lr times that, relative to |u| <= sqrt(n).
    """
    expected = run_everything(5, size, dtype, gpu)
    with native.cuda_mapping(mapping):
        actual = run_everything(5, size, dtype, gpu)
    tolerance = 10 * size * (10 * size + 1) * torch.finfo(dtype).eps
    for a, b in zip(actual, expected, strict=True):
        assert ((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)).item()


def test_a_mapping_that_does_not_serve_a_size_says_so(gpu):
    for mapping, size, dtype in (
        ("thread", 21, torch.float32),
        ("thread", 13, torch.float64),
        ("group", 65, torch.float32),
    ):
        f = SymmetricBlocks.zeros(3, size, dtype, gpu)
        with (
            native.cuda_mapping(mapping),
            pytest.raises(ValueError, match=rf"factor: .*size {size} .*at most {size - 1}"),
        ):
            factor(f, damping=1.0)
    with pytest.raises(ValueError, match="warp"), native.cuda_mapping("warp"):
        pass


@pytest.mark.skipif("emulated" not in AVAILABLE, reason="no emulator in this build")
@pytest.mark.parametrize("mapping, dtype, size", SERVED, ids=str)
def test_no_result_depends_on_the_order_of_threads(mapping, dtype, size):
    """A missing barrier would show: threads run in order, in reverse or shuffled between barriers."""
    count = 9 if size <= 64 else 2
    results = []
    with use_backend("emulated"), native.cuda_mapping(mapping):
        try:
            for schedule in (0, 1, 7, 8):
                native.set_emulated_schedule(schedule)
                results.append(run_everything(count, size, dtype, "cpu"))
        finally:
            native.set_emulated_schedule(0)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("size", [9, 25])
def test_more_tensors_than_one_table_holds(gpu, size):
    """250 tensors in one call, one of them bad, against one call each."""
    counts = [1 + i % 4 for i in range(250)]
    tensors = [[randn(count, size, device=gpu, seed=4 * i + s) for s in range(3)] for i, count in enumerate(counts)]
    tensors[123][1][0] = torch.nan

    def step(indices):
        w, g, m = ([tensors[i][k].clone() for i in indices] for k in range(3))
        f = [SymmetricBlocks.from_dense(spd_blocks("well", counts[i], size, device=gpu, seed=i)) for i in indices]
        skipped = [torch.zeros((), dtype=torch.int64, device=gpu) for _ in indices]
        infos = mbf_step_(w, g, m, f, lr=0.1, momentum=0.9, decay=0.9, damping=0.1, skipped=skipped)
        return [[*result] for result in zip(w, m, [blocks.data for blocks in f], infos, skipped, strict=True)]

    together = step(range(250))
    for i in range(250):
        for a, b in zip(together[i], step([i])[0], strict=True):
            assert_bitwise(a, b)
    assert [int(result[-1]) for result in together] == [int(i == 123) for i in range(250)]


def test_storage_off_the_grid_of_16_bytes_is_refused(gpu):
    data = torch.zeros(1 + SymmetricBlocks.zeros(2, 25).data.numel(), device=gpu)[1:].view(2, -1)
    with pytest.raises(ValueError, match="16 bytes"):
        factor(SymmetricBlocks(data, 2, 25), damping=1.0)
