"""The public functions, and their registration with ``torch.library`` as ``torch.ops.mbf_kernels.*``.

A registered op takes the storage tensor, count and size of its blocks, checks everything and calls the chosen
backend; a public function takes ``SymmetricBlocks`` and calls the op. In-place arguments are declared as mutated, and
refused where they share memory with another argument. No op is differentiable.

A bad block hurts only itself: where a gradient is not finite or a pivot is not positive and finite, that block's F,
momentum and weights stay as they were, its solution is zero, ``info`` says so, and its neighbours keep every bit.
``info`` [B] int32 has LAPACK's meaning: 0 is good; k > 0 says that k (counted from 1) is the first pivot that is not
positive and finite, or else the first element that is not finite.

Rates, dampings and weights may be numbers on the device, 0-d tensors of float32 or float64, so that a captured CUDA
graph follows them. They are never read on the host, so their values are not checked. A registered op takes them as
extra arguments, which win over the floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .blocks import SymmetricBlocks
from .registration import register


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
    checks.no_grad("accumulate_", fisher.data, g)
    decay = checks.number("accumulate_", "decay", decay)
    torch.ops.mbf_kernels.accumulate_(fisher.data, fisher.count, fisher.size, g, decay)
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
    relative = checks.flag("factor", "relative", relative)
    data, info = torch.ops.mbf_kernels.factor(fisher.data, fisher.count, fisher.size, damping, relative, device_damping)
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

    ``accumulate_``, ``factor`` and ``solve`` in one launch, with one pass over F. F and info are the same as of the
    three in a row; x may differ in rounding, since a factor that nobody keeps can take other forms: the CPU's is
    L D L^T without square roots, and a GPU forms 1 / sqrt(pivot) at once.
    """
    op = "accumulate_factor_solve_"
    checks.blocks(op, "fisher", fisher)
    checks.tensors(op, g=g, rhs=rhs)
    damping, device_damping = _scalar(op, "damping", damping)
    checks.no_grad(op, fisher.data, g, rhs, device_damping)
    decay, relative = checks.number(op, "decay", decay), checks.flag(op, "relative", relative)
    return torch.ops.mbf_kernels.accumulate_factor_solve_(
        fisher.data, fisher.count, fisher.size, g, rhs, decay, damping, relative, device_damping
    )


def _scalar(op: str, name: str, value: float | Tensor) -> tuple[float, Tensor | None]:
    """What a registered op takes: a number, and the tensor that wins over it."""
    return (0.0, value) if isinstance(value, Tensor) else (checks.number(op, name, value), None)


# Of every op: its checks, what it returns (all a trace needs to know), and the call of the backend.


def _check_accumulate(fisher, count, size, g, decay):
    checks.storage("accumulate_", fisher, count, size)
    checks.vectors("accumulate_", "g", g, fisher, count, size, samples=True)
    checks.decay("accumulate_", decay)


def _empty_accumulate(fisher, count, size, g, decay):
    return None


def _accumulate(fisher, count, size, g, decay):
    checks.memory("accumulate_", {"fisher": [fisher]}, {"g": [g]})
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
    checks.memory("accumulate_factor_solve_", {"fisher": [fisher]}, {"g": [g], "rhs": [rhs]})
    backend = choose("accumulate_factor_solve_", fisher.device, size)
    blocks = SymmetricBlocks(fisher, count, size)
    result = backend.accumulate_factor_solve_(blocks, g, rhs, decay, _either(device_damping, damping), relative)
    torch.autograd.graph.increment_version(fisher)
    return result


def _either(device_scalar, number):
    return number if device_scalar is None else device_scalar


def _has_blocks(storage, count, *arguments):
    return count > 0


register(
    "accumulate_",
    "(Tensor(a!) fisher, int count, int size, Tensor g, float decay) -> ()",
    _check_accumulate,
    _empty_accumulate,
    _accumulate,
    _has_blocks,
)
register(
    "factor",
    "(Tensor fisher, int count, int size, float damping, bool relative, Tensor? device_damping) -> (Tensor, Tensor)",
    _check_factor,
    _empty_factor,
    _factor,
    _has_blocks,
)
register(
    "solve",
    "(Tensor factor, int count, int size, Tensor rhs) -> Tensor",
    _check_solve,
    _empty_solve,
    _solve,
    _has_blocks,
)
register(
    "accumulate_factor_solve_",
    "(Tensor(a!) fisher, int count, int size, Tensor g, Tensor rhs, float decay, float damping, bool relative,"
    " Tensor? device_damping) -> (Tensor, Tensor)",
    _check_fused,
    _empty_fused,
    _fused,
    _has_blocks,
)
