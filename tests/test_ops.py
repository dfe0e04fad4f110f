"""The five operations against dense float64 arithmetic: boundaries of count and size, strides, arguments.

Tolerances: accumulate rounds each element S + 5 times; a solution is as good as LAPACK's test ratio allows; a
step adds its own roundings. None is tuned.
"""

import numpy as np
import pytest
import torch
from brute_force import block_step
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mbf_kernels import SymmetricBlocks, accumulate_, accumulate_factor_solve_, factor, mbf_step_, solve, triton_ops
from mbf_kernels.testing import (
    assert_below,
    assert_bitwise,
    assert_factors,
    assert_padding_zero,
    assert_relative,
    assert_solves,
    padding,
    randn,
    solution_tolerance,
    spd_blocks,
)

COUNTS = (
    0,
    1,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    1000,
)  # around 4, 8, 16, 32 lanes and tiles
SIZES = (
    1,
    2,
    4,
    9,
    16,
    19,
    20,
    21,
    22,
    25,
    32,
    33,
    64,
    65,
    127,
    128,
    129,
    150,
)  # both layouts, padding, torch.linalg
CASES = [(count, size) for size in (4, 9, 20, 22) for count in COUNTS]
CASES += [(count, size) for size in SIZES for count in (2, 33 if size <= 64 else 5)]
DTYPES = (torch.float32, torch.float64)

over_cases = pytest.mark.parametrize("count, size", CASES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def eye(size, device=None):
    return torch.eye(size, dtype=torch.float64, device=device)


def accumulated(dense, g, decay):
    """decay F + (1 - decay) mean_s g_s g_s^T in float64, and the same of magnitudes, for bounds."""
    dense, g = dense.double(), g.double() if g.dim() == 3 else g.double()[None]
    outer = torch.einsum("sbi,sbj->bij", g, g) / len(g)
    magnitude = torch.einsum("sbi,sbj->bij", g.abs(), g.abs()) / len(g)
    return decay * dense + (1 - decay) * outer, decay * dense.abs() + (1 - decay) * magnitude


@over_cases
@over_dtypes
@pytest.mark.parametrize("samples", [None, 3])
def test_accumulate(backend, device, count, size, dtype, samples):
    dense = spd_blocks("well", count, size, dtype, device)
    f = SymmetricBlocks.from_dense(dense)
    shape = (count, size) if samples is None else (samples, count, size)
    g = randn(*shape, dtype=dtype, device=device)
    before = g.clone()
    assert accumulate_(f, g, decay=0.9) is f
    truth, magnitude = accumulated(dense, g, 0.9)
    assert_below((f.to_dense() - truth).abs(), ((samples or 1) + 5) * torch.finfo(dtype).eps * magnitude)
    assert_bitwise(g, before)
    assert_padding_zero(f)


@over_cases
@over_dtypes
def test_factor_and_solve(backend, device, count, size, dtype):
    dense = spd_blocks("fisher", count, size, dtype, device)
    f = SymmetricBlocks.from_dense(dense)
    before = f.data.clone()
    lower, info = factor(f, damping=0.1, relative=True)
    assert (info.shape, info.dtype, info.device) == ((count,), torch.int32, f.device) and not info.any()
    assert (lower.count, lower.size, lower.dtype) == (count, size, dtype)
    a = dense.double() + 0.1 * dense.double().diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * eye(size, device)
    assert_factors(a, lower.to_dense(), dtype)
    assert_bitwise(f.data, before)
    for shape in [(count, size), (count, size, 1), (count, size, 5)]:
        rhs = randn(*shape, dtype=dtype, device=device)
        x = solve(lower, rhs)
        assert x.shape == rhs.shape and x.dtype == dtype
        assert_solves(a, x, rhs, dtype)
        assert_bitwise(rhs, randn(*shape, dtype=dtype, device=device))
    assert_padding_zero(f)
    assert_padding_zero(lower)


@over_cases
@over_dtypes
def test_fused(backend, device, count, size, dtype):
    dense = spd_blocks("well", count, size, dtype, device)
    f = SymmetricBlocks.from_dense(dense)
    g, rhs = (randn(count, size, dtype=dtype, device=device, seed=s) for s in (1, 2))
    x, info = accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=0.1)
    assert info.shape == (count,) and info.dtype == torch.int32 and not info.any()
    truth, magnitude = accumulated(dense, g, 0.9)
    assert_below((f.to_dense() - truth).abs(), 6 * torch.finfo(dtype).eps * magnitude)
    assert_solves(truth + 0.1 * eye(size, device), x, rhs, dtype)
    assert_padding_zero(f)


