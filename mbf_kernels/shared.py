"""The step of mini-blocks that share matrices, as matrix products of torch: any size and device.

R matrices F_r, each the average over the S mini-blocks that share it. The matrices of all tensors are damped and
factored in one launch, by ``kernels``, a backend's ``accumulate_``, ``factor``
and ``solve``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import SymmetricBlocks
from .options import StepOptions
from .rowwise import first_bad, length_ratio, wide

MAX_INVERTED_SIZE = 128  # up to here an inverse and a product, above it solves with the factor

Parts = Sequence[Tensor]  # of a tensor's mini-blocks: the elements, and where a bias joins the last one


def mbf_shared_step_(
    kernels: Any,
    params: Sequence[Parts],
    grads: Sequence[Parts],
    momenta: Sequence[Parts],
    squares: Sequence[Parts],
    fishers: Sequence[SymmetricBlocks],
    factors: Sequence[SymmetricBlocks],
    skipped: Sequence[Tensor],
    momentum_weights: Sequence[float] | Sequence[Tensor],
    square_weights: Sequence[float] | Sequence[Tensor],
    options: StepOptions,
) -> Tensor:
    """One optimizer step for each tensor; returns the info of all matrices in a row."""
    if options.update:
        for fisher, grad in zip(fishers, grads, strict=True):
            if not grad[0].numel():  # the mean of none
                continue
            kernels.accumulate_(fisher, _flat(grad, fisher), options.decay)
    lowers, infos = _factored(kernels, fishers, factors, options)
    for i, lower in enumerate(lowers):
        if not params[i][0].numel():
            continue
        bad = _move(
            kernels, params[i], grads[i], momenta[i], squares[i] if squares else None, lower,
            momentum_weights[i], square_weights[i], options,
        )  # fmt: skip
        if skipped:
            skipped[i] += bad
    return infos


def _flat(parts: Parts, blocks: SymmetricBlocks) -> Tensor:
    """[S, R, n]."""
    main = parts[0].reshape(-1, blocks.count, blocks.size - len(parts) + 1)
    return main if len(parts) == 1 else torch.cat([main, parts[1].reshape(-1, 1, 1)], 2)


def _factored(
    kernels: Any, fishers: Sequence[SymmetricBlocks], factors: Sequence[SymmetricBlocks], o: StepOptions
) -> tuple[Sequence[SymmetricBlocks], Tensor]:
    """L with L L^T = F + lambda I of every tensor, and info. Zero where it is bad; then a cached factor stays."""
    if not o.refactor:
        diagonals = [factor.diagonal() for factor in factors]
        return factors, torch.cat([first_bad(diagonal > 0) for diagonal in diagonals])
    together = SymmetricBlocks.cat(fishers)
    if o.relative:
        together = _with_scale(together, o.damping)
    lower, info = kernels.factor(together, o.damping, o.relative)
    counts = [fisher.count for fisher in fishers]
    lowers = lower.split(counts)
    for cached, new, bad in zip(factors, lowers, (info != 0).split(counts), strict=bool(factors)):
        kept = torch.where(bad[:, None], cached.to_packed(), new.to_packed())
        cached.data.copy_(SymmetricBlocks.from_packed(kept).data)
    return lowers, info


def _with_scale(fishers: SymmetricBlocks, damping: float | Tensor) -> SymmetricBlocks:
    """Zero blocks (inputs that were never active) replaced so that they are I when damped: they have no scale for
    damping to be relative to."""
    zero = fishers.diagonal().sum(1) == 0
    packed = fishers.to_packed()
    i = torch.arange(fishers.size, device=fishers.device)
    identity = torch.zeros_like(packed[0]).index_fill_(0, i * (i + 3) // 2, 1) / (1 + wide(damping))
    return SymmetricBlocks.from_packed(torch.where(zero[:, None], identity.to(packed.dtype), packed))


def _move(
    kernels: Any,
    param: Parts,
    grad: Parts,
    momentum: Parts,
    square: Parts | None,
    lower: SymmetricBlocks,
    momentum_weight: float | Tensor,
    square_weight: float | Tensor,
    o: StepOptions,
) -> Tensor:
    """M, v and W of the good mini-blocks; returns the number of bad ones."""
    g = _flat(grad, lower)
    if o.maximize:
        g = -g
    m = torch.add(g, _flat(momentum, lower), alpha=o.momentum)
    d = torch.add(g, m, alpha=o.momentum) if o.nesterov else m
    p = _directions(kernels, lower, d, unit_scale=o.graft)
    finite = d.isfinite().all(2, keepdim=True) & p.isfinite().all(2, keepdim=True)
    lr = wide(o.lr)
    rate = lr * p.new_ones(1)
    if o.graft:
        beta = o.diagonal_decay
        v = torch.addcmul(beta * _flat(square, lower), g, g, value=1 - beta)
        finite &= v.isfinite().all(2, keepdim=True)
        denominator = (v / square_weight).sqrt_().add_(o.eps)
        u = torch.where(denominator > 0, d / denominator, 0)
        rate = lr * (1 - o.momentum) / wide(momentum_weight) * length_ratio(u, p)
    rate = rate.to(p.dtype)
    finite &= rate.isfinite()  # |u| overflows where v = 0 and eps is tiny
    w = torch.addcmul((1 - lr * o.weight_decay) * _flat(param, lower), rate, p, value=-1)

    good = finite & (lower.diagonal() > 0).all(1, keepdim=True)  # [S, R, 1]
    moved = [(param, w), (momentum, m)] + ([(square, v)] if o.graft else [])
    for parts, new in moved:
        _write(parts, torch.where(good, new, _flat(parts, lower)))
    return (~good).sum()


def _directions(
    kernels: Any,
    lower: SymmetricBlocks,  # R factors
    d: Tensor,  # [S, R, n]
    unit_scale: bool,  # only the direction counts: scale P so that no length leaves the range of the dtype
) -> Tensor:
    """P = (L L^T)^-1 D for every mini-block, [S, R, n]."""
    if lower.size > MAX_INVERTED_SIZE:
        p = kernels.solve(lower, d.permute(1, 2, 0)).permute(2, 0, 1)
        return p / p.abs().amax(2, keepdim=True).clamp_min(1e-30) if unit_scale else p
    # R small inverses, in double so that they cost no accuracy; then one matrix product serves all S.
    identity = torch.eye(lower.size, dtype=torch.float64, device=d.device).expand(lower.count, -1, -1)
    inverse = kernels.solve(lower.to(dtype=torch.float64), identity).to(d.dtype)
    if unit_scale:
        inverse = inverse / inverse.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    return torch.bmm(d.transpose(0, 1), inverse).transpose(0, 1)


def _write(parts: Parts, new: Tensor) -> None:
    elements = new.shape[2] - len(parts) + 1
    parts[0].copy_(new[..., :elements].reshape(parts[0].shape))
    if len(parts) == 2:
        parts[1].copy_(new[..., -1].reshape(parts[1].shape))
