"""The ops as citizens of torch: opcheck, torch.compile without graph breaks, declared mutation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mbf_kernels import (
    SymmetricBlocks,
    accumulate_,
    accumulate_factor_solve_,
    backends,
    factor,
    mbf_diagonal_step_,
    mbf_shared_step_,
    mbf_step_,
    rank_one_step_,
    solve,
    use_backend,
)
from mbf_kernels.testing import assert_bitwise, randn, spd_blocks

STEPS = {"mbf_step_", "mbf_shared_step_", "mbf_diagonal_step_", "rank_one_step_"}
OPS = {"accumulate_", "factor", "solve", "accumulate_factor_solve_"} | STEPS


class Recorder(TorchDispatchMode):
    """Keeps every call of this library's ops, with copies of the arguments as they were."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mbf_kernels":
            copies = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs or {}))
            self.calls.append((func, *copies))
        return func(*args, **(kwargs or {}))


def use_everything(f, factors, g, rhs, w, m, skipped, scalar):
    """Every public function once."""
    accumulate_(f, g, decay=0.9)
    accumulate_(f, torch.stack([g, rhs]), decay=0.9)
    lower, info = factor(f, damping=0.1, relative=True)
    x = solve(lower, rhs)
    wide = solve(lower, torch.stack([rhs, g], dim=-1))
    y, _ = accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=0.1)
    step = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1, factors=[factors], skipped=[skipped])
    infos = mbf_step_([w], [g], [m], [f], **step)
    infos += mbf_step_([w], [g], [m], [f], **step, graft="adam", nesterov=True, update=False, refactor=False)
    on_device = dict(damping=scalar, lr=scalar, momentum_weight=scalar, fisher_weight=[scalar])
    infos += mbf_step_([w], [g], [m], [f], **step | on_device, graft="adam")
    infos += use_shared_and_diagonal(f, factors, g, rhs, w, m, skipped, scalar)
    use_rank_one(g, rhs, w, m, scalar)
    factor(f, damping=scalar)
    z, _ = accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=scalar, relative=True)
    return x + y + z, wide, info, *infos


def use_shared_and_diagonal(f, factors, g, rhs, w, m, skipped, scalar):
    """On [1, R, n] and, where there are blocks, on a pair of [S, 1, n - 1] and [S]."""
    v = (rhs * rhs).unsqueeze(0)
    shared = [t.unsqueeze(0) for t in (w, g, m)]
    step = dict(lr=0.1, momentum=0.9, decay=0.9, damping=0.1, skipped=[skipped])
    infos = mbf_shared_step_(*([t] for t in shared), None, [f], **step)
    infos += mbf_shared_step_(*([t] for t in (*shared, v)), [f], **step, graft="adam", factors=[factors])
    on_device = dict(damping=scalar, lr=scalar, momentum_weight=scalar, square_weight=[scalar], relative=True)
    cached = dict(factors=[factors], update=False, refactor=False)
    infos += mbf_shared_step_(*([t] for t in (*shared, v)), [f], **step | on_device, **cached, graft="adam")
    if len(w):
        pairs = [[(t[:, :-1].unsqueeze(1), t[:, -1])] for t in (w, g, m)]
        infos += mbf_shared_step_(*pairs, None, f.split([1, f.count - 1])[:1], **step)
    mbf_diagonal_step_([w], [g], [m], [v[0]], lr=0.1, momentum=0.9, diagonal_decay=0.9, weight_decay=0.1)
    weights = dict(momentum_weight=scalar, square_weight=[scalar])
    mbf_diagonal_step_([w], [g], [m], [v[0]], lr=scalar, momentum=0.9, diagonal_decay=0.9, graft="adam", **weights)
    return [*infos, v]


def use_rank_one(g, rhs, w, m, scalar):
    """With curvature and without, in one call and apart."""
    s, h = rhs.square().sum(1), rhs.square().sum(0)
    step = dict(lr=0.1, momentum=0.9, damping=0.1)
    rank_one_step_([w], [g], [m], [s], [h], **step, weight_decay=0.1)
    w2, m2 = w.clone(), m.clone()
    rank_one_step_([w, w2], [g, g], [m, m2], [s, None], [h, None], **step, decoupled=False, momentum_weight=[0.5, 1.0])
    on_device = dict(lr=scalar, damping=scalar, momentum_weight=[scalar])
    rank_one_step_([w], [g], [m], [None], [None], **step | on_device)


def arguments(size, dtype=torch.float64, count=37):
    f = SymmetricBlocks.from_dense(spd_blocks("well", count, size, dtype))
    factors = SymmetricBlocks.zeros(count, size, dtype)
    g, rhs, w, m = (randn(count, size, dtype=dtype, seed=s) for s in range(4))
    return f, factors, g, rhs, w, m, torch.tensor(0), torch.tensor(0.1, dtype=torch.float64)


@pytest.mark.parametrize("size", [9, 22, 129])
@pytest.mark.parametrize("count", [37, 0])
def test_opcheck(backend, size, count):
    """Schema, mutation, fake kernels and traceability of every op, on arguments it really gets."""
    with Recorder() as recorder:
        use_everything(*arguments(size, count=count))
    assert {func._opname for func, _, _ in recorder.calls} == OPS
    for func, args, kwargs in recorder.calls:
        if size != 9 and func._opname in STEPS - {"mbf_step_"}:
            continue  # the same whatever the size
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("size", [9, 22])
def test_compile_without_graph_breaks(native, size):
    """The same bits as eager execution, in results and in everything changed in place."""
    torch.compiler.reset()
    eager, compiled = arguments(size), arguments(size)
    expected = use_everything(*eager)
    actual = torch.compile(use_everything, fullgraph=True, backend="aot_eager")(*compiled)
    for a, e in zip((*actual, *compiled), (*expected, *eager), strict=True):
        assert_same(*(t.data if isinstance(t, SymmetricBlocks) else t for t in (a, e)))


