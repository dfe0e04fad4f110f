"""mbf_shared_step_ against a float64 step of explicit loops: sizes and counts around every boundary, layouts, options.

Tolerances: M and v round twice and four times; F, a mean of S products, S + 5 times, element by element. P has the
backward error of LAPACK's pass mark, the rounding of F and of D, each times the condition; a grafted step has the
error of |P| once more and that of |u|. All are formed from the truth, none is tuned.
"""

import numpy as np
import pytest
import torch
from brute_force import damped_matrix, shared_step

from mbf_kernels import SymmetricBlocks, factor, mbf_shared_step_
from mbf_kernels.testing import (
    RATIO,
    assert_below,
    assert_bitwise,
    assert_padding_zero,
    assert_relative,
    randn,
    spd_blocks,
)

# Lanes, tiles of 6 mini-blocks, chunks of 64, storage (20), torch.linalg (129).
SIZES = (*range(1, 18), 20, 21, 31, 32, 33, 63, 64, 65, 127, 128, 129)
SAMPLES = (1, 5, 6, 7, 63, 64, 65, 130)
CASES = [(n, SAMPLES[i % len(SAMPLES)], (1, 2, 5)[i % 3] if n < 64 else 2) for i, n in enumerate(SIZES)]
CASES += [(n, s, 2) for n in (3, 9, 17, 33) for s in SAMPLES]
DTYPES = (torch.float32, torch.float64)
STEP = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.5)
OPTIONS = {
    "paper": dict(),
    "no momentum": dict(momentum=0.0, momentum_weight=1.0),
    "decayed": dict(weight_decay=0.3, maximize=True),
    "relative": dict(relative=True, nesterov=True),
    "no update": dict(update=False),
    "grafted": dict(graft="adam", relative=True, nesterov=True, momentum_weight=0.19, square_weight=0.001999),
    "grafted, heavy ball": dict(graft="adam", weight_decay=0.1, maximize=True, eps=1e-3, diagonal_decay=0.9),
    "grafted, no momentum": dict(graft="adam", momentum=0.0, diagonal_decay=0.0, update=False),
}

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def apart(t):
    """[S, R, n] as it is."""
    return t.clone()


class Problem:
    """Tensors of one size: [S, R, n] for the truth, and what ``place`` makes of them for the op."""

    def __init__(self, shapes, size, dtype, device, place=apart, seed=0):
        self.size, self.dtype, self.device = size, dtype, device

        def draw(kind, i, shape):
            return randn(*shape, size, dtype=dtype, device=device, seed=seed + 10 * i + kind)

        self.w, self.g, self.m, v = ([draw(kind, i, shape) for i, shape in enumerate(shapes)] for kind in (1, 2, 3, 4))
        self.v = [t.square() for t in v]
        self.f = [spd_blocks("well", shape[1], size, dtype, device, seed + i) for i, shape in enumerate(shapes)]
        placed = ([place(t) for t in ts] for ts in (self.w, self.g, self.m, self.v))
        self.params, self.grads, self.momenta, self.squares = placed
        self.fishers = [SymmetricBlocks.from_dense(f) for f in self.f]

    def step(self, **options):
        lists = (self.params, self.grads, self.momenta, self.squares, self.fishers)
        return mbf_shared_step_(*lists, **(STEP | options))

    def results(self, i):
        """W, M and v as [S, R, n], and F."""
        tensors = [
            gather(ts[i]).reshape(-1, self.fishers[i].count, self.size)
            for ts in (self.params, self.momenta, self.squares)
        ]
        return *tensors, self.fishers[i].to_dense()

    def check(self, **options):
        options = STEP | options
        for i in range(len(self.w)):
            arrays = [t[i].double().cpu().numpy() for t in (self.w, self.g, self.m, self.v, self.f)]
            check(self.results(i), arrays, self.dtype, **options)
            assert_padding_zero(self.fishers[i])


