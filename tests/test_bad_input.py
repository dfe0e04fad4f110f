"""Every public function answers bad input with a ValueError or TypeError that starts with its own name."""

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import mbf_kernels
from mbf_kernels import SymmetricBlocks, mbf_diagonal_step_, mbf_shared_step_, mbf_step_, rank_one_step_
from mbf_kernels.testing import assert_bitwise

B, N, S = 5, 9, 3


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
        "mbf_shared_step_": (
            [[vectors(S, B, N)], [vectors(S, B, N)], [vectors(S, B, N)], [vectors(S, B, N)], [blocks()]],
            dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1, graft="adam"),
        ),
        "mbf_diagonal_step_": (
            [[vectors()], [vectors()], [vectors()], [vectors()]],
            dict(lr=0.1, momentum=0.9, diagonal_decay=0.99),
        ),
        "rank_one_step_": (
            [[vectors()], [vectors()], [vectors()], [vectors(B)], [vectors(N)]],
            dict(lr=0.1, momentum=0.9, damping=0.1),
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
    "standing for others": TwoTensor(vectors(), vectors()),
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
    ("mbf_step_", "fishers: none", 3, None),
    ("mbf_step_", "fishers: number", 3, 1),
    ("mbf_step_", "graft", "graft", "sgd"),
    ("mbf_step_", "factors: size", "factors", [blocks(B, 8)]),
    ("mbf_step_", "factors: count", "factors", [blocks(B + 1)]),
    ("mbf_step_", "factors: dtype", "factors", [blocks(dtype=torch.float64)]),
    ("mbf_step_", "factors: too many", "factors", [blocks(), blocks()]),
    ("mbf_step_", "factors: number", "factors", 1),
    ("mbf_step_", "factors missing", "refactor", False),
    ("mbf_step_", "skipped: dtype", "skipped", [torch.tensor(0.0)]),
    ("mbf_step_", "skipped: too many", "skipped", [torch.tensor(0)] * 2),
    ("mbf_step_", "skipped: nothing", "skipped", []),
    ("mbf_step_", "skipped: shape", "skipped", [torch.zeros(B, dtype=torch.int64)]),
    ("mbf_step_", "skipped: sparse", "skipped", [torch.zeros(1, dtype=torch.int64).to_sparse()]),
    ("mbf_step_", "skipped: a tensor", "skipped", vectors(2)),
]
for name, weights in {"zero": 0.0, "negative": -1.0, "nan": NAN, "too many": [1.0, 1.0]}.items():
    CASES += [("mbf_step_", f"{which}: {name}", which, weights) for which in ("momentum_weight", "fisher_weight")]
NAMES = ["params", "grads", "momenta", "squares"]
MATRICES = [
    case[1:] for case in CASES if case[0] == "mbf_step_" and case[1].startswith(("fishers", "factors", "skipp"))
]
for what, at, bad in MATRICES:
    CASES.append(("mbf_shared_step_", what, 4 if at == 3 else at, bad))
for position, name in enumerate(NAMES):
    strange = {"dtype", "half", "integer", "complex", "device", "sparse", "none"}
    for what, bad in BAD_VECTORS.items():
        if what in strange:
            like = (
                bad.unsqueeze(0).expand(S, B, N) if what in ("dtype", "half", "integer", "complex", "device") else bad
            )
            CASES.append(("mbf_shared_step_", f"{name}: {what}", position, [like]))
        if what in strange | {"count", "size", "list"}:
            CASES.append(("mbf_diagonal_step_", f"{name}: {what}", position, [bad]))
    CASES += [
        ("mbf_shared_step_", f"{name}: samples", position, [vectors(S + 1, B, N)]),
        ("mbf_shared_step_", f"{name}: matrices", position, [vectors(S, B + 1, N)]),
        ("mbf_shared_step_", f"{name}: size", position, [vectors(S, B, N + 1)]),
        ("mbf_shared_step_", f"{name}: a pair", position, [(vectors(S, B, N), vectors(S))]),
        ("mbf_shared_step_", f"{name}: three", position, [(vectors(S, B, N),) * 3]),
        ("mbf_shared_step_", f"{name}: none", position, [()]),
        ("mbf_shared_step_", f"{name}: not a list", position, vectors(S, B, N)),
    ]
    for op, good in {"mbf_shared_step_": vectors(S, B, N), "mbf_diagonal_step_": vectors()}.items():
        CASES += [(op, f"{name}: too many", position, [good] * 2), (op, f"{name}: nothing", position, [])]
        if name != "grads":
            wide = good[..., :1].expand(good.shape)
            CASES.append((op, f"{name}: expanded", position, [wide]))
