"""Every public function answers bad input with a ValueError or TypeError that starts with its own name."""

import pytest
import torch

import mbf_kernels
from mbf_kernels import SymmetricBlocks, mbf_step_
from mbf_kernels.testing import assert_bitwise

B, N = 5, 9


def blocks(count=B, size=N, dtype=torch.float32, device=None):
    return SymmetricBlocks.zeros(count, size, dtype, device)


def vectors(*shape, **options):
    return torch.ones(*(shape or (B, N)), **options)


def valid(op):
    """Arguments that are right, for a case to spoil."""
    return {
        "accumulate_": ([blocks(), vectors()], dict(decay=0.9)),
        "factor": ([blocks()], dict(damping=0.1)),
        "solve": ([blocks(), vectors()], {}),
        "accumulate_factor_solve_": ([blocks(), vectors(), vectors()], dict(decay=0.9, damping=0.1)),
        "mbf_step_": (
            [[vectors()], [vectors()], [vectors()], [blocks()]],
            dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1),
        ),
    }[op]


BAD_VECTORS = {
    "count": vectors(B + 1, N),
    "size": vectors(B, N + 1),
    "one dimension": vectors(B * N),
    "four dimensions": vectors(1, 1, B, N),
    "dtype": vectors(dtype=torch.float64),
    "half": vectors(dtype=torch.float16),
    "integer": vectors(dtype=torch.int64),
    "complex": vectors(dtype=torch.complex64),
    "device": vectors(device="meta"),
    "sparse": vectors().to_sparse(),
    "list": [[1.0] * N] * B,
    "none": None,
}
BAD_BLOCKS = {
    "tensor": vectors(B, N, N),
    "none": None,
    "device": blocks(device="meta"),
    "dtype": blocks(dtype=torch.float64),
}
NAN = float("nan")

CASES = []  # (op, what is wrong, position or keyword, bad value)
for op, positions in {"accumulate_": [1], "solve": [1], "accumulate_factor_solve_": [1, 2]}.items():
    CASES += [(op, name, at, bad) for at in positions for name, bad in BAD_VECTORS.items()]
for op in ("accumulate_", "solve", "accumulate_factor_solve_"):
    CASES += [(op, f"blocks: {name}", 0, bad) for name, bad in BAD_BLOCKS.items()]
CASES += [("factor", f"blocks: {name}", 0, BAD_BLOCKS[name]) for name in ("tensor", "none")]
CASES += [
    ("accumulate_", "samples of another count", 1, vectors(2, B + 1, N)),
    ("solve", "sides", 1, vectors(B + 1, N, 2)),
]
for position, name in enumerate(["params", "grads", "momenta"]):
    wrong = {k: v for k, v in BAD_VECTORS.items() if k not in ("one dimension", "four dimensions")}
    CASES += [("mbf_step_", f"{name}: {what}", position, [bad]) for what, bad in wrong.items()]
    CASES += [
        ("mbf_step_", f"{name}: too many", position, [vectors(), vectors()]),
        ("mbf_step_", f"{name}: nothing", position, []),
    ]
CASES += [
    ("mbf_step_", "params: expanded", 0, [vectors(1, N).expand(B, N)]),
    ("mbf_step_", "momenta: expanded", 2, [vectors(B, 1).expand(B, N)]),
    ("mbf_step_", "params: trailing dimensions pass n", 0, [vectors(N, B)]),
    ("mbf_step_", "fishers: too many", 3, [blocks(), blocks()]),
    ("mbf_step_", "fishers: count", 3, [blocks(B + 1)]),
    ("mbf_step_", "fishers: size", 3, [blocks(B, 8)]),
    ("mbf_step_", "fishers: dtype", 3, [blocks(dtype=torch.float64)]),
    ("mbf_step_", "fishers: device", 3, [blocks(device="meta")]),
    ("mbf_step_", "fishers: tensor", 3, [vectors()]),
    ("mbf_step_", "graft", "graft", "sgd"),
    ("mbf_step_", "factors: size", "factors", [blocks(B, 8)]),
    ("mbf_step_", "factors: count", "factors", [blocks(B + 1)]),
    ("mbf_step_", "factors: dtype", "factors", [blocks(dtype=torch.float64)]),
    ("mbf_step_", "factors: too many", "factors", [blocks(), blocks()]),
    ("mbf_step_", "factors missing", "refactor", False),
    ("mbf_step_", "skipped: dtype", "skipped", [torch.tensor(0.0)]),
    ("mbf_step_", "skipped: too many", "skipped", [torch.tensor(0)] * 2),
    ("mbf_step_", "skipped: shape", "skipped", [torch.zeros(B, dtype=torch.int64)]),
]
for name, weights in {"zero": 0.0, "negative": -1.0, "nan": NAN, "too many": [1.0, 1.0]}.items():
    CASES += [("mbf_step_", f"{which}: {name}", which, weights) for which in ("momentum_weight", "fisher_weight")]
DOMAINS = {
    "decay": [-0.1, 1.1, NAN],
    "damping": [-1e-3, NAN, float("inf")],
    "lr": [-0.1, NAN],
    "momentum": [-0.1, 1.0, NAN],
    "weight_decay": [-0.1, NAN],
    "eps": [-1e-8, NAN],
}
for op, options in {
    "accumulate_": ["decay"],
    "factor": ["damping"],
    "accumulate_factor_solve_": ["decay", "damping"],
    "mbf_step_": list(DOMAINS),
}.items():
    CASES += [(op, f"{option} = {value}", option, value) for option in options for value in DOMAINS[option]]