def gather(entry):
    """A copy of a tensor, or of [*samples, 1, n - 1] and [*samples] as one."""
    if isinstance(entry, torch.Tensor):
        return entry.clone(memory_format=torch.contiguous_format)
    main, last = entry
    return torch.cat([main.reshape(last.numel(), -1), last.reshape(-1, 1)], 1)


def check(results, before, dtype, **options):
    """W, M, v and F of one tensor against shared_step of what was before."""
    w, g, m, v, f = before
    truth = shared_step(*before, **options)
    actual = [t.double().cpu().numpy() for t in results]
    eps, grafted = torch.finfo(dtype).eps, options.get("graft") == "adam"
    terms = np.abs(m) + np.abs(g)
    within(actual[1] - truth[1], 2 * eps * terms, "momentum")
    within(actual[2] - truth[2], 4 * eps * truth[2] if grafted else 0 * v, "second moment")
    magnitude = [np.einsum("si,sj->ij", *[np.abs(g[:, r])] * 2) / len(g) for r in range(len(f))]
    rounding = (len(g) + 5) * eps * (np.abs(f) + np.stack(magnitude)) * options.get("update", True)
    within(actual[3] - truth[3], rounding, "F")

    d = options["momentum"] * truth[1] + (-g if options.get("maximize") else g)
    d = d if options.get("nesterov") else truth[1]
    moved = norms(truth[0] - (1 - options["lr"] * options.get("weight_decay", 0.0)) * w)
    for r in range(len(f)):
        damped = options.get("damped")
        a = damped[r] if damped is not None else damped_matrix(truth[3][r], options["damping"], options.get("relative"))
        inverse = np.linalg.inv(a)
        p, of_d = norms(d[:, r] @ inverse), norms(4 * eps * terms[:, r]) * norm2(inverse)
        of_p = eps * RATIO * len(a) * np.linalg.cond(a) + norm2(inverse) * norm2(rounding[r]) + ratio(of_d, p)
        relative = 2 * of_p + 4 * eps
        if grafted:
            lengths = np.sqrt(truth[2][:, r] / options.get("square_weight", 1.0)) + options.get("eps", 1e-8)
            relative += ratio(norms(4 * eps * terms[:, r] / lengths), norms(d[:, r] / lengths)) + 10 * eps
        bound = relative * moved[:, r] + 4 * eps * norms(w[:, r])
        within(norms(actual[0][:, r] - truth[0][:, r]), bound, "weights")


def norms(x):
    return np.linalg.norm(x, axis=-1)


def norm2(x):
    return np.linalg.norm(x, 2)