CASES += [
    ("mbf_shared_step_", "squares: none at all", 3, None),
    ("mbf_shared_step_", "graft", "graft", "sgd"),
    ("mbf_shared_step_", "factors missing", "refactor", False),
    ("mbf_diagonal_step_", "graft", "graft", "sgd"),
]
for position, name in enumerate(["params", "grads", "momenta", "rows", "columns"]):
    good = [vectors(), vectors(), vectors(), vectors(B), vectors(N)][position]
    for what in ("dtype", "half", "integer", "complex", "device"):
        CASES.append(("rank_one_step_", f"{name}: {what}", position, [good.to(BAD_VECTORS[what])]))
    CASES += [
        ("rank_one_step_", f"{name}: sparse", position, [good.to_sparse()]),
        ("rank_one_step_", f"{name}: list", position, [good.tolist()]),
        ("rank_one_step_", f"{name}: none", position, [None]),
        ("rank_one_step_", f"{name}: not a list", position, good),
        ("rank_one_step_", f"{name}: too many", position, [good] * 2),
        ("rank_one_step_", f"{name}: nothing", position, []),
        ("rank_one_step_", f"{name}: one more", position, [vectors(good.numel() + 1)]),
        ("rank_one_step_", f"{name}: two dimensions", position, [good.flatten()[:, None]]),
    ]
    if name in ("params", "momenta"):
        CASES.append(("rank_one_step_", f"{name}: expanded", position, [vectors(B, 1).expand(B, N)]))
CASES += [
    ("rank_one_step_", "params: of as many elements", 0, [vectors(N, B)]),
    ("rank_one_step_", "rows: a product of no leading dimensions", 3, [vectors(3)]),
]
for name, weights in {"zero": 0.0, "negative": -1.0, "nan": NAN, "too many": [1.0, 1.0]}.items():
    CASES.append(("rank_one_step_", f"momentum_weight: {name}", "momentum_weight", weights))
    for op in ("mbf_shared_step_", "mbf_diagonal_step_"):
        CASES += [(op, f"{which}: {name}", which, weights) for which in ("momentum_weight", "square_weight")]
NO_NUMBERS = {"digits": "0.5", "word": "much", "complex": 1j, "beyond floats": 10**400, "list": [0.5, 0.5, 0.5]}
DOMAINS = {
    "decay": [-0.1, 1.1, NAN],
    "damping": [-1e-3, NAN, float("inf")],
    "lr": [-0.1, NAN],
    "momentum": [-0.1, 1.0, NAN],
    "weight_decay": [-0.1, NAN],
    "eps": [-1e-8, NAN],
    "diagonal_decay": [-0.1, 1.0, NAN],
}
for op, options in {
    "accumulate_": ["decay"],
    "factor": ["damping"],
    "accumulate_factor_solve_": ["decay", "damping"],
    "mbf_step_": [name for name in DOMAINS if name != "diagonal_decay"],
    "mbf_shared_step_": list(DOMAINS),
    "mbf_diagonal_step_": ["lr", "momentum", "diagonal_decay", "weight_decay", "eps"],
    "rank_one_step_": ["lr", "momentum", "damping", "weight_decay"],
}.items():
    CASES += [(op, f"{option} = {value}", option, value) for option in options for value in DOMAINS[option]]
    CASES += [(op, f"{option}: {what}", option, bad) for option in options for what, bad in NO_NUMBERS.items()]
for op, flags in {
    "factor": ["relative"],
    "accumulate_factor_solve_": ["relative"],
    "mbf_step_": ["relative", "nesterov", "maximize", "update", "refactor"],
    "mbf_shared_step_": ["relative", "nesterov", "maximize", "update", "refactor"],
    "mbf_diagonal_step_": ["maximize"],
    "rank_one_step_": ["decoupled"],
}.items():
    CASES += [(op, f"{flag}: neither", flag, vectors(2)) for flag in flags]
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
    "mbf_shared_step_": ["lr", "damping", "momentum_weight", "square_weight"],
    "mbf_diagonal_step_": ["lr", "momentum_weight", "square_weight"],
    "rank_one_step_": ["lr", "damping", "momentum_weight"],
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


