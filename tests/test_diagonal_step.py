"""mbf_diagonal_step_ against its formula in float64 and against torch.optim.AdamW, in any layout.

Tolerances: M rounds twice, v four times; the step, a quotient of them, a dozen times, beside what D loses where its
two terms cancel.
"""

import numpy as np
import pytest
import torch
from brute_force import diagonal_step

from mbf_kernels import mbf_diagonal_step_
from mbf_kernels.testing import assert_below, assert_bitwise, assert_relative, randn

DTYPES = (torch.float32, torch.float64)
SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (3, 0), (4097,), (5, 7), (2, 3, 4, 5)]
STEP = dict(lr=0.1, momentum=0.9, diagonal_decay=0.999)
OPTIONS = {
    "paper": dict(square_weight=0.001),
    "paper, decayed": dict(weight_decay=0.3, maximize=True, eps=1e-3),
    "adam": dict(graft="adam", momentum_weight=0.1, square_weight=0.001),
    "adam, decayed": dict(graft="adam", weight_decay=0.3, maximize=True, eps=1e-3, momentum_weight=0.19),
    "no momentum": dict(graft="adam", momentum=0.0, diagonal_decay=0.0),
}
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def draw(shapes, dtype, device):
    """Lists of W, g, M and v."""
    lists = [[randn(*shape, dtype=dtype, device=device, seed=10 * i + s) for i, shape in enumerate(shapes)]
             for s in range(4)]  # fmt: skip
    lists[3] = [v.square() for v in lists[3]]
    return lists


def check(results, before, dtype, **options):
    """W, M and v of one tensor."""
    arrays = [t.double().cpu().numpy() for t in before]
    w, g, m, v = arrays
    truth = diagonal_step(*arrays, **options)
    eps, grafted = torch.finfo(dtype).eps, options.get("graft") == "adam"
    terms = np.abs(m) + np.abs(g)
    bounds = [None, 2 * eps * terms, 4 * eps * truth[2]]
    mean = (1 - options["momentum"]) / (options.get("momentum_weight", 1.0) if grafted else 1.0)
    length = np.sqrt(truth[2] / options.get("square_weight", 1.0)) + options.get("eps", 1e-8)
    rounding = 12 * eps * np.abs(mean * truth[1] / length) + 2 * eps * mean * terms / length
    if not grafted:  # v is made of the mean, too
        bounds[2] = bounds[2] + (1 - options["diagonal_decay"]) * 6 * eps * terms**2
        rounding = rounding + np.abs(mean * truth[1] / length) * bounds[2] / np.maximum(truth[2], 1e-300)
    bounds[0] = options["lr"] * rounding + 4 * eps * np.abs(w)
    for actual, expected, bound, what in zip(results, truth, bounds, ("weights", "momentum", "square"), strict=True):
        error = np.abs(actual.double().cpu().numpy() - expected)
        assert_below(torch.from_numpy(np.asarray(error)), torch.from_numpy(np.asarray(bound)), what)


@over_options
@over_dtypes
def test_formula(backend, device, dtype, options):
    """Tensors of every shape in one call, each with weights of its own, and gradients that stay."""
    options = STEP | options
    lists = draw(SHAPES, dtype, device)
    before = [[t.clone() for t in tensors] for tensors in lists]
    count = len(SHAPES)
    weights = {
        name: [options.get(name, 1.0) / (1 + i % 3) for i in range(count)]
        for name in ("momentum_weight", "square_weight")
    }
    assert mbf_diagonal_step_(*lists, **options | weights) is None
    for i in range(count):
        mine = {name: values[i] for name, values in weights.items()}
        w, g, m, v = (tensors[i] for tensors in lists)
        assert_bitwise(g, before[1][i])
        check((w, m, v), [tensors[i] for tensors in before], dtype, **options | mine)
    assert mbf_diagonal_step_([], [], [], [], **options) is None


def test_the_check_sees_wrong_results():
    for which in (0, 2, 3):
        for wrong in (1 + 1e-4, torch.nan):
            lists = draw([(17,)], torch.float32, "cpu")
            before = [tensors[0].clone() for tensors in lists]
            mbf_diagonal_step_(*lists, **STEP, graft="adam")
            lists[which][0][11] *= wrong
            with pytest.raises(AssertionError):
                check([lists[i][0] for i in (0, 2, 3)], before, torch.float32, **STEP, graft="adam")


@over_dtypes
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_is_adamw(backend, device, dtype, weight_decay, maximize):
    """Five steps of graft="adam". Both round a dozen times a step; torch keeps (1 - mu) M, we M."""
    shapes = [(17,), (4097,), (5, 7)]
    ours = [randn(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(t.clone()) for t in ours]
    start = [t.double().clone() for t in ours]
    momenta, squares = ([torch.zeros_like(t) for t in ours] for _ in range(2))
    common = dict(weight_decay=weight_decay, maximize=maximize, eps=1e-6)
    optimizer = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), foreach=False, **common)
    for t in range(1, 6):
        grads = [randn(*shape, dtype=dtype, device=device, seed=10 * t + i) for i, shape in enumerate(shapes)]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        options = dict(lr=0.1, momentum=0.9, diagonal_decay=0.99, graft="adam", **common)
        weights = dict(momentum_weight=1 - 0.9**t, square_weight=1 - 0.99**t)
        mbf_diagonal_step_(ours, grads, momenta, squares, **options, **weights)
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert_relative(a.double() - s, b.double() - s, 5 * 24 * torch.finfo(dtype).eps)