@over_dtypes
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_decay_at_its_ends(backend, device, dtype, decay):
    """decay = 0 forgets the past, decay = 1 the present (F keeps every bit)."""
    dense = spd_blocks("well", 5, 9, dtype, device)
    f, g = SymmetricBlocks.from_dense(dense), randn(5, 9, dtype=dtype, device=device)
    accumulate_(f, g, decay=decay)
    truth, magnitude = accumulated(dense, g, decay)
    assert_below((f.to_dense() - truth).abs(), 6 * torch.finfo(dtype).eps * magnitude)
    if decay == 1:
        assert_bitwise(f.to_dense(), dense)


@pytest.mark.parametrize("size", [1, 4, 20, 21, 33, 128, 129])
@over_dtypes
def test_accumulate_of_nothing_keeps_f(backend, device, size, dtype):
    """S = 0 is an empty mean: refused, or F as it was; never NaN."""
    dense = spd_blocks("well", 3, size, dtype, device)
    f = SymmetricBlocks.from_dense(dense)
    try:
        accumulate_(f, torch.empty(0, 3, size, dtype=dtype, device=device), decay=0.9)
    except ValueError as error:
        assert str(error).startswith("accumulate_: ")
    assert_bitwise(f.to_dense(), dense)


@over_dtypes
def test_relative_damping_is_relative_to_each_block(backend, device, dtype):
    """Blocks scaled by powers of 4 have factors scaled by powers of 2, bit by bit."""
    dense = spd_blocks("well", 4, 9, dtype, device)[:1].repeat(4, 1, 1)
    power = torch.tensor([1.0, 2.0, 64.0, 2.0**-20], dtype=dtype, device=device)[:, None, None]
    lower, info = factor(SymmetricBlocks.from_dense(dense * power**2), damping=0.125, relative=True)
    assert not info.any()
    lower = lower.to_dense()
    assert_bitwise(lower, lower[:1] * power)