STEPS = ["mbf_step_", "mbf_shared_step_", "mbf_diagonal_step_", "rank_one_step_"]


@pytest.mark.parametrize("op", ["accumulate_", "factor", "solve", "accumulate_factor_solve_", *STEPS])
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


@pytest.mark.parametrize("bad", NAMES)
def test_a_refused_shared_or_diagonal_step_changes_nothing(backend, bad):
    for op in STEPS[1:3]:
        shape = (S, B, N) if op == "mbf_shared_step_" else (B, N)
        lists = [[vectors(*shape), vectors(*shape, dtype=torch.float64 if name == bad else None)] for name in NAMES]
        args, options = valid(op)
        fishers = [blocks(), blocks()]
        with pytest.raises((TypeError, ValueError), match=f"^{op}: "):
            getattr(mbf_kernels, op)(*lists, *([fishers] if len(args) > 4 else []), **options)
        for tensors in lists:
            assert_bitwise(tensors[0], vectors(*shape))
        assert not fishers[0].data.any()


@pytest.mark.parametrize("bad", ["params", "grads", "momenta", "rows", "columns"])
def test_a_refused_step_of_rank_one_changes_nothing(backend, bad):
    names = {"params": (B, N), "grads": (B, N), "momenta": (B, N), "rows": (B,), "columns": (N,)}
    lists = {
        name: [vectors(*shape), vectors(*shape, dtype=torch.float64 if name == bad else None)]
        for name, shape in names.items()
    }
    with pytest.raises((TypeError, ValueError), match=f"^rank_one_step_: .*{bad}"):
        rank_one_step_(*lists.values(), lr=0.1, momentum=0.9, damping=0.1)
    for name, shape in names.items():
        assert_bitwise(lists[name][0], vectors(*shape))


JOINED = {  # params and fishers that do not fit each other, where a bias joins
    "two matrices": ((vectors(S, 2, N - 1), vectors(S)), blocks(2)),
    "samples of the bias": ((vectors(S, 1, N - 1), vectors(S + 1)), blocks(1)),
    "shape of the bias": ((vectors(S, 1, N - 1), vectors(S, 1)), blocks(1)),
    "size with the bias": ((vectors(S, 1, N), vectors(S)), blocks(1)),
    "no elements beside the bias": ((vectors(S, 1, 0), vectors(S)), blocks(1, 1)),
    "no dimension of matrices": ((vectors(S, N - 1), vectors(S)), blocks(1)),
}


@pytest.mark.parametrize("what", JOINED)
def test_a_bias_that_does_not_fit(backend, what):
    pair, fisher = JOINED[what]
    options = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
    with pytest.raises(ValueError, match=r"^mbf_shared_step_: .*expected .*got "):
        mbf_shared_step_(*[[tuple(t.clone() for t in pair)] for _ in range(3)], None, [fisher], **options)


def test_shared_blocks_of_one_element_have_a_dimension_of_their_own(backend):
    """[R, R] is no [S, R, 1]."""
    options = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
    with pytest.raises(ValueError, match="^mbf_shared_step_: expected params"):
        mbf_shared_step_(*[[vectors(3, 3)] for _ in range(3)], None, [blocks(3, 1)], **options)
    mbf_shared_step_(*[[vectors(3, 3, 1)] for _ in range(3)], None, [blocks(3, 1)], **options)


def test_shared_blocks_of_two_sizes_in_one_call():
    two = [vectors(S, B, 9), vectors(S, B, 4)]
    with pytest.raises(ValueError, match="^mbf_shared_step_: .*size"):
        options = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
        mbf_shared_step_(two, two, two, None, [blocks(B, 9), blocks(B, 4)], **options)


WRITTEN = {op: [0, 2, 3] if op in STEPS[1:3] else [0, 2] for op in STEPS}  # the lists of a step, besides gradients