@over_dtypes
@pytest.mark.parametrize("number", DTYPES, ids=lambda dtype: f"number={dtype}")
def test_numbers_on_the_device(backend, device, dtype, number):
    exact = dict(lr=0.125, momentum_weight=0.1875, square_weight=0.125)
    tensors = {name: torch.tensor(value, dtype=number, device=device) for name, value in exact.items()}
    for graft in (None, "adam"):
        lists = draw([(17,), (5, 7)], dtype, device)
        before = [[t.clone() for t in tensors] for tensors in lists]
        one_each = dict(square_weight=[tensors["square_weight"]] * 2)
        mbf_diagonal_step_(*lists, **STEP | tensors | one_each, graft=graft, weight_decay=0.1)
        for i in range(2):
            results = [lists[k][i] for k in (0, 2, 3)]
            check(results, [b[i] for b in before], dtype, **STEP | exact, graft=graft, weight_decay=0.1)


def empty(t, *shape, **options):
    return torch.empty(shape, dtype=t.dtype, device=t.device, **options)


LAYOUTS = {  # homes of [6, 4, 5, 3]
    "contiguous": lambda t: empty(t, 6, 4, 5, 3),
    "channels_last": lambda t: empty(t, 6, 4, 5, 3, memory_format=torch.channels_last),
    "transposed": lambda t: empty(t, 3, 5, 4, 6).permute(3, 2, 1, 0),
    "swapped": lambda t: empty(t, 4, 6, 5, 3).transpose(0, 1),
    "every second": lambda t: empty(t, 6, 4, 5, 6)[..., ::2],
    "middle": lambda t: empty(t, 8, 4, 7, 3)[1:-1, :, 1:-1],
    "gaps and swapped": lambda t: empty(t, 5, 3, 6, 9).permute(2, 3, 0, 1)[:, 1:5],
    "offset": lambda t: empty(t, 361)[1:].view(6, 4, 5, 3),
}


def whole(t):
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def untouched(t):
    mask = torch.ones_like(whole(t), dtype=torch.bool)
    mask.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return whole(t)[mask]


def place(t, layout):
    view = LAYOUTS[layout](t)
    view.untyped_storage().fill_(0x5A)
    return view.copy_(t)


@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("of_grad", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("graft", [None, "adam"])
def test_no_layout_mixes_up_elements(backend, device, of_param, of_grad, graft):
    """Each tensor has its own layout; the results are those of contiguous ones, and nothing around them changes."""
    dtype, names = torch.float32, list(LAYOUTS)
    lists = draw([(6, 4, 5, 3)], dtype, device)
    if of_grad == "expanded":
        lists[1] = [lists[1][0][:, :, :1].expand(6, 4, 5, 3)]
    before = [[t.clone(memory_format=torch.contiguous_format) for t in tensors] for tensors in lists]
    at = names.index(of_param)
    placed = [
        [place(lists[0][0], of_param)],
        lists[1] if of_grad == "expanded" else [place(lists[1][0], of_grad)],
        [place(lists[2][0], names[at - 1])],
        [place(lists[3][0], names[at - 3])],
    ]
    written = [placed[i][0] for i in (0, 2, 3)]
    where = [(t.data_ptr(), t.stride()) for t in written]
    canaries = [untouched(t).clone() for t in written]
    mbf_diagonal_step_(*placed, **STEP, graft=graft)
    check(written, [b[0] for b in before], dtype, **STEP, graft=graft)
    assert where == [(t.data_ptr(), t.stride()) for t in written]
    assert_bitwise(placed[1][0].contiguous(), before[1][0])
    for t, canary in zip(written, canaries, strict=True):
        assert_bitwise(untouched(t), canary)


def test_copies_are_made_where_the_tensors_are(device, backend):
    """Whatever torch's default device is at the time."""
    lists = draw([(6, 4, 5, 3)], torch.float32, device)
    before = [t[0].clone() for t in lists]
    lists[0] = [place(lists[0][0], "every second")]
    with torch.device("meta"):
        mbf_diagonal_step_(*lists, **STEP)
    check([lists[i][0] for i in (0, 2, 3)], before, torch.float32, **STEP)


@over_dtypes
@pytest.mark.parametrize("graft", [None, "adam"])
def test_bad_and_extreme_elements_stay_alone(backend, device, dtype, graft):
    """NaN in a gradient reaches that element only; zero, tiny and huge ones leave the others right."""
    lists = draw([(40,)], dtype, device)
    lists[1][0][[3, 17, 33, 39]] = torch.tensor([torch.nan, 0.0, 1e-30, 1e18], dtype=dtype, device=device)
    before = [t[0].clone() for t in lists]
    mbf_diagonal_step_(*lists, **STEP, graft=graft)
    results = [lists[i][0] for i in (0, 2, 3)]
    assert all(t[3].isnan() for t in results)
    others = [i for i in range(40) if i != 3]
    assert all(t[others].isfinite().all() for t in results)
    check([t[others] for t in results], [t[others] for t in before], dtype, **STEP, graft=graft)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zeros(backend, device, eps):
    """As AdamW: 0 / 0 is NaN without eps, and no step with it."""
    w, g, m, v = (torch.zeros(5, device=device) for _ in range(4))
    mbf_diagonal_step_([w], [g], [m], [v], **STEP, graft="adam", eps=eps)
    assert (w.isnan() if eps == 0 else w == 0).all() and not m.any() and not v.any()
