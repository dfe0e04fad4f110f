"""rank_one_step_ against its formula in float64, in any shape and layout.

Tolerances: M is a sum of three terms that round three times each, with factors that are rounded themselves; W moves by
a quotient that rounds a dozen times, beside what M loses where its terms cancel.
"""

import numpy as np
import pytest
import torch
from brute_force import rank_one_step
from test_capturable import needs_cuda, warm_up
from test_diagonal_step import LAYOUTS, place, untouched
from torch.utils._python_dispatch import TorchDispatchMode

from mbf_kernels import backends, native, rank_one_step_
from mbf_kernels.options import step_options
from mbf_kernels.testing import assert_below, assert_bitwise, randn

DTYPES = (torch.float32, torch.float64)
STEP = dict(lr=0.1, momentum=0.9, damping=0.02)
OPTIONS = {
    "plain": {},
    "decoupled": dict(weight_decay=0.3, momentum_weight=0.1),
    "coupled": dict(weight_decay=0.3, momentum_weight=0.19, decoupled=False),
    "no momentum": dict(momentum=0.0, damping=0.5),
}
# (shape, m): rows of every length around a register's, one row, one column, leading dimensions of a product, none.
CASES = [
    *[((3, n), 3) for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65)],
    *[((n,), n) for n in (1, 7, 8, 9, 15, 16, 17, 33, 511, 512, 513, 1025)],
    ((1, 2049), 1), ((130, 9), 130), ((33, 4, 3, 3), 33), ((2, 3, 4, 5), 6), ((3, 4, 2), 24), ((5, 7), 1), ((), 1),
    ((17,), None), ((4097,), None), ((2, 3, 4, 5), None), ((), None), ((0,), None), ((0,), 0), ((3, 0), 3), ((0, 3), 0),
]  # fmt: skip
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def draw(cases, dtype, device):
    """Lists of W, g, M, s and h."""
    lists = [[], [], [], [], []]
    for i, (shape, m) in enumerate(cases):
        for s in range(3):
            lists[s].append(randn(*shape, dtype=dtype, device=device, seed=10 * i + s))
        n = lists[0][i].numel() // m if m else shape[-1] if m == 0 and len(shape) > 1 else 1
        for s, length in ((3, m), (4, n)):
            vector = None if m is None else randn(length, dtype=dtype, device=device, seed=10 * i + s).abs()
            lists[s].append(vector)
    return lists


def copied(lists):
    return [[None if t is None else t.clone(memory_format=torch.contiguous_format) for t in ts] for ts in lists]


def check(w, m, before, dtype, **options):
    """W and M of one tensor."""
    arrays = [None if t is None else t.double().cpu().numpy() for t in before]
    truth_w, truth_m, f = rank_one_step(*arrays, **options)
    old_w, g, old_m = (np.abs(a) for a in arrays[:3])
    eps = torch.finfo(dtype).eps
    coupled = 0.0 if options.get("decoupled", True) else options.get("weight_decay", 0.0)
    bound_m = 4 * eps * (options["momentum"] * old_m + (1 - options["momentum"]) * (g + coupled * old_w))
    rate = options["lr"] / options.get("momentum_weight", 1.0)
    bound_w = rate / f * (bound_m + 12 * eps * np.abs(truth_m)) + 4 * eps * old_w
    for actual, expected, bound, what in ((w, truth_w, bound_w, "weights"), (m, truth_m, bound_m, "momentum")):
        error = np.abs(actual.double().cpu().numpy() - expected)
        assert_below(torch.from_numpy(np.asarray(error)), torch.from_numpy(np.asarray(bound)), what)


@over_options
@over_dtypes
def test_formula(backend, device, dtype, options):
    """Tensors of every shape in one call, each with a weight of its own; what is only read stays."""
    options = STEP | options
    lists = draw(CASES, dtype, device)
    before = copied(lists)
    weights = [options.get("momentum_weight", 1.0) / (1 + i % 3) for i in range(len(CASES))]
    assert rank_one_step_(*lists, **options | dict(momentum_weight=weights)) is None
    for i, weight in enumerate(weights):
        mine = [tensors[i] for tensors in before]
        check(lists[0][i], lists[2][i], mine, dtype, **options | dict(momentum_weight=weight))
        for k in (1, 3, 4):
            if mine[k] is not None:
                assert_bitwise(lists[k][i], mine[k])
    assert rank_one_step_([], [], [], [], [], **options) is None


def test_the_check_sees_wrong_results():
    for which in (0, 2):
        for wrong in (1 + 1e-4, torch.nan):
            lists = draw([((5, 7), 5)], torch.float32, "cpu")
            before = [tensors[0].clone() for tensors in lists]
            rank_one_step_(*lists, **STEP)
            lists[which][0][3, 4] *= wrong
            with pytest.raises(AssertionError):
                check(lists[0][0], lists[2][0], before, torch.float32, **STEP)