BAD_SCALARS = {
    "text": "much",
    "none": None,
    "integer": torch.tensor(1),
    "half": torch.tensor(1.0, dtype=torch.float16),
    "one dimension": torch.tensor([1.0]),
    "device": torch.tensor(1.0, device="meta"),
}
for op, options in {
    "factor": ["damping"],
    "accumulate_factor_solve_": ["damping"],
    "mbf_step_": ["lr", "damping", "momentum_weight", "fisher_weight"],
}.items():
    CASES += [(op, f"{option}: {name}", option, bad) for option in options for name, bad in BAD_SCALARS.items()]
for option in ("momentum_weight", "fisher_weight"):
    CASES += [
        ("mbf_step_", f"{option}: too many tensors", option, [torch.tensor(1.0)] * 2),
        ("mbf_step_", f"{option}: a tensor and a number", option, [torch.tensor(1.0), 1.0]),
    ]


@pytest.mark.parametrize(
    "op, at, bad", [pytest.param(op, at, bad, id=f"{op}-{at}-{what}") for op, what, at, bad in CASES]
)
def test_refused(backend, device, op, at, bad):
    if device != "cpu":
        pytest.skip("the arguments of the cases lie on the CPU")
    args, options = valid(op)
    if isinstance(at, int):
        args[at] = bad
    else:
        options[at] = bad
    with pytest.raises((ValueError, TypeError), match=rf"^{op}: .*expected .*got "):
        getattr(mbf_kernels, op)(*args, **options)


@pytest.mark.parametrize("op", ["accumulate_", "factor", "solve", "accumulate_factor_solve_", "mbf_step_"])
def test_the_unspoilt_arguments_pass(backend, op):
    args, options = valid(op)
    getattr(mbf_kernels, op)(*args, **options)


def test_blocks_of_two_sizes_in_one_call():
    two = [vectors(B, 9), vectors(B, 4)]
    with pytest.raises(ValueError, match="^mbf_step_: .*size"):
        mbf_step_(two, two, two, [blocks(B, 9), blocks(B, 4)], lr=0.1, momentum=0.9, decay=0.9, damping=0.1)


@pytest.mark.parametrize("bad", ["params", "grads", "momenta"])
def test_a_refused_step_changes_nothing(backend, bad):
    """The check of the last tensor comes before the work on the first."""
    names = ("params", "grads", "momenta")
    lists = {name: [vectors(), vectors(dtype=torch.float64 if name == bad else None)] for name in names}
    fishers = [blocks(), blocks()]
    with pytest.raises((TypeError, ValueError), match="^mbf_step_: "):
        mbf_step_(*lists.values(), fishers, lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
    for name in names:
        assert_bitwise(lists[name][0], vectors())
    assert not fishers[0].data.any()


def test_storage_of_another_shape():
    for data in (vectors(1, 45, 31), vectors(2, 45, 32), vectors(32, 45).t().view(1, 45, 32)[:, :, ::2]):
        with pytest.raises(ValueError, match="expected"):
            SymmetricBlocks(data, B, N)


@pytest.mark.parametrize("op", ["accumulate_", "solve", "accumulate_factor_solve_", "mbf_step_"])
def test_no_silent_cut_of_a_graph(backend, op):
    """The ops are not differentiable, so an argument that requires grad is refused, unless in no_grad()."""
    args, options = valid(op)
    if op == "mbf_step_":
        args[0][0].requires_grad_()
    else:
        args[1].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^{op}: "):
        getattr(mbf_kernels, op)(*args, **options)
    with torch.no_grad():
        getattr(mbf_kernels, op)(*args, **options)


@pytest.mark.parametrize("op", ["factor", "accumulate_factor_solve_", "mbf_step_"])
def test_no_silent_cut_of_a_graph_through_a_number_on_the_device(op):
    args, options = valid(op)
    with pytest.raises(RuntimeError, match=f"^{op}: "):
        getattr(mbf_kernels, op)(*args, **options | dict(damping=torch.tensor(0.1, requires_grad=True)))


@pytest.mark.parametrize("size", [1, 9, 25])
def test_empty_is_no_op(backend, device, size):
    """B = 0 everywhere: nothing happens, and the results have their shapes."""
    empty, f = torch.empty(0, size, device=device), blocks(0, size, device=device)
    assert mbf_kernels.accumulate_(f, empty, decay=0.9) is f
    assert mbf_kernels.accumulate_(f, empty.expand(3, 0, size), decay=0.9) is f
    lower, info = mbf_kernels.factor(f, damping=0.1)
    assert (lower.count, lower.size, info.shape, info.dtype) == (0, size, (0,), torch.int32)
    assert mbf_kernels.solve(lower, empty).shape == (0, size)
    assert mbf_kernels.solve(lower, torch.empty(0, size, 3, device=device)).shape == (0, size, 3)
    x, info = mbf_kernels.accumulate_factor_solve_(f, empty, empty, decay=0.9, damping=0.1)
    assert x.shape == (0, size) and info.shape == (0,)
    step = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
    (info,) = mbf_step_([empty], [empty], [empty.clone()], [f], **step)
    assert info.shape == (0,) and info.dtype == torch.int32
    lower, _ = mbf_kernels.factor(blocks(3, size, device=device), damping=0.1)
    assert mbf_kernels.solve(lower, torch.empty(3, size, 0, device=device)).shape == (3, size, 0)