def test_compile_with_inductor(native):
    def fused(f, g, rhs):
        return accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=0.1)

    torch.compiler.reset()
    (f, _, g, rhs, *_), (f2, *_) = arguments(9), arguments(9)
    x, info = torch.compile(fused, fullgraph=True)(f, g, rhs)
    x2, info2 = fused(f2, g, rhs)
    for a, b in ((x, x2), (info, info2), (f.data, f2.data)):
        assert_same(a, b)


def assert_same(a, b):
    assert_bitwise(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_in_place_ops_count_as_changes():
    """autograd sees that a tensor it saved was changed."""
    f, factors, g, rhs, w, m, skipped, _ = arguments(9)
    changed = {"F": f.data, "w": w, "m": m, "factors": factors.data, "skipped": skipped}
    before = {name: t._version for name, t in changed.items()}
    read = g._version
    mbf_step_([w], [g], [m], [f], lr=0.1, momentum=0.9, decay=0.9, damping=0.1, factors=[factors], skipped=[skipped])
    assert all(t._version > before[name] for name, t in changed.items()) and g._version == read
    v = rhs * rhs
    changed["v"] = v
    before = {name: t._version for name, t in changed.items()}
    lists = [[t.unsqueeze(0)] for t in (w, g, m, v)]
    options = dict(lr=0.1, momentum=0.9, graft="adam")
    mbf_shared_step_(*lists, [f], **options, decay=0.9, damping=0.1, factors=[factors], skipped=[skipped])
    assert all(t._version > before[name] for name, t in changed.items()) and g._version == read
    before = {name: t._version for name, t in changed.items()}
    mbf_diagonal_step_([w], [g], [m], [v], **options, diagonal_decay=0.9)
    assert all(changed[name]._version > before[name] for name in "wmv") and g._version == read
    before = {name: t._version for name, t in changed.items()}
    rank_one_step_([w], [g], [m], [v[:, 0]], [v[0]], lr=0.1, momentum=0.9, damping=0.1)
    assert all((changed[name]._version > before[name]) == (name in "wm") for name in changed) and g._version == read
    version = f.data._version
    accumulate_(f, g, decay=0.9)
    assert f.data._version > version
    version = f.data._version
    accumulate_factor_solve_(f, g, rhs, decay=0.9, damping=0.1)
    assert f.data._version > version


@pytest.mark.parametrize("name", ["cpu", "reference", "emulated"])
def test_gradients_are_read_only(name):
    """Also those that go through a copy: three levels of strides, expanded, of another layout than the parameter."""
    if backends()[name] != "available":
        pytest.skip("not available")
    shape, options = (2, 3, 2, 2, 3, 3), dict(lr=0.1, momentum=0.9)
    gradients = [
        torch.ones(shape[::-1]).permute(*range(5, -1, -1)),
        torch.ones(3, 1, 2, 1, 3, 1).permute(5, 4, 3, 2, 1, 0).expand(shape).transpose(0, 0),
        torch.ones(2, 1, 2, 1, 3, 1).expand(shape),
    ]
    with use_backend(name):
        for g in gradients:
            w, m, v = (torch.zeros(shape) for _ in range(3))
            version, before = g._version, g.clone()
            f = SymmetricBlocks.zeros(24, 9, torch.float32)
            mbf_step_([w], [g], [m], [f], **options, decay=0.9, damping=0.1)
            shared = SymmetricBlocks.zeros(2, 9, torch.float32)
            mbf_shared_step_([w], [g], [m], None, [shared], **options, decay=0.9, damping=0.1)
            mbf_diagonal_step_([w], [g], [m], [v], **options, diagonal_decay=0.9)
            s, h = torch.ones(24), torch.ones(9)
            rank_one_step_([w], [g], [m], [s], [h], **options, damping=0.1)
            assert g._version == version and torch.equal(g, before) and w.isfinite().all()


def test_fake_tensors_carry_shapes():
    """On the meta device every op gives shapes, dtypes and devices, and computes nothing."""
    f = SymmetricBlocks.zeros(37, 9, torch.float64, "meta")
    g = torch.empty(37, 9, dtype=torch.float64, device="meta")
    accumulate_(f, g, decay=0.9)
    lower, info = factor(f, damping=0.1)
    x, _ = accumulate_factor_solve_(f, g, g, decay=0.9, damping=0.1)
    (status,) = mbf_step_([g], [g.clone()], [g.clone()], [f], lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
    shared = [[torch.empty(5, 37, 9, dtype=torch.float64, device="meta")] for _ in range(4)]
    (info_of_shared,) = mbf_shared_step_(*shared, [f], lr=0.1, momentum=0.9, decay=0.9, damping=0.1, graft="adam")
    assert (info_of_shared.shape, info_of_shared.dtype) == ((37,), torch.int32)
    assert mbf_diagonal_step_([g], [g], [g], [g], lr=0.1, momentum=0.9, diagonal_decay=0.9) is None
    assert rank_one_step_([g], [g], [g], [g[:, 0]], [g[0]], lr=0.1, momentum=0.9, damping=0.1) is None
    assert {t.device.type for t in (lower.data, info, x, status, solve(lower, g))} == {"meta"}
    assert info.shape == status.shape == (37,) and x.shape == g.shape == solve(lower, g).shape
