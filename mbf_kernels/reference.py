"""Every op in plain ``torch.linalg``: the specification, the fallback, and what the kernels are tested against.

Any block size, float32 and float64, any device; a damping, rate or weight may be a number on the device, which is
never read on the host. ``info`` [B] int32: 0 is good; k > 0 says that k (from 1) is the
first pivot that is not positive and finite, or else the first element that is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import shared
from .blocks import SymmetricBlocks, pack_dense
from .diagonal import mbf_diagonal_step_  # noqa: F401, one of this backend's ops
from .options import StepOptions
from .rank_one import rank_one_step_  # noqa: F401, likewise
from .rowwise import first_bad, flag_nonfinite, length_ratio, wide


def accumulate_(
    fisher: SymmetricBlocks,
    g: Tensor,  # [S, B, n]
    decay: float,
) -> None:
    """F <- decay F + (1-decay) mean_s g_s g_s^T; a block whose new diagonal is not finite keeps its old value."""
    updated = _accumulated(fisher.to_dense(), g, decay)
    finite = updated.diagonal(dim1=1, dim2=2).isfinite().all(1)
    _overwrite(fisher, updated, finite)


def factor(fisher: SymmetricBlocks, damping: float | Tensor, relative: bool) -> tuple[SymmetricBlocks, Tensor]:
    """L with L L^T = F + lambda I, and info; L = 0 for a bad block."""
    lower, info = _factored(fisher.to_dense(), damping, relative, zero_block_lambda=0.0)
    return SymmetricBlocks(pack_dense(lower), fisher.count, fisher.size), info


def solve(
    factor: SymmetricBlocks,
    rhs: Tensor,  # [B, n, k]
) -> Tensor:
    """x = (L L^T)^-1 rhs; x = 0 for a block whose factor is bad."""
    return _solved(factor.to_dense().tril(), rhs)


def accumulate_factor_solve_(
    fisher: SymmetricBlocks,
    g: Tensor,  # [B, n]
    rhs: Tensor,  # [B, n]
    decay: float,
    damping: float | Tensor,
    relative: bool,
) -> tuple[Tensor, Tensor]:
    """The three in a row. A bad block keeps its F, and its x is 0."""
    updated = _accumulated(fisher.to_dense(), g[None], decay)
    lower, info = _factored(updated, damping, relative, zero_block_lambda=0.0)
    x = _solved(lower, rhs[..., None])[..., 0]
    for vector in (g, rhs, x):
        info = flag_nonfinite(info, vector)
    good = info == 0
    _overwrite(fisher, updated, good)
    return torch.where(good[:, None], x, 0), info


def mbf_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    fishers: Sequence[SymmetricBlocks],
    factors: Sequence[SymmetricBlocks],
    skipped: Sequence[Tensor],
    momentum_weights: Sequence[float] | Sequence[Tensor],
    fisher_weights: Sequence[float] | Sequence[Tensor],
    options: StepOptions,
) -> Tensor:
    """One optimizer step for each tensor; returns the info of all blocks in a row."""
    infos = []
    for i, fisher in enumerate(fishers):
        info = _step(
            params[i], grads[i], momenta[i], fisher, factors[i] if factors else None,
            momentum_weights[i], fisher_weights[i], options,
        )  # fmt: skip
        if skipped:
            skipped[i] += (info != 0).sum()
        infos.append(info)
    return torch.cat(infos)


def mbf_shared_step_(*arguments) -> Tensor:
    return shared.mbf_shared_step_(sys.modules[__name__], *arguments)


def _step(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    fisher: SymmetricBlocks,
    cached: SymmetricBlocks | None,
    momentum_weight: float | Tensor,
    fisher_weight: float | Tensor,
    o: StepOptions,
) -> Tensor:
    blocks = (fisher.count, fisher.size)
    g = grad.reshape(blocks)
    if o.maximize:
        g = -g
    m = o.momentum * momentum.reshape(blocks) + g
    d = o.momentum * m + g if o.nesterov else m

    dense = fisher.to_dense()
    updated = _accumulated(dense, g[None], o.decay) if o.update else dense
    if o.refactor:
        lower, info = _factored(updated, o.damping, o.relative, zero_block_lambda=1.0)
    else:
        lower = cached.to_dense().tril()
        info = first_bad(lower.diagonal(dim1=1, dim2=2) > 0)
    p = _solved(lower, d[..., None])[..., 0]
    for vector in (g, d, p):
        info = flag_nonfinite(info, vector)
    good = info == 0

    lr = wide(o.lr)
    rate = lr * torch.ones_like(p[:, :1])
    if o.graft:
        mean = (1 - o.momentum) / wide(momentum_weight) * d
        u = mean / ((updated.diagonal(dim1=1, dim2=2) / fisher_weight).sqrt() + o.eps)
        rate = lr * length_ratio(u, p)
    stepped = (1 - lr * o.weight_decay) * param.reshape(blocks) - rate * p

    if o.update:
        _overwrite(fisher, updated, good)
    if o.refactor and cached is not None:
        _overwrite(cached, lower, good)
    for tensor, new in ((momentum, m), (param, stepped)):
        tensor.copy_(torch.where(good[:, None], new, tensor.reshape(blocks)).view(tensor.shape))
    return info


def _accumulated(
    dense: Tensor,  # [B, n, n]
    g: Tensor,  # [S, B, n]
    decay: float,
) -> Tensor:
    per_block = g.transpose(0, 1)  # [B, S, n]
    return torch.baddbmm(dense, per_block.mT, per_block, beta=decay, alpha=(1 - decay) / len(g))


def _factored(
    dense: Tensor,  # [B, n, n]
    damping: float | Tensor,
    relative: bool,
    zero_block_lambda: float,  # relative damping of a block whose trace is zero
) -> tuple[Tensor, Tensor]:
    if relative:
        trace = dense.diagonal(dim1=1, dim2=2).sum(1)
        damp = torch.where(trace > 0, damping * trace / dense.shape[1], zero_block_lambda)
    else:
        damp = damping * dense.new_ones(dense.shape[:1])
    lower, lapack = torch.linalg.cholesky_ex(dense + torch.diag_embed(damp[:, None].expand(dense.shape[:2])))
    diagonal = lower.diagonal(dim1=1, dim2=2)
    # LAPACK lets an infinite pivot pass and may stop at a later one
    info = first_bad(diagonal.isfinite() & (diagonal > 0))
    info = torch.where((lapack != 0) & ((info == 0) | (lapack < info)), lapack, info)
    return torch.where((info == 0)[:, None, None], lower, 0), info


def _solved(
    lower: Tensor,  # [B, n, n]
    rhs: Tensor,  # [B, n, k]
) -> Tensor:
    bad = (first_bad(lower.diagonal(dim1=1, dim2=2) > 0) != 0)[:, None, None]
    identity = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    return torch.where(bad, 0, torch.cholesky_solve(rhs, torch.where(bad, identity, lower)))


def _overwrite(blocks: SymmetricBlocks, dense: Tensor, where: Tensor) -> None:
    """Writes the blocks that ``where`` [B] selects; the others keep every bit."""
    blocks.data.copy_(pack_dense(torch.where(where[:, None, None], dense, blocks.to_dense())))