@over_dtypes
@pytest.mark.parametrize("number", DTYPES, ids=lambda dtype: f"number={dtype}")
@pytest.mark.parametrize("decoupled", [False, True])
def test_numbers_on_the_device(backend, device, dtype, number, decoupled):
    exact = dict(lr=0.125, damping=0.0625, momentum_weight=0.1875)
    tensors = {name: torch.tensor(value, dtype=number, device=device) for name, value in exact.items()}
    cases = [((17,), None), ((5, 7), 5)]
    lists = draw(cases, dtype, device)
    before = copied(lists)
    one_each = dict(momentum_weight=[tensors["momentum_weight"]] * 2)
    options = dict(momentum=0.9, weight_decay=0.1, decoupled=decoupled)
    rank_one_step_(*lists, **options | tensors | one_each)
    for i in range(2):
        check(lists[0][i], lists[2][i], [b[i] for b in before], dtype, **options | exact)


@over_dtypes
def test_more_tensors_than_a_table_holds(backend, device, dtype):
    lists = draw([((1 + i % 3, 5), None if i % 4 == 0 else 1 + i % 3) for i in range(605)], dtype, device)
    before = copied(lists)
    rank_one_step_(*lists, **STEP)
    for i in range(605):
        check(lists[0][i], lists[2][i], [b[i] for b in before], dtype, **STEP)


# ---- memory