@pytest.mark.parametrize("size", [3, 9, 21, 40])
@over_dtypes
@pytest.mark.parametrize("layout", ["transposed", "every third", "offset", "expanded"])
def test_ops_read_any_strides(backend, device, size, dtype, layout):
    """g and rhs as views give the bits of their contiguous copies (a Gram sum of samples, and torch.linalg on some
    processors: the figures)."""

    def view(*shape, seed):
        if layout == "transposed":
            return randn(*reversed(shape), dtype=dtype, device=device, seed=seed).permute(*reversed(range(len(shape))))
        if layout == "every third":
            return randn(*shape[:-1], 3 * shape[-1], dtype=dtype, device=device, seed=seed)[..., 1::3]
        if layout == "offset":
            return randn(*(s + 2 for s in shape), dtype=dtype, device=device, seed=seed)[
                tuple(slice(1, -1) for _ in shape)
            ]
        return randn(*shape[:-1], 1, dtype=dtype, device=device, seed=seed).expand(shape)

    eye = torch.eye(size, dtype=dtype, device=device)
    results, matrices = [], []
    for strided in (lambda t: t, torch.Tensor.contiguous):
        f = SymmetricBlocks.from_dense(spd_blocks("well", 37, size, dtype, device))
        accumulate_(f, strided(view(37, size, seed=1)), decay=0.9)
        matrices.append(f.to_dense() + 0.1 * eye)
        lower, _ = factor(f, damping=0.1)
        x = solve(lower, strided(view(37, size, seed=3)))
        y = solve(lower, strided(view(37, size, 2, seed=4)))
        z, _ = accumulate_factor_solve_(
            f, strided(view(37, size, seed=5)), strided(view(37, size, seed=6)), decay=0.9, damping=1
        )
        matrices.append(f.to_dense() + eye)
        results.append((f.data, x.contiguous(), y.contiguous(), z.contiguous()))
    tolerance = 2 * max(solution_tolerance(a, dtype).max() for a in matrices)  # of two that may both be off
    for viewed, copied in zip(*results, strict=True):
        if backend == "reference":
            assert_relative(viewed, copied, tolerance)
        else:
            assert_bitwise(viewed, copied)
    g, f = view(4, 37, size, seed=7), SymmetricBlocks.zeros(37, size, dtype, device)
    truth, magnitude = accumulated(f.to_dense(), g, 0.5)
    assert_below((accumulate_(f, g, decay=0.5).to_dense() - truth).abs(), 9 * torch.finfo(dtype).eps * magnitude)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    seed=st.integers(0, 2**31), count=st.integers(0, 70), size=st.integers(1, 40), samples=st.integers(1, 4),
    sides=st.integers(1, 3), decay=st.floats(0, 1), damping=st.floats(1e-2, 1e3), relative=st.booleans(),
    magnitude=st.floats(1e-4, 1e4), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_random_calls(backend, device, seed, count, size, samples, sides, decay, damping, relative, magnitude, dtype):
    """accumulate_, factor and solve in a row, within the bound that the roundings of each allow."""
    assume(size <= triton_ops.MAX_SIZE or backend != "triton")
    g = magnitude * randn(samples, count, size, dtype=dtype, device=device, seed=seed)
    rhs = randn(count, size, sides, dtype=dtype, device=device, seed=seed + 1)
    dense = magnitude**2 * spd_blocks("well", count, size, dtype, device, seed)
    damping = damping if relative else damping * magnitude**2
    f = SymmetricBlocks.from_dense(dense)
    accumulate_(f, g, decay=decay)
    truth, size_of_terms = accumulated(dense, g, decay)
    assert_below((f.to_dense() - truth).abs(), (samples + 5) * torch.finfo(dtype).eps * size_of_terms)
    lower, info = factor(f, damping=damping, relative=relative)
    assert not info.any()
    ridge = damping * (truth.diagonal(dim1=1, dim2=2).mean(-1) if relative else truth.new_ones(count))
    a = truth + ridge[:, None, None] * eye(size, device)
    x = solve(lower, rhs)
    error = (x - torch.linalg.solve(a, rhs.double())).norm(dim=1).amax(-1)
    scale = torch.linalg.solve(a, rhs.double()).norm(dim=1).amax(-1)
    assert_below(error, solution_tolerance(a, dtype, samples) * scale)
    assert_padding_zero(f)
    assert_padding_zero(lower)


# ---- mbf_step_

OPTIONS = {
    "paper": dict(),
    "paper, decayed": dict(weight_decay=0.3, maximize=True),
    "paper, relative": dict(relative=True, nesterov=True),
    "no update": dict(update=False),
    "grafted": dict(graft="adam", relative=True, nesterov=True, momentum_weight=0.19, fisher_weight=0.0975),
    "grafted, heavy ball": dict(graft="adam", weight_decay=0.1, maximize=True, eps=1e-3),
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Problem:
    """Tensors of one block size: contiguous copies for the truth, and views by `place` for the op."""

    def __init__(self, counts, size, dtype, device, place=torch.clone, seed=0):
        self.size, self.dtype, self.device = size, dtype, device

        def draw(kind):
            options = dict(dtype=dtype, device=device)
            return [randn(count, size, seed=seed + 3 * i + kind, **options) for i, count in enumerate(counts)]

        self.w, self.g, self.m = (draw(kind) for kind in (1, 2, 3))
        self.f = [spd_blocks("well", count, size, dtype, device, seed + i) for i, count in enumerate(counts)]
        self.params, self.grads, self.momenta = ([place(t) for t in ts] for ts in (self.w, self.g, self.m))
        self.fishers = [SymmetricBlocks.from_dense(f) for f in self.f]

    def step(self, **options):
        return mbf_step_(self.params, self.grads, self.momenta, self.fishers, **(STEP | options))

    def tensors(self):
        """All that a step may change, as contiguous copies."""
        changed = [*self.params, *self.momenta, *(f.data for f in self.fishers)]
        return [t.detach().clone(memory_format=torch.contiguous_format) for t in changed]

    def check(self, **options):
        """Every result against block_step, in float64, block by block."""
        options = STEP | options
        lr, decayed = options["lr"], 1 - options["lr"] * options["weight_decay"]
        eps = torch.finfo(self.dtype).eps
        for i in range(len(self.w)):
            if not len(self.w[i]):
                continue
            blocks = zip(*(t[i].double().cpu().numpy() for t in (self.w, self.g, self.m, self.f)), strict=True)
            truth = [block_step(*block, **options) for block in blocks]
            w, m, f = (torch.from_numpy(np.stack(ts)).to(self.device) for ts in zip(*truth, strict=True))
            terms = self.m[i].abs() + self.g[i].abs()
            assert_below((self.momenta[i].reshape(m.shape) - m).abs(), 2 * eps * terms, "momentum")
            assert_below(
                (self.fishers[i].to_dense() - f).abs(),
                6 * eps * (f.abs() + self.f[i].abs() + terms[..., None] ** 2),
            )
            step = (w - decayed * self.w[i].double()).norm(dim=-1)
            ridge = torch.full_like(step, options["damping"])
            if options["relative"]:
                ridge *= f.diagonal(dim1=1, dim2=2).mean(-1)
            a = f + ridge[:, None, None] * eye(self.size, self.device)
            tolerance = solution_tolerance(a, self.dtype) * step * 2 + 4 * eps * self.w[i].norm(dim=-1)
            assert_below((self.params[i].reshape(w.shape) - w).norm(dim=-1), tolerance, f"weights at lr {lr}")
            assert_padding_zero(self.fishers[i])


STEP = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.5, weight_decay=0.0, relative=False)