@pytest.mark.parametrize("op, at", [(op, at) for op in STEPS for at in WRITTEN[op]])
def test_what_is_written_is_nothing_elses_memory(backend, op, at):
    """The same tensor in two lists, and one that begins in another: refused before anything changes."""
    args, options = valid(op)
    tensor = args[at][0]
    inside = torch.ones(2 * tensor.numel())[7:].as_strided(tensor.shape, tensor.stride())
    around = inside.as_strided(tensor.shape, tensor.stride(), 0)
    for other in {1, *WRITTEN[op]} - {at}:
        for first, second in ((tensor, tensor), (around, inside)):
            spoilt = list(args)
            spoilt[at], spoilt[other] = [first], [second]
            with pytest.raises(ValueError, match=rf"^{op}: expected memory of its own .*got .*\[0\] and .*\[0\]"):
                getattr(mbf_kernels, op)(*spoilt, **options)
            assert all((t == 1).all() for t in (tensor, inside, around))


@pytest.mark.parametrize("op, at", [(op, at) for op in STEPS for at in WRITTEN[op]])
def test_elements_that_overlap_are_not_written(backend, op, at):
    args, options = valid(op)
    shape = args[at][0].shape
    args[at] = [vectors(args[at][0].numel()).as_strided(shape, (1,) * len(shape))]
    with pytest.raises(ValueError, match=f"^{op}: expected .* without repeated elements, got "):
        getattr(mbf_kernels, op)(*args, **options)
    assert (args[at][0] == 1).all()


def test_a_gradient_in_the_memory_of_its_matrix(backend):
    f = blocks(B, 25)
    inside = f.data[:, :25]
    for call in (
        lambda: mbf_kernels.accumulate_(f, inside, decay=0.9),
        lambda: mbf_kernels.accumulate_factor_solve_(f, inside, vectors(B, 25), decay=0.9, damping=0.1),
        lambda: mbf_kernels.accumulate_factor_solve_(f, vectors(B, 25), inside, decay=0.9, damping=0.1),
    ):
        with pytest.raises(ValueError, match="^accumulate_.*: .*expected .*got "):
            call()