@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("of_grad", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("m", [None, 1, 6, 24, 360])
def test_no_layout_mixes_up_elements(backend, device, of_param, of_grad, m):
    """Each tensor has its own layout; the results are those of contiguous ones, and nothing around them changes."""
    dtype, names = torch.float32, list(LAYOUTS)
    lists = draw([((6, 4, 5, 3), m)], dtype, device)
    if of_grad == "expanded":
        lists[1] = [lists[1][0][:, :, :1].expand(6, 4, 5, 3)]
    before = [tensors[0] for tensors in copied(lists)]
    grad = lists[1][0] if of_grad == "expanded" else place(lists[1][0], of_grad)
    param, momentum = place(lists[0][0], of_param), place(lists[2][0], names[names.index(of_param) - 1])
    where = [(t.data_ptr(), t.stride()) for t in (param, momentum)]
    canaries = [untouched(t).clone() for t in (param, momentum)]
    rank_one_step_([param], [grad], [momentum], *lists[3:], **STEP)
    check(param, momentum, before, dtype, **STEP)
    assert where == [(t.data_ptr(), t.stride()) for t in (param, momentum)]
    assert_bitwise(grad.contiguous(), before[1])
    for t, canary in zip((param, momentum), canaries, strict=True):
        assert_bitwise(untouched(t), canary)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_tensors_that_lie_alike(backend, device, layout):
    lists = draw([((6, 4, 5, 3), 6)], torch.float32, device)
    before = [tensors[0] for tensors in copied(lists)]
    placed = [[place(lists[i][0], layout)] for i in range(3)]
    rank_one_step_(*placed, *lists[3:], **STEP)
    check(placed[0][0], placed[2][0], before, torch.float32, **STEP)


class Recorder(TorchDispatchMode):
    """The names of all calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape, layout, m, in_place", [
    ((6, 4, 5, 3), torch.contiguous_format, 6, True), ((6, 4, 5, 3), torch.channels_last, 6, True),
    ((6, 4, 5, 3), torch.channels_last, 360, False), ((6, 4, 5, 3), torch.channels_last, 24, False),
    ((6, 4, 5, 3), torch.channels_last, None, True), ((2, 3, 2, 4, 5), torch.channels_last_3d, 2, True),
    ((24,), torch.contiguous_format, 24, True),
])  # fmt: skip
def test_nothing_is_copied_where_rows_are_contiguous(shape, layout, m, in_place):
    """No call of torch but the op: nothing to allocate in a captured graph, and nothing to wait for."""
    if backends()["emulated"] != "available":
        pytest.skip("no emulated GPU kernels")
    lists = draw([(shape, m)], torch.float32, "cpu")
    lists = [[t.to(memory_format=layout) for t in ts] for ts in lists[:3]] + lists[3:]
    for kernels in (native.EMULATED, native.CPU):
        with Recorder() as recorder:
            kernels.rank_one_step_(*lists, [1.0], step_options("rank_one_step_", **STEP))
        assert (recorder.calls == []) == in_place, recorder.calls


@needs_cuda
def test_a_captured_step_is_the_eager_one():
    """Also with another rate than it was captured with."""
    lists, eager = (draw([((6, 4, 5, 3), 6), ((4097,), None)], torch.float32, "cuda") for _ in range(2))
    rate = torch.tensor(0.125, device="cuda")

    def step(lists):
        rank_one_step_(*lists, **STEP | dict(lr=rate))

    warm_up([lambda: step(lists)])
    step(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(lists)
    for value in (0.125, 0.25):
        rate.fill_(value)
        graph.replay()
        step(eager)
    for k in (0, 2):
        for a, b in zip(lists[k], eager[k], strict=True):
            assert_bitwise(a, b)


@over_dtypes
def test_vectors_may_be_any_views(backend, device, dtype):
    """A slice at an odd address, every second element, and a lazy minus before them."""
    lists = draw([((6, 4, 5, 3), 6), ((6,), 6), ((2, 3), 2)], dtype, device)
    before = copied(lists)
    for vectors in lists[3:]:
        for i, vector in enumerate(vectors[:2]):
            home = torch.full((2 * vector.numel() + 1,), torch.nan, dtype=dtype, device=device)
            vectors[i] = (home[1::2] if i else home[1 : 1 + vector.numel()]).copy_(vector)
        vectors[2] = torch.complex(torch.zeros_like(vectors[2]), -vectors[2]).conj().imag
    rank_one_step_(*lists, **STEP)
    for i in range(3):
        check(lists[0][i], lists[2][i], [b[i] for b in before], dtype, **STEP)


def test_copies_are_made_where_the_tensors_are(device, backend):
    """Whatever torch's default device is at the time."""
    lists = draw([((6, 4, 5, 3), 6)], torch.float32, device)
    before = [t[0].clone() for t in lists]
    lists[0] = [place(lists[0][0], "every second")]
    with torch.device("meta"):
        rank_one_step_(*lists, **STEP)
    check(lists[0][0], lists[2][0], before, torch.float32, **STEP)


# ---- values


@over_dtypes
@pytest.mark.parametrize("m", [None, 5])
def test_bad_and_extreme_elements_stay_alone(backend, device, dtype, m):
    """NaN in a gradient reaches that element only; zero, tiny and huge ones leave the others right."""
    lists = draw([((5, 8), m)], dtype, device)
    lists[1][0].view(-1)[[3, 17, 33, 39]] = torch.tensor([torch.nan, 0.0, 1e-30, 1e18], dtype=dtype, device=device)
    before = [tensors[0] for tensors in copied(lists)]
    rank_one_step_(*lists, **STEP)
    bad = torch.zeros(40, dtype=torch.bool, device=device)
    bad[3] = True
    assert_bad_alone(lists, before, bad.view(5, 8), dtype)


@over_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_curvature_stays_in_its_row_and_column(backend, device, dtype, value):
    """NaN of a row or a column of F is that of W; infinite F moves nothing. M knows nothing of F."""
    lists = draw([((5, 9), 5)], dtype, device)
    lists[3][0][1], lists[4][0][7] = value, value
    before = [tensors[0] for tensors in copied(lists)]
    rank_one_step_(*lists, **STEP)
    bad = torch.zeros(5, 9, dtype=torch.bool, device=device)
    bad[1] = bad[:, 7] = True
    if value == torch.inf:
        assert_bitwise(lists[0][0][bad], before[0][bad])
        for vector in (lists[3][0], lists[4][0]):
            vector.nan_to_num_(posinf=torch.nan)
        lists[0][0][bad] = torch.nan
    assert lists[2][0].isfinite().all()
    lists[2][0][bad] = torch.nan
    before = before[:3] + [vector[0].nan_to_num(nan=1.0, posinf=1.0) for vector in lists[3:]]
    assert_bad_alone(lists, before, bad, dtype)


def assert_bad_alone(lists, before, bad, dtype):
    w, m = lists[0][0], lists[2][0]
    assert w[bad].isnan().all() and m[bad].isnan().all()
    clean = [t.masked_fill(bad, 0.0) for t in (w, m, *before[:3])]
    check(*clean[:2], [*clean[2:], *before[3:]], dtype, **STEP)


@over_dtypes
def test_no_curvature_is_curvature_of_zeros(backend, device, dtype):
    results = []
    for zeros in (False, True):
        lists = draw([((5, 9), 5)], dtype, device)
        for vectors in lists[3:]:
            vectors[0] = vectors[0].zero_() if zeros else None
        rank_one_step_(*lists, **STEP)
        results.append(lists[0][0])
    assert_bitwise(*results)


def test_nothing_divides_nothing(backend, device):
    """0 / 0 is NaN where there is neither damping nor curvature."""
    w, g, m = (torch.zeros(5, device=device) for _ in range(3))
    rank_one_step_([w], [g], [m], [None], [None], **STEP | dict(damping=0.0))
    assert w.isnan().all() and not m.any()