@over_cases
@over_dtypes
@pytest.mark.parametrize("graft", [None, "adam"])
def test_step(backend, device, count, size, dtype, graft):
    problem = Problem([count], size, dtype, device)
    (info,) = problem.step(graft=graft)
    assert info.shape == (count,) and info.dtype == torch.int32 and not info.any()
    problem.check(graft=graft)


@over_options
@over_dtypes
@pytest.mark.parametrize("size", [1, 9, 25])
def test_step_options(backend, device, size, dtype, options):
    problem = Problem([33], size, dtype, device)
    problem.step(**options)
    problem.check(**options)


@over_dtypes
def test_step_on_many_tensors(backend, device, dtype):
    """One launch over tensors of different counts, one of them empty, is a launch on each: the same bits."""
    together = Problem([33, 0, 5, 1, 100], 9, dtype, device)
    infos = together.step(graft="adam")
    assert [info.shape for info in infos] == [(33,), (0,), (5,), (1,), (100,)]
    together.check(graft="adam")
    for i in range(5):
        alone = Problem([33, 0, 5, 1, 100], 9, dtype, device)
        for name in ("params", "grads", "momenta", "fishers"):
            setattr(alone, name, getattr(alone, name)[i : i + 1])
        alone.step(graft="adam")
        if backend != "reference":
            assert_bitwise(alone.params[0], together.params[i])
            assert_bitwise(alone.fishers[0].data, together.fishers[i].data)
    assert mbf_step_([], [], [], [], **STEP) == []


def test_step_with_one_bias_correction_per_tensor(backend, device):
    problem = Problem([5, 7], 9, torch.float64, device)
    problem.step(graft="adam", momentum_weight=[0.1, 0.19], fisher_weight=[0.1, 1.0])
    for i, weights in enumerate([(0.1, 0.1), (0.19, 1.0)]):
        alone = Problem([5, 7], 9, torch.float64, device)
        alone.step(graft="adam", momentum_weight=weights[0], fisher_weight=weights[1])
        assert_bitwise(problem.params[i], alone.params[i])


EXACT = dict(lr=0.125, damping=0.5, momentum_weight=0.1875, fisher_weight=0.125)  # in float32 as in float64


@over_dtypes
@pytest.mark.parametrize("number", DTYPES, ids=lambda dtype: f"number={dtype}")
@pytest.mark.parametrize("size", [1, 9, 25, 65, 129])
@pytest.mark.parametrize("options", ["paper, decayed", "grafted, heavy ball"])
def test_step_with_numbers_on_the_device(backend, device, size, dtype, number, options):
    """Tensors of either dtype serve as well as floats, one for all tensors or one for each, and mixed with floats."""
    options = OPTIONS[options] | EXACT
    tensors = {name: torch.tensor(value, dtype=number, device=device) for name, value in EXACT.items()}
    for numbers in (tensors | dict(fisher_weight=[tensors["fisher_weight"]] * 2), dict(lr=tensors["lr"])):
        problem = Problem([9, 5], size, dtype, device)
        problem.step(**options | numbers)
        problem.check(**options)
    assert all(tensor.item() == EXACT[name] for name, tensor in tensors.items())