def ratio(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def within(error, bound, what):
    assert_below(torch.from_numpy(np.abs(error)), torch.from_numpy(np.asarray(bound)), what)


@pytest.mark.parametrize("size, samples, matrices", CASES)
@pytest.mark.parametrize("dtype, graft", [(torch.float32, None), (torch.float32, "adam"), (torch.float64, "adam")])
def test_sizes(backend, device, size, samples, matrices, dtype, graft):
    problem = Problem([(samples, matrices)], size, dtype, device)
    (info,) = problem.step(graft=graft)
    assert info.shape == (matrices,) and info.dtype == torch.int32 and not info.any()
    problem.check(graft=graft)


@over_options
@over_dtypes
@pytest.mark.parametrize("size", [1, 9, 25, 130])
def test_options(backend, device, size, dtype, options):
    problem = Problem([(7, 2)], size, dtype, device)
    problem.step(**options)
    problem.check(**options)


def test_the_check_sees_wrong_results():
    """A weight, momentum, second moment or entry of F that is wrong by 1e-3, or NaN, fails."""
    for which in range(4):
        for wrong in (1 + 1e-3, torch.nan):
            problem = Problem([(7, 2)], 9, torch.float32, "cpu")
            problem.step(graft="adam")
            problem.check(graft="adam")
            written = (problem.params[0], problem.momenta[0], problem.squares[0], problem.fishers[0].data)
            tensor = written[which]
            tensor.view(-1)[0] *= wrong
            with pytest.raises(AssertionError):
                problem.check(graft="adam")


@over_dtypes
@pytest.mark.parametrize("graft", [None, "adam"])
def test_many_tensors(backend, device, dtype, graft):
    """One call over tensors of other counts, with weights of their own, is a call on each."""
    shapes = [(7, 2), (130, 1), (1, 5), (6, 3)]
    weights = dict(momentum_weight=[0.1, 0.19, 1.0, 0.5], square_weight=[0.001, 0.002, 1.0, 0.25])
    together = Problem(shapes, 9, dtype, device)
    infos = together.step(graft=graft, **weights)
    assert [len(info) for info in infos] == [2, 1, 5, 3]
    for i in range(len(shapes)):
        alone = Problem(shapes, 9, dtype, device)
        for name in ("params", "grads", "momenta", "squares", "fishers"):
            setattr(alone, name, getattr(alone, name)[i : i + 1])
        mine = {name: values[i] for name, values in weights.items()}
        alone.step(graft=graft, **mine)
        arrays = [t[i].double().cpu().numpy() for t in (together.w, together.g, together.m, together.v, together.f)]
        check(together.results(i), arrays, dtype, **(STEP | dict(graft=graft) | mine))
        if backend == "cpu":
            for a, b in zip(alone.results(0), together.results(i), strict=True):
                assert_bitwise(a, b)


def test_nothing_to_do(backend, device):
    """No tensors; tensors without mini-blocks, alone and beside others, whose F stays."""
    assert mbf_shared_step_([], [], [], None, [], **STEP) == []
    for samples in (0, 7):
        problem = Problem([(0, 2), (samples, 2), (0, 3)], 9, torch.float64, device)
        infos = problem.step(graft="adam")
        assert [len(info) for info in infos] == [2, 2, 3]
        for i in (0, 2):
            assert_bitwise(problem.fishers[i].to_dense(), problem.f[i])
    arrays = [t[1].double().cpu().numpy() for t in (problem.w, problem.g, problem.m, problem.v, problem.f)]
    check(problem.results(1), arrays, torch.float64, **STEP, graft="adam")


@over_dtypes
@pytest.mark.parametrize("size", [1, 9, 22, 129])
@pytest.mark.parametrize("graft", [None, "adam"])
def test_cached_factors(backend, device, size, dtype, graft):
    """Stored where F is factored, what factor() makes; used as they are otherwise, whatever F has become."""
    problem = Problem([(7, 2)], size, dtype, device)
    factors = [SymmetricBlocks.zeros(2, size, dtype, device)]
    problem.step(factors=factors, graft=graft)
    problem.check(graft=graft)
    expected, _ = factor(problem.fishers[0], damping=STEP["damping"])
    assert_relative(factors[0].to_dense(), expected.to_dense(), RATIO * size * torch.finfo(dtype).eps)
    assert_padding_zero(factors[0])

    kept, lower = factors[0].data.clone(), factors[0].to_dense().double().tril()
    before = [t.double().cpu().numpy() for t in problem.results(0)]
    options = STEP | dict(graft=graft, damping=123.0)
    problem.step(factors=factors, refactor=False, **options)
    assert_bitwise(factors[0].data, kept)
    w, m, v, f = before
    truth = (w, problem.g[0].double().cpu().numpy(), m, v, f)
    check(problem.results(0), truth, dtype, **options, damped=(lower @ lower.mT).cpu().numpy())


EXACT = dict(lr=0.125, damping=0.5, momentum_weight=0.1875, square_weight=0.125)  # in float32 as in float64


@over_dtypes
@pytest.mark.parametrize("number", DTYPES, ids=lambda dtype: f"number={dtype}")
@pytest.mark.parametrize("options", ["decayed", "grafted, heavy ball"])
def test_numbers_on_the_device(backend, device, dtype, number, options):
    options = OPTIONS[options] | EXACT
    tensors = {name: torch.tensor(value, dtype=number, device=device) for name, value in EXACT.items()}
    one_each = tensors | dict(square_weight=[tensors["square_weight"]] * 2)
    for numbers in (tensors, one_each, dict(damping=tensors["damping"])):
        problem = Problem([(7, 2), (3, 1)], 9, dtype, device)
        problem.step(**options | numbers)
        problem.check(**options)
    assert all(tensor.item() == EXACT[name] for name, tensor in tensors.items())


def test_a_number_on_the_device_loses_nothing_beside_a_zero_matrix(backend, device):
    """lambda is 1 there, to the last bits of float64, though 1 + damping has no exact float32."""
    damping = torch.tensor(0.3, dtype=torch.float32, device=device)
    problem = Problem([(7, 2)], 9, torch.float64, device)
    problem.f[0].zero_()
    problem.fishers[0].data.zero_()
    problem.step(damping=damping, relative=True, update=False)
    problem.check(damping=damping.item(), relative=True, update=False)


# ---- layouts


def empty(like, *shape, strides=None):
    options = dict(dtype=like.dtype, device=like.device)
    return torch.empty(shape, **options) if strides is None else torch.empty_strided(shape, strides, **options)


LAYOUTS = {  # views that hold [S, R, n], S a multiple of 6, n of 3
    "contiguous": lambda t: empty(t, *t.shape),
    "matrices last": lambda t: empty(t, t.shape[0], t.shape[2], t.shape[1]).transpose(1, 2),
    "columns": lambda t: empty(t, *t.shape[::-1]).permute(2, 1, 0),
    "samples of two levels": lambda t: empty(t, t.shape[0] // 3, 3, *t.shape[1:]).transpose(0, 1),
    "elements of two levels": lambda t: empty(t, *t.shape[:2], t.shape[2] // 3, 3).transpose(2, 3),
    "both of two levels": lambda t: empty(t, 3, 5, *t.shape[1:])[:, : t.shape[0] // 3].unflatten(3, (-1, 3)).mT,
    "every third element": lambda t: empty(t, *t.shape[:2], 3 * t.shape[2])[..., 1::3],
    "middle": lambda t: empty(t, *(s + 3 for s in t.shape))[1:-2, 2:-1, 1:-2],
    "samples apart": lambda t: empty(t, 2 * t.shape[0], *t.shape[1:])[::2],
    "samples of three levels": lambda t: empty(t, 3, 2, t.shape[0] // 6, *t.shape[1:]).permute(2, 1, 0, 3, 4),
    "all reversed": lambda t: empty(t, 3, t.shape[2] // 3, t.shape[1], 2, t.shape[0] // 2).permute(4, 3, 2, 1, 0),
    "rows of 16 bytes": lambda t: empty(t, *t.shape, strides=(48 * t.shape[1], 48, 1)),
}  # fmt: skip


def place(layout):
    """A function that moves [S, R, n] into a view of a larger storage of canaries."""

    def move(t):
        view = LAYOUTS[layout](t)
        view.untyped_storage().fill_(0x5A)
        return view.copy_(t.reshape(view.shape))

    return move


def whole(t):
    """The whole storage under a view, as a vector."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def untouched(t):
    mask = torch.ones_like(whole(t), dtype=torch.bool)
    mask.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return whole(t)[mask]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [9, 21])
@over_dtypes
def test_in_place_on_any_strides(backend, device, layout, size, dtype, graft="adam"):
    """Views give the figures of contiguous tensors, of the CPU kernels the bits, and nothing around them changes."""
    plain, viewed = (Problem([(12, 2)], size, dtype, device, place(name)) for name in ("contiguous", layout))
    written = (viewed.params[0], viewed.momenta[0], viewed.squares[0])
    where = [(t.data_ptr(), t.stride()) for t in written]
    canaries, gradient = [untouched(t).clone() for t in written], whole(viewed.grads[0]).clone()
    for problem in (plain, viewed):
        problem.step(graft=graft, weight_decay=0.1)
    viewed.check(graft=graft, weight_decay=0.1)
    assert where == [(t.data_ptr(), t.stride()) for t in written]
    if backend == "cpu":
        for a, b in zip(plain.results(0), viewed.results(0), strict=True):
            assert_bitwise(a.contiguous(), b.contiguous())
    for t, canary in zip(written, canaries, strict=True):
        assert_bitwise(untouched(t), canary)
    assert_bitwise(whole(viewed.grads[0]), gradient)


def test_mixed_layouts(backend, device):
    """Parameter, gradient, momentum and second moment of one tensor may each have their own."""
    names = [name for name, view in LAYOUTS.items() if view(torch.empty(12, 2, 9)).ndim == 3]
    for first in range(len(names)):
        problem = Problem([(12, 2)], 9, torch.float64, device)
        for i, kind in enumerate("wgmv"):
            tensors = [place(names[(first + 3 * i) % len(names)])(t) for t in getattr(problem, kind)]
            setattr(problem, {"w": "params", "g": "grads", "m": "momenta", "v": "squares"}[kind], tensors)
        problem.step(graft="adam")
        problem.check(graft="adam")


# ---- a bias that joins


def pair(rows=None, gaps=False):
    """[S, 1, n] as the first n - 1 elements of a row and the last: contiguous, or in larger storage."""

    def split(t):
        main, last = t[:, :, :-1], t[:, 0, -1]
        if not gaps:
            return main.clone(memory_format=torch.contiguous_format), last.clone()
        room = empty(t, t.shape[0], 1, t.shape[2] + 4)
        spaced = empty(t, 3 * t.shape[0])
        return room[:, :, 2 : t.shape[2] + 1].copy_(main), spaced[1::3].copy_(last)

    return split


@pytest.mark.parametrize("size, samples", [(n, SAMPLES[i % len(SAMPLES)]) for i, n in enumerate(SIZES) if n > 1])
@over_dtypes
def test_a_bias_joins(backend, device, size, samples, dtype):
    """The pair gives the bits of the tensor that has both, where kernels serve it, and nothing around it changes."""
    joined = Problem([(samples, 1)], size, dtype, device, pair(gaps=size % 2 == 0))
    written = [part for entry in (joined.params[0], joined.momenta[0], joined.squares[0]) for part in entry]
    canaries = [untouched(t).clone() for t in written]
    graft = "adam" if samples % 2 else None
    joined.step(graft=graft)
    joined.check(graft=graft)
    for t, canary in zip(written, canaries, strict=True):
        assert_bitwise(untouched(t), canary)
    if backend == "cpu":
        whole_rows = Problem([(samples, 1)], size, dtype, device)
        whole_rows.step(graft=graft)
        for a, b in zip(joined.results(0), whole_rows.results(0), strict=True):
            assert_bitwise(a, b)


def test_pairs_beside_tensors(backend, device):
    """In one call, with the elements of the pair strided as a transposed weight has them."""
    problem = Problem([(7, 1), (7, 2), (5, 1)], 9, torch.float64, device)
    for name in ("params", "grads", "momenta", "squares"):
        tensors = getattr(problem, name)
        main, last = pair()(tensors[0])
        tensors[0] = main.permute(2, 1, 0).contiguous().permute(2, 1, 0), last
        tensors[2] = pair(gaps=True)(tensors[2])
    problem.step(graft="adam")
    problem.check(graft="adam")


# ---- accuracy


@pytest.mark.parametrize("size", [2, 9, 17, 33, 64, 127, 129])
@pytest.mark.parametrize("graft", [None, "adam"])
def test_ill_conditioned_directions(backend, device, size, graft):
    """In float32, with damping 1e-6 of the mean diagonal and F of three outer products: the direction is as good as a
    Cholesky factor in float32 allows, an error of n eps times the condition number, from the F that is stored."""
    dtype, samples, matrices = torch.float32, 12, 3
    g = randn(3, matrices, size, dtype=dtype, device=device, seed=size)
    dense = (g.transpose(0, 1).mT @ g.transpose(0, 1)) + 1e-3 * torch.eye(size, device=device)
    dense = (dense + dense.mT) / 2
    problem = Problem([(samples, matrices)], size, dtype, device)
    problem.fishers = [SymmetricBlocks.from_dense(dense)]
    problem.g[0].copy_(g.repeat(4, 1, 1) * problem.g[0][..., :1])  # in the range of F, and as large as it gets there
    problem.grads[0].copy_(problem.g[0])
    (info,) = problem.step(momentum=0.0, update=False, relative=True, damping=1e-6, graft=graft)
    assert not info.any()

    f = problem.fishers[0].to_dense().double()
    mean = f.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    a = f + 1e-6 * mean * torch.eye(size, dtype=torch.float64, device=device)
    truth = torch.linalg.solve(a, problem.g[0].double().permute(1, 2, 0)).permute(2, 0, 1)
    rounded = torch.finfo(dtype).eps * 2 * problem.w[0].double().norm(dim=2)  # of the weights, which hide the step
    moved = (problem.w[0].double() - problem.params[0].double()) / STEP["lr"]
    if graft:
        moved, truth = moved / moved.norm(dim=2, keepdim=True), truth / truth.norm(dim=2, keepdim=True)
        rounded = rounded / (problem.w[0] - problem.params[0]).double().norm(dim=2) * STEP["lr"]
    condition = torch.linalg.cond(a)
    bound = size * torch.finfo(dtype).eps * condition * truth.norm(dim=2) + rounded / STEP["lr"]
    assert_below((moved - truth).norm(dim=2), bound, "direction")


@over_dtypes
def test_a_step_does_not_depend_on_the_scale_of_the_loss(backend, device, dtype):
    """Grafted with relative damping: g, M scaled by 2^k, v and F by 4^k, eps 0. From 2^-30 to 2^30 the same weights."""
    first = None
    for power in (-30, 0, 30):
        problem = Problem([(7, 2)], 9, dtype, device)
        for tensors, scale in ((problem.grads, 1), (problem.momenta, 1), (problem.squares, 2)):
            tensors[0].mul_(2.0 ** (power * scale))
        problem.fishers = [SymmetricBlocks.from_dense(problem.f[0] * 4.0**power)]
        problem.step(graft="adam", relative=True, eps=0.0)
        first = problem.params[0] if first is None else first
        # n = 9, condition <= (sum of eigenvalues + mean) / mean = n + 1
        assert_relative(problem.params[0], first, 2 * RATIO * 9 * 10 * torch.finfo(dtype).eps)


@over_dtypes
@pytest.mark.parametrize("graft", [None, "adam"])
def test_a_direction_may_be_of_any_length(backend, device, dtype, graft):
    """F scaled by 2^k, and without grafting the rate too: the same weights, also where |P|^2 is out of range."""
    first = None
    for power in (0, -100, 100):
        problem = Problem([(7, 2)], 9, dtype, device)
        problem.fishers = [SymmetricBlocks.from_dense(problem.f[0] * 2.0**power)]
        (info,) = problem.step(
            lr=0.1 * (1 if graft else 2.0**power), graft=graft, relative=True, update=False, weight_decay=0.0
        )
        assert not info.any()
        first = problem.params[0] if first is None else first
        assert_relative(problem.params[0], first, 2 * RATIO * 9 * 10 * torch.finfo(dtype).eps)


@over_dtypes
def test_a_rate_that_overflows_moves_nothing(backend, device, dtype):
    """|u| is finite, but not the rate that makes a step of its length."""
    problem = Problem([(7, 2)], 9, dtype, device)
    problem.squares[0].zero_()
    problem.grads[0].zero_()
    before = [t[0].clone() for t in (problem.params, problem.momenta, problem.squares)]
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    largest = torch.finfo(dtype).max
    problem.step(graft="adam", eps=largest**-0.45, lr=largest**0.95, skipped=[skipped])
    for tensors, old in zip((problem.params, problem.momenta, problem.squares), before, strict=True):
        assert_bitwise(tensors[0], old)
    assert skipped == 14