def test_views_of_one_weight_that_interleave_are_apart(backend):
    """As the runs of 4 inputs of a weight with 8: neither lies in the other."""
    w, g, m = torch.ones(B, 8), torch.ones(B, 8), torch.zeros(B, 8)
    halves = [[t[:, :4], t[:, 4:]] for t in (w, g, m)]
    mbf_step_(*halves, [blocks(B, 4), blocks(B, 4)], lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
    assert (w != 1).all() and (m == 1).all()


def test_a_gradient_that_repeats_its_elements_owns_no_gaps(backend):
    """Its elements lie four apart, each there four times; weights lie between them."""
    buffer = torch.ones(16)
    grad, between = buffer[::4][:, None].expand(4, 4), buffer[1:2]
    assert grad.stride() == (4, 0)
    zeros = [vectors(4, 4), vectors(1)]
    mbf_diagonal_step_(
        [vectors(4, 4), between], [grad, vectors(1)], zeros, [t.clone() for t in zeros],
        lr=0.1, momentum=0.9, diagonal_decay=0.99, graft="adam",
    )  # fmt: skip
    assert between != 1 and (grad == 1).all()


@pytest.mark.parametrize("op", STEPS)
def test_inference_tensors_are_written_in_inference_mode_alone(backend, op):
    args, options = valid(op)
    with torch.inference_mode():
        args[2] = [vectors(*args[2][0].shape)]
    with pytest.raises(ValueError, match=f"^{op}: .*expected .*momenta.*got an inference tensor"):
        getattr(mbf_kernels, op)(*args, **options)
    assert_bitwise(args[0][0], vectors(*args[0][0].shape))
    with torch.inference_mode():
        getattr(mbf_kernels, op)(*args, **options)
    assert (args[0][0] != 1).any()


BAD_STORAGE = {
    "zeros: count": lambda: SymmetricBlocks.zeros(2.0, 3),
    "zeros: size": lambda: SymmetricBlocks.zeros(2, "3"),
    "count": lambda: SymmetricBlocks(torch.zeros(1, 6, 32), 1.5, 3),
    "size": lambda: SymmetricBlocks(torch.zeros(1, 6, 32), 2, None),
    "cat: none": lambda: SymmetricBlocks.cat(None),
    "cat: numbers": lambda: SymmetricBlocks.cat([1, 2]),
    "cat: nothing": lambda: SymmetricBlocks.cat([]),
    "split: none": lambda: blocks().split(None),
    "split: below zero": lambda: blocks().split([-1, B + 1]),
    "split: halves": lambda: blocks().split([0.5, B - 0.5]),
    "from_dense: no values": lambda: SymmetricBlocks.from_dense(torch.zeros(2, 3, 3, device="meta")),
    "from_packed: standing for others": lambda: SymmetricBlocks.from_packed(
        TwoTensor(torch.ones(2, 6), torch.ones(2, 6))
    ),
}


@pytest.mark.parametrize("call", BAD_STORAGE.values(), ids=BAD_STORAGE)
def test_bad_storage(call):
    with pytest.raises((TypeError, ValueError), match=r"^SymmetricBlocks.*: expected .*got "):
        call()


def test_integers_of_numpy():
    count, size = np.int64(B), np.int32(N)
    made = SymmetricBlocks.zeros(count, size)
    assert SymmetricBlocks(made.data, count, size).to_dense().shape == (B, N, N)
    assert [part.count for part in made.split([np.int64(2), np.int64(B - 2)])] == [2, B - 2]


@pytest.mark.parametrize("name", [None, 3, "gpu", ["cpu"], {}], ids=str)
def test_a_backend_that_does_not_exist(name):
    with (
        pytest.raises(ValueError, match="^use_backend: expected one of reference, .*got "),
        mbf_kernels.use_backend(name),
    ):
        pass


def test_storage_of_another_shape():
    for data in (vectors(1, 45, 31), vectors(2, 45, 32), vectors(32, 45).t().view(1, 45, 32)[:, :, ::2]):
        with pytest.raises(ValueError, match="expected"):
            SymmetricBlocks(data, B, N)


@pytest.mark.parametrize("op", ["accumulate_", "factor", "solve", "accumulate_factor_solve_"])
def test_no_silent_cut_of_a_graph_through_matrices(op):
    args, options = valid(op)
    args[0].data.requires_grad_()
    with pytest.raises(RuntimeError, match=f"^{op}: "):
        getattr(mbf_kernels, op)(*args, **options)


@pytest.mark.parametrize("op", ["accumulate_", "solve", "accumulate_factor_solve_", *STEPS])
def test_no_silent_cut_of_a_graph(backend, op):
    """The ops are not differentiable, so an argument that requires grad is refused, unless in no_grad()."""
    args, options = valid(op)
    if op in STEPS:
        args[0][0].requires_grad_()
    else:
        args[1].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^{op}: "):
        getattr(mbf_kernels, op)(*args, **options)
    with torch.no_grad():
        getattr(mbf_kernels, op)(*args, **options)


@pytest.mark.parametrize("op", ["factor", "accumulate_factor_solve_", *STEPS])
def test_no_silent_cut_of_a_graph_through_a_number_on_the_device(op):
    args, options = valid(op)
    name = "lr" if op == "mbf_diagonal_step_" else "damping"
    with pytest.raises(RuntimeError, match=f"^{op}: "):
        getattr(mbf_kernels, op)(*args, **options | {name: torch.tensor(0.1, requires_grad=True)})


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
    none = [torch.empty(3, 0, size, device=device) for _ in range(4)]
    (info,) = mbf_shared_step_(*[[t] for t in none], [f], **step, graft="adam")
    assert info.shape == (0,) and info.dtype == torch.int32
    assert mbf_diagonal_step_(*[[t] for t in none], lr=0.1, momentum=0.9, diagonal_decay=0.9) is None
    nothing, rank_one = [None, None], dict(lr=0.1, momentum=0.9, damping=0.1)
    assert rank_one_step_(*[[t, t.view(0)] for t in none[:3]], nothing, nothing, **rank_one) is None
    lower, _ = mbf_kernels.factor(blocks(3, size, device=device), damping=0.1)
    assert mbf_kernels.solve(lower, torch.empty(3, size, 0, device=device)).shape == (3, size, 0)