@over_dtypes
@pytest.mark.parametrize("number", DTYPES, ids=lambda dtype: f"number={dtype}")
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("size", [1, 9, 25, 65, 129])
def test_damping_on_the_device(backend, device, size, dtype, number, relative):
    """The bits of the float."""
    tensor = torch.tensor(0.5, dtype=number, device=device)
    g, rhs = (randn(9, size, dtype=dtype, device=device, seed=s) for s in (1, 2))
    results = []
    for damping in (0.5, tensor):
        f = SymmetricBlocks.from_dense(spd_blocks("well", 9, size, dtype, device))
        lower, _ = factor(f, damping=damping, relative=relative)
        x, _ = accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=damping, relative=relative)
        results.append((lower.data, x, f.data))
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)


def test_numbers_on_the_device_can_be_changed_in_place(backend, device):
    lr = torch.tensor(0.125, device=device)
    problem, other = (Problem([5], 9, torch.float32, device) for _ in range(2))
    lr.fill_(0.25)
    problem.step(lr=lr)
    other.step(lr=0.25)
    assert_bitwise(problem.params[0], other.params[0])


@over_dtypes
@pytest.mark.parametrize("size", [9, 22, 129])
def test_step_with_cached_factors(backend, device, size, dtype):
    """refactor=True stores what factor() would; refactor=False uses it as it is, whatever F has become."""
    problem = Problem([33], size, dtype, device)
    factors = [SymmetricBlocks.zeros(33, size, dtype, device)]
    problem.step(factors=factors, refactor=True)
    problem.check()
    expected, _ = factor(problem.fishers[0], damping=STEP["damping"])
    eps = torch.finfo(dtype).eps
    assert_relative(factors[0].to_dense(), expected.to_dense(), 30 * size * eps)
    kept, w, m = factors[0].data.clone(), problem.params[0].clone(), problem.momenta[0].clone()
    problem.step(factors=factors, refactor=False, damping=123.0)
    assert_bitwise(factors[0].data, kept)
    assert_padding_zero(factors[0])
    lower = factors[0].to_dense().double().tril()
    direction = 0.9 * m + problem.g[0]
    assert_solves(lower @ lower.mT, (w - problem.params[0]).double() / STEP["lr"], direction, dtype)


def empty(*shape):
    """A maker of a new tensor of this shape, with the dtype and device of an old one."""
    return lambda t, **options: torch.empty(shape, dtype=t.dtype, device=t.device, **options)


def layouts(count, size):
    """Views that hold [B, n]; B and n are multiples of 3."""
    o, k = count // 3, size // 3
    return {
        "contiguous": lambda t: empty(count, size)(t),
        "columns": lambda t: empty(size, count)(t).t(),
        "conv": lambda t: empty(o, 3, size)(t),
        "channels_last": lambda t: empty(o, 3, k, 3)(t, memory_format=torch.channels_last),
        "channels_last_3d": lambda t: empty(o, 3, k, 1, 3)(t, memory_format=torch.channels_last_3d),
        "grid": lambda t: empty(3, count, k)(t).permute(1, 0, 2),  # tiles of a matrix
        "every third": lambda t: empty(count, 3 * size)(t)[:, 1::3],
        "middle": lambda t: empty(count + 2, size + 5)(t)[1:-1, 2:-3],
        "deep middle": lambda t: empty(count, 5, k + 1)(t)[:, 1:4, :-1],
        "permuted filters": lambda t: empty(3, o, k, 2, 3)(t)[:, :, :, 0].permute(1, 0, 3, 2),
    }


def place(layout):
    """A function that moves [B, n] into a view of a larger storage filled with canaries."""

    def move(t):
        view = layouts(*t.shape)[layout](t)
        view.untyped_storage().fill_(0x5A)
        return view.copy_(t.reshape(view.shape))

    return move


