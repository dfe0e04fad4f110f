"""The public functions, and their registration with ``torch.library`` as ``torch.ops.mbf_kernels.*``.

A registered op takes the storage tensor, count and size of its blocks, checks everything and calls the chosen
backend; a public function takes ``SymmetricBlocks`` and calls the op. In-place arguments are declared as mutated.
No op is differentiable.

A bad block hurts only itself: where a gradient is not finite or a pivot is not positive and finite, that block's F,
momentum and weights stay as they were, its solution is zero, ``info`` says so, and its neighbours keep every bit.
``info`` [B] int32 has LAPACK's meaning: 0 is good; k > 0 says that k (counted from 1) is the first pivot that is not
positive and finite, or else the first element that is not finite.

Rates, dampings and weights may be numbers on the device, 0-d tensors of float32 or float64, so that a captured CUDA
graph follows them. They are never read on the host, so their values are not checked. A registered op takes them as
extra arguments, which win over the floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .blocks import SymmetricBlocks
from .options import StepOptions

_library = torch.library.Library("mbf_kernels", "DEF")


def accumulate_(
    fisher: SymmetricBlocks,
    g: Tensor,  # [B, n] or [S, B, n]
    *,
    decay: float,  # beta in [0, 1]
) -> SymmetricBlocks:
    """F <- beta F + (1 - beta) mean_s g_s g_s^T, in place; returns ``fisher``.

    A block whose new diagonal is not finite keeps its old value. Raises ValueError or TypeError for a wrong shape,
    dtype, device or decay.
    """
    checks.blocks("accumulate_", "fisher", fisher)
    checks.tensors("accumulate_", g=g)
    checks.no_grad("accumulate_", g)
    torch.ops.mbf_kernels.accumulate_(fisher.data, fisher.count, fisher.size, g, float(decay))
    return fisher


def factor(
    fisher: SymmetricBlocks,
    *,
    damping: float | Tensor,  # lambda >= 0; a tensor's value is not checked
    relative: bool = False,
) -> tuple[SymmetricBlocks, Tensor]:
    """Cholesky: L with L L^T = F + lambda I, and info [B].

    ``relative`` makes lambda of block b ``damping * trace(F_b) / n``. L has the storage of F, its factor in the lower
    triangle of ``L.to_dense()``; the factor of a bad block is zero. Jitter is never added.
    """
    checks.blocks("factor", "fisher", fisher)
    damping, device_damping = _scalar("factor", "damping", damping)
    checks.no_grad("factor", fisher.data, device_damping)
    data, info = torch.ops.mbf_kernels.factor(
        fisher.data, fisher.count, fisher.size, damping, bool(relative), device_damping
    )
    return SymmetricBlocks(data, fisher.count, fisher.size), info


def solve(
    factor: SymmetricBlocks,
    rhs: Tensor,  # [B, n] or [B, n, k]
) -> Tensor:
    """x = (L L^T)^-1 rhs, in the shape of ``rhs``; zero for a block whose factor is bad."""
    checks.blocks("solve", "factor", factor)
    checks.tensors("solve", rhs=rhs)
    checks.no_grad("solve", factor.data, rhs)
    return torch.ops.mbf_kernels.solve(factor.data, factor.count, factor.size, rhs)


def accumulate_factor_solve_(
    fisher: SymmetricBlocks,
    g: Tensor,  # [B, n]
    rhs: Tensor,  # [B, n]
    *,
    decay: float,  # beta in [0, 1]
    damping: float | Tensor,  # lambda >= 0; a tensor's value is not checked
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """F <- beta F + (1 - beta) g g^T in place, then x = (F + lambda I)^-1 rhs: returns x [B, n] and info [B].

    ``accumulate_``, ``factor`` and ``solve`` in one launch, with one pass over F. The CPU gives the same bits as the
    three in a row; on a GPU x may differ in rounding: 1 / sqrt(pivot) is one instruction there, but ``solve`` has only
    the root.
    """
    op = "accumulate_factor_solve_"
    checks.blocks(op, "fisher", fisher)
    checks.tensors(op, g=g, rhs=rhs)
    damping, device_damping = _scalar(op, "damping", damping)
    checks.no_grad(op, g, rhs, device_damping)
    return torch.ops.mbf_kernels.accumulate_factor_solve_(
        fisher.data, fisher.count, fisher.size, g, rhs, float(decay), damping, bool(relative), device_damping
    )


def mbf_step_(
    params: Sequence[Tensor],  # W, each [..., *element dimensions of product n]
    grads: Sequence[Tensor],  # g, likewise
    momenta: Sequence[Tensor],  # M, likewise
    fishers: Sequence[SymmetricBlocks],  # F, all of one size n
    *,
    lr: float | Tensor,  # alpha
    momentum: float,  # mu in [0, 1)
    decay: float,  # beta in [0, 1]
    damping: float | Tensor,  # lambda >= 0
    weight_decay: float = 0.0,  # gamma, decoupled
    relative: bool = False,
    graft: str | None = None,  # None or "adam"
    nesterov: bool = False,
    eps: float = 1e-8,
    momentum_weight: float | Tensor | Sequence[float] | Sequence[Tensor] = 1.0,  # 1 - mu^t
    fisher_weight: float | Tensor | Sequence[float] | Sequence[Tensor] = 1.0,  # 1 - beta^t
    maximize: bool = False,
    update: bool = True,
    factors: Sequence[SymmetricBlocks] | None = None,
    refactor: bool = True,
    skipped: Sequence[Tensor] | None = None,  # int64 scalars
) -> list[Tensor]:
    """The whole Mini-Block Fisher step for tensors of one block size, in one launch. Per block::

        g <- -g                                    if maximize
        M <- mu M + g
        F <- beta F + (1 - beta) g g^T             if update
        D  = mu M + g if nesterov else M
        P  = (F + lambda I)^-1 D                   lambda = damping, or damping * trace(F)/n if relative
        W <- (1 - alpha gamma) W - alpha P                     graft=None: the paper's form
        W <- (1 - alpha gamma) W - alpha (|u| / |P|) P         graft="adam"; no step where P = 0
        u  = mhat / (sqrt(vhat) + eps), mhat = (1-mu) D / momentum_weight, vhat = diag(F) / fisher_weight

    The trailing dimensions of each tensor multiply to n, the leading ones enumerate its blocks; any strides work in
    place. The two weights undo the zero start of M and F (one number, or one per tensor). A zero block has no scale
    to be relative to: there lambda is 1. ``factors`` caches L: written if ``refactor``, used instead of factoring
    otherwise. ``skipped`` are counters, each incremented by its tensor's number of bad blocks. ``lr``, ``damping`` and
    the weights may be 0-d tensors on the device of the parameters; then their values are not checked.

    Returns info [B] of each tensor. Source: Bahamou, Goldfarb, Ren (AISTATS 2023); norm grafting per mini-block, from
    F's own diagonal, is ours.
    """
    op = "mbf_step_"
    for name, group in (("fishers", fishers), ("factors", factors or ())):
        for member in group:
            checks.blocks(op, name, member)
    checks.tensor_lists(op, params=params, grads=grads, momenta=momenta, skipped=skipped or ())
    checks.same_length(op, params=params, grads=grads, momenta=momenta, fishers=fishers)
    if not len(params):
        return []
    if graft not in (None, "adam"):
        raise ValueError(f'{op}: expected graft to be None or "adam", got {graft!r}')
    if factors is not None:
        checks.same_length(op, params=params, factors=factors)
        checks.same_blocks(op, fishers, factors)
    if not refactor and factors is None:
        raise ValueError(f"{op}: expected factors when refactor is False, got none")
    checks.one_size(op, fishers)
    lr, device_lr = _scalar(op, "lr", lr)
    damping, device_damping = _scalar(op, "damping", damping)
    momentum_weights, device_momentum_weights = _per_tensor(op, "momentum_weight", momentum_weight, len(params))
    fisher_weights, device_fisher_weights = _per_tensor(op, "fisher_weight", fisher_weight, len(params))
    checks.no_grad(op, *params, *grads, *momenta, device_lr, device_damping)
    info = torch.ops.mbf_kernels.mbf_step_(
        list(params),
        list(grads),
        list(momenta),
        [fisher.data for fisher in fishers],
        [factor.data for factor in factors or ()],
        list(skipped or ()),
        [fisher.count for fisher in fishers],
        fishers[0].size,
        momentum_weights,
        fisher_weights,
        lr,
        float(momentum),
        float(decay),
        damping,
        float(weight_decay),
        float(eps),
        bool(relative),
        graft == "adam",
        bool(nesterov),
        bool(maximize),
        bool(update),
        bool(refactor),
        device_lr,
        device_damping,
        device_momentum_weights,
        device_fisher_weights,
    )
    return list(info.split([fisher.count for fisher in fishers]))


def _scalar(op: str, name: str, value: float | Tensor) -> tuple[float, Tensor | None]:
    """What a registered op takes: a number, and the tensor that wins over it."""
    return (0.0, value) if isinstance(value, Tensor) else (checks.number(op, name, value), None)


def _per_tensor(op: str, name: str, weight: float | Tensor | Sequence, count: int) -> tuple[list[float], list[Tensor]]:
    """Numbers, one per tensor, or else tensors."""
    weights = list(weight) if isinstance(weight, Sequence) else [weight] * count
    if weights and isinstance(weights[0], Tensor):
        checks.tensor_lists(op, **{name: weights})
        return [], weights
    return [checks.number(op, name, w) for w in weights], []


# Of every op: its checks, what it returns (all a trace needs to know), and the call of the backend.


def _check_accumulate(fisher, count, size, g, decay):
    checks.storage("accumulate_", fisher, count, size)
    checks.vectors("accumulate_", "g", g, fisher, count, size, samples=True)
    checks.decay("accumulate_", decay)


def _empty_accumulate(fisher, count, size, g, decay):
    return None


def _accumulate(fisher, count, size, g, decay):
    samples = g if g.ndim == 3 else g[None]
    choose("accumulate_", fisher.device, size).accumulate_(SymmetricBlocks(fisher, count, size), samples, decay)
    torch.autograd.graph.increment_version(fisher)


def _check_factor(fisher, count, size, damping, relative, device_damping):
    checks.storage("factor", fisher, count, size)
    checks.non_negative("factor", damping=damping)
    checks.device_scalars("factor", fisher, damping=device_damping)


def _empty_factor(fisher, count, size, damping, relative, device_damping):
    return torch.empty_like(fisher), fisher.new_empty(count, dtype=torch.int32)


def _factor(fisher, count, size, damping, relative, device_damping):
    blocks = SymmetricBlocks(fisher, count, size)
    damping = _either(device_damping, damping)
    lower, info = choose("factor", fisher.device, size).factor(blocks, damping, relative)
    return lower.data, info


def _check_solve(factor, count, size, rhs):
    checks.storage("solve", factor, count, size)
    checks.right_hand_sides("solve", rhs, factor, count, size)


def _empty_solve(factor, count, size, rhs):
    return rhs.new_empty(rhs.shape)


def _solve(factor, count, size, rhs):
    if rhs.numel() == 0:
        return _empty_solve(factor, count, size, rhs)
    columns = rhs if rhs.ndim == 3 else rhs[..., None]
    x = choose("solve", factor.device, size).solve(SymmetricBlocks(factor, count, size), columns)
    return x.reshape(rhs.shape).contiguous()


def _check_fused(fisher, count, size, g, rhs, decay, damping, relative, device_damping):
    op = "accumulate_factor_solve_"
    checks.storage(op, fisher, count, size)
    for name, vector in (("g", g), ("rhs", rhs)):
        checks.vectors(op, name, vector, fisher, count, size)
    checks.decay(op, decay)
    checks.non_negative(op, damping=damping)
    checks.device_scalars(op, fisher, damping=device_damping)


def _empty_fused(fisher, count, size, g, rhs, decay, damping, relative, device_damping):
    return rhs.new_empty(rhs.shape), fisher.new_empty(count, dtype=torch.int32)


def _fused(fisher, count, size, g, rhs, decay, damping, relative, device_damping):
    backend = choose("accumulate_factor_solve_", fisher.device, size)
    blocks = SymmetricBlocks(fisher, count, size)
    result = backend.accumulate_factor_solve_(blocks, g, rhs, decay, _either(device_damping, damping), relative)
    torch.autograd.graph.increment_version(fisher)
    return result


def _check_step(
    params, grads, momenta, fishers, factors, skipped, counts, size, momentum_weights, fisher_weights,
    lr, momentum, decay, damping, weight_decay, eps, relative, graft, nesterov, maximize, update, refactor,
    device_lr, device_damping, device_momentum_weights, device_fisher_weights,
):  # fmt: skip
    op = "mbf_step_"
    checks.decay(op, decay)
    checks.momentum(op, momentum)
    checks.non_negative(op, lr=lr, damping=damping, weight_decay=weight_decay, eps=eps)
    checks.device_scalars(op, params[0], lr=device_lr, damping=device_damping)
    for name, numbers, tensors in (
        ("momentum_weight", momentum_weights, device_momentum_weights),
        ("fisher_weight", fisher_weights, device_fisher_weights),
    ):
        checks.weights(op, name, numbers, tensors, params)
    checks.step_tensors(op, params, grads, momenta, fishers, factors, skipped, counts, size)


def _empty_step(params, grads, momenta, fishers, factors, skipped, counts, size, *options):
    return fishers[0].new_empty(sum(counts), dtype=torch.int32)


def _step(
    params, grads, momenta, fishers, factors, skipped, counts, size, momentum_weights, fisher_weights,
    lr, momentum, decay, damping, weight_decay, eps, relative, graft, nesterov, maximize, update, refactor,
    device_lr, device_damping, device_momentum_weights, device_fisher_weights,
):  # fmt: skip
    keep = [i for i, count in enumerate(counts) if count]

    def pick(items):
        return [items[i] for i in keep] if items else []

    def pick_blocks(data):
        return [SymmetricBlocks(data[i], counts[i], size) for i in keep] if data else []

    options = StepOptions(
        _either(device_lr, lr), momentum, decay, _either(device_damping, damping), weight_decay, eps,
        relative, graft, nesterov, maximize, update, refactor,
    )  # fmt: skip
    info = choose("mbf_step_", params[0].device, size).mbf_step_(
        pick(params), pick(grads), pick(momenta), pick_blocks(fishers), pick_blocks(factors), pick(skipped),
        pick(device_momentum_weights or momentum_weights), pick(device_fisher_weights or fisher_weights), options,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *momenta, *fishers, *factors, *skipped])
    return info


def _either(device_scalar, number):
    return number if device_scalar is None else device_scalar


def _register(name: str, schema: str, check, empty, run) -> None:
    def checked(*args):
        check(*args)
        blocks = args[6] if name == "mbf_step_" else [args[1]]  # the counts
        return run(*args) if any(blocks) else empty(*args)

    def fake(*args):
        check(*args)
        return empty(*args)

    _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mbf_kernels::{name}", fake, lib=_library)


_register(
    "accumulate_",
    "(Tensor(a!) fisher, int count, int size, Tensor g, float decay) -> ()",
    _check_accumulate,
    _empty_accumulate,
    _accumulate,
)
_register(
    "factor",
    "(Tensor fisher, int count, int size, float damping, bool relative, Tensor? device_damping) -> (Tensor, Tensor)",
    _check_factor,
    _empty_factor,
    _factor,
)
_register(
    "solve",
    "(Tensor factor, int count, int size, Tensor rhs) -> Tensor",
    _check_solve,
    _empty_solve,
    _solve,
)
_register(
    "accumulate_factor_solve_",
    "(Tensor(a!) fisher, int count, int size, Tensor g, Tensor rhs, float decay, float damping, bool relative,"
    " Tensor? device_damping) -> (Tensor, Tensor)",
    _check_fused,
    _empty_fused,
    _fused,
)
_register(
    "mbf_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] fishers, Tensor(d!)[] factors,"
    " Tensor(e!)[] skipped, int[] counts, int size, float[] momentum_weights, float[] fisher_weights,"
    " float lr, float momentum, float decay, float damping, float weight_decay, float eps, bool relative,"
    " bool graft, bool nesterov, bool maximize, bool update, bool refactor, Tensor? device_lr, Tensor? device_damping,"
    " Tensor[] device_momentum_weights, Tensor[] device_fisher_weights) -> Tensor",
    _check_step,
    _empty_step,
    _step,
)