@pytest.mark.parametrize("layout", layouts(33, 9))
@pytest.mark.parametrize("size", [9, 21])
@over_dtypes
@pytest.mark.parametrize("graft", [None, "adam"])
def test_step_in_place_on_any_strides(backend, device, layout, size, dtype, graft):
    """Views give the bits of contiguous tensors, keep their place, and change nothing around them."""
    plain, viewed = (Problem([33], size, dtype, device, place=place(name)) for name in ("contiguous", layout))
    where = [(t.data_ptr(), t.stride()) for t in (*viewed.params, *viewed.momenta)]
    used = [torch.zeros_like(whole(t), dtype=torch.bool) for t in (*viewed.params, *viewed.momenta)]
    for t, mask in zip((*viewed.params, *viewed.momenta), used, strict=True):
        mask.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
    canaries = [whole(t)[~mask].clone() for t, mask in zip((*viewed.params, *viewed.momenta), used, strict=True)]
    grads = [whole(t).clone() for t in viewed.grads]
    for problem in (plain, viewed):
        problem.step(graft=graft, weight_decay=0.1)
    viewed.check(graft=graft, weight_decay=0.1)
    assert where == [(t.data_ptr(), t.stride()) for t in (*viewed.params, *viewed.momenta)]
    for a, b in zip(plain.tensors(), viewed.tensors(), strict=True):
        if backend == "reference":  # torch.linalg keeps its accuracy, not its bits
            assert_relative(a.flatten(), b.flatten(), 30 * size * torch.finfo(dtype).eps * 100)
        else:
            assert_bitwise(a.flatten(), b.flatten())
    for t, mask, canary in zip((*viewed.params, *viewed.momenta), used, canaries, strict=True):
        assert_bitwise(whole(t)[~mask], canary)
    for t, before in zip(viewed.grads, grads, strict=True):
        assert_bitwise(whole(t), before)


@over_dtypes
def test_step_on_strides_of_many_levels(backend, device, dtype):
    """Three dimensions of blocks and three of elements, none of which merge."""

    def reverse(t):
        return empty(2, 2, 2, 4, 3, 2)(t).permute(5, 4, 3, 2, 1, 0).copy_(t.view(2, 3, 4, 2, 2, 2))

    problem = Problem([24], 8, dtype, device, place=reverse)
    strides = problem.params[0].stride()
    problem.step()
    problem.check()
    assert problem.params[0].stride() == strides


def whole(t):
    """The whole storage under a view, as a vector."""
    length = t.untyped_storage().nbytes() // t.element_size()
    return t.as_strided((length,), (1,), 0)


@pytest.mark.parametrize("size", [9, 22])
@over_dtypes
def test_nothing_is_written_beyond_the_storage(backend, device, size, dtype):
    """F, factor and solution lie between canaries, and the canaries live."""
    problem = Problem([33], size, dtype, device)
    f = problem.fishers[0]
    room = torch.full((f.data.numel() + 128,), 7.0, dtype=dtype, device=device)
    room[64:-64] = f.data.flatten()
    f.data = room[64:-64].view(f.data.shape)
    problem.step()
    accumulate_(f, problem.g[0], decay=0.9)
    accumulate_factor_solve_(f, problem.g[0], problem.m[0], decay=0.9, damping=0.1)
    assert (room[:64] == 7).all() and (room[-64:] == 7).all()
    assert not (room[64:-64] == 7).all() and padding(f).numel() and not padding(f).any()


def test_mixed_layouts_in_one_call(backend, device):
    """Parameter, gradient and momentum of one tensor may each have their own strides."""
    mixed = Problem([33], 9, torch.float64, device)
    mixed.params = [place("channels_last")(t) for t in mixed.w]
    mixed.grads = [place("conv")(t).view(11, 3, 3, 3) for t in mixed.g]
    mixed.momenta = [place("every third")(t).unflatten(0, (11, 3)).unflatten(2, (3, 3)) for t in mixed.m]
    mixed.step()
    mixed.check()


# ---- the method


def test_fixture_of_a_2x2_filter(backend, device):
    """g = [1, -1, 2, 0], m = [1, 2, 3, 4], lambda = 0.5 -> P = [0.461538, 5.538462, 2.923077, 8.0]."""
    g, m = (torch.tensor([v], dtype=torch.float64, device=device) for v in ([1, -1, 2, 0], [1, 2, 3, 4]))
    expected = torch.tensor([[0.461538, 5.538462, 2.923077, 8.0]], dtype=torch.float64, device=device)
    printed = 5e-7  # half a unit of the last printed digit
    f = SymmetricBlocks.zeros(1, 4, torch.float64, device)
    x, _ = accumulate_factor_solve_(f, g, m, decay=0.0, damping=0.5)
    assert_below((x - expected).abs(), printed)
    lower, _ = factor(SymmetricBlocks.from_dense(g[:, :, None] * g[:, None, :]), damping=0.5)
    assert_below((solve(lower, m) - expected).abs(), printed)
    w, momentum = torch.zeros(1, 1, 2, 2, dtype=torch.float64, device=device), (2 * (m - g)).view(1, 1, 2, 2)
    f = SymmetricBlocks.zeros(1, 4, torch.float64, device)
    mbf_step_([w], [g.view(1, 1, 2, 2)], [momentum], [f], lr=1.0, momentum=0.5, decay=0.0, damping=0.5)
    assert_below((-w.view(1, 4) - expected).abs(), printed)
    assert_bitwise(momentum.view(1, 4), m)


@over_dtypes
@pytest.mark.parametrize("size", [1, 9, 25, 129])
def test_large_damping_is_momentum_sgd(backend, device, size, dtype):
    """P1: lambda P -> M, with |P| <= |M| / lambda: relative difference |F| / lambda, and rounding."""
    eps = torch.finfo(dtype).eps
    g, m = (randn(5, size, dtype=dtype, device=device, seed=s) for s in (1, 2))
    f = SymmetricBlocks.zeros(5, size, dtype, device)
    damping = 1e4
    x, _ = accumulate_factor_solve_(f, g, m, decay=0.0, damping=damping)
    rounding = 30 * size * eps
    bound = (g.square().sum(-1) / damping + rounding) * m.norm(dim=-1)
    assert_below((damping * x - m).norm(dim=-1), bound)
    assert_below(damping * x.norm(dim=-1), m.norm(dim=-1) * (1 + rounding))


@over_dtypes
@pytest.mark.parametrize("size", [1, 4, 9, 20, 21, 64, 129])
def test_one_outer_product_has_a_closed_form(backend, device, size, dtype):
    """P2: (g g^T + lambda I)^-1 g = g / (lambda + |g|^2)."""
    g = randn(33, size, dtype=dtype, device=device)
    f = SymmetricBlocks.zeros(33, size, dtype, device)
    x, _ = accumulate_factor_solve_(f, g, g, decay=0.0, damping=0.5)
    square = g.double().square().sum(-1, keepdim=True)
    expected = g.double() / (0.5 + square)
    a = g.double()[:, :, None] * g.double()[:, None, :] + 0.5 * eye(size, device)
    assert_below((x - expected).norm(dim=-1), solution_tolerance(a, dtype) * expected.norm(dim=-1))


@over_dtypes
def test_scaling_the_loss(backend, device, dtype):
    """P4: with g and M scaled by c and lambda by c^2, P scales by 1 / c; exactly so for a power of two."""
    g, m = (randn(33, 9, dtype=dtype, device=device, seed=s) for s in (1, 2))
    results = []
    for c in (1.0, 8.0):
        f = SymmetricBlocks.zeros(33, 9, dtype, device)
        results.append(accumulate_factor_solve_(f, c * g, c * m, decay=0.5, damping=0.25 * c * c)[0])
    assert_bitwise(results[0], results[1] * 8)


def test_zero_gradient_only_decays(backend, device):
    """A dead block, F = 0 and M = 0, has no direction: its weights decay and stay finite."""
    for options in OPTIONS.values():
        w, zero = randn(5, 9, device=device), torch.zeros(5, 9, dtype=torch.float64, device=device)
        expected = w * (1 - 0.1 * 0.2)
        fisher = SymmetricBlocks.zeros(5, 9, torch.float64, device)
        (info,) = mbf_step_([w], [zero], [zero.clone()], [fisher], **(STEP | options | dict(weight_decay=0.2)))
        assert not info.any()
        assert_relative(w, expected, 4 * torch.finfo(torch.float64).eps)
