"""The step of mini-blocks that share averaged matrices.

R matrices F_r, each the average over the S mini-blocks that share it. The matrices of all layers are damped and
factored in one launch per block size; every mini-block then takes its own direction and, grafted, its own length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks, accumulate_, factor, solve

from .schedule import FRESH_SIZE, weights
from .tasks import Task


def shared_step_(tasks: list[Task], group: dict) -> None:
    for task in tasks:
        if task.update:
            accumulate_(task.fisher, task.flat("grad"), decay=group["decay"])
    factors = _factor_due(tasks, group["damping"], group["relative_damping"])
    for task, lower in zip(tasks, factors, strict=True):
        _move(task, lower, group)


def _factor_due(tasks: list[Task], damping: float | Tensor, relative: bool) -> list[SymmetricBlocks]:
    """L with L L^T = F + lambda I for every task: fresh where it is due, else cached. Zero where there is none."""
    factors = {id(task): task.factor for task in tasks if not task.refactor}
    by_size: dict[tuple, list[Task]] = {}
    for task in tasks:
        if task.refactor:
            by_size.setdefault((task.fisher.size, task.fisher.device, task.fisher.dtype), []).append(task)
    for due in by_size.values():
        fishers = SymmetricBlocks.cat([task.fisher for task in due])
        if relative:
            fishers = _with_unit_scale(fishers)
        lower, info = factor(fishers, damping=damping, relative=relative)
        counts = [task.fisher.count for task in due]
        for task, new, bad in zip(due, lower.split(counts), (info != 0).split(counts), strict=True):
            if task.cached:
                new = task.factor = _keep_bad(task.factor, new.clone(), bad)
            factors[id(task)] = new
    return [factors[id(task)] for task in tasks]


def _move(task: Task, lower: SymmetricBlocks, group: dict) -> None:
    """M <- mu M + g;  D = mu M + g (Nesterov) or M;  P = (F + lambda I)^-1 D;  W <- (1 - alpha gamma) W - alpha P.

    Grafted: alpha (|u| / |P|) P instead, |.| over one mini-block, u = mhat / (sqrt(vhat) + eps) with
    v <- beta_2 v + (1 - beta_2) g^2: the diagonal of a shared matrix is not an element's second moment.
    A mini-block whose g or P is not finite, or whose matrix has no factor, keeps its weights, momentum and v.
    """
    lr, mu = group["lr"], group["momentum"]
    g = task.flat("grad")
    m = torch.add(g, task.flat("momentum"), alpha=mu)
    d = torch.add(g, m, alpha=mu) if group["nesterov"] else m
    p = _directions(lower, d, unit_scale=bool(group["graft"]))
    moved = {"momentum": m}
    if group["graft"]:
        moved["second_moment"], u_length = _adam(task, g, d, group)
        p_length = torch.linalg.vector_norm(p, dim=2, keepdim=True)
        finite = (u_length + p_length).isfinite()
        rate = lr * torch.where(p_length > 0, u_length / p_length, 0)
    else:
        finite = p.sum(2, keepdim=True).isfinite()
        rate = lr * p.new_ones(1)
    moved["weight"] = torch.addcmul((1 - lr * group["weight_decay"]) * task.flat("weight"), rate, p, value=-1)

    good = finite & (lower.diagonal() > 0).all(1, keepdim=True)  # [S, R, 1]
    for name, new in moved.items():
        _write(task, name, new, good)
    task.state["skipped"] += (~good).sum()


def _directions(
    lower: SymmetricBlocks,  # R factors
    d: Tensor,  # [S, R, n]
    unit_scale: bool,  # only the direction counts: scale P so that no length leaves the range of the dtype
) -> Tensor:
    """P = (L L^T)^-1 D for every mini-block, [S, R, n]."""
    if lower.size > FRESH_SIZE:
        p = solve(lower, d.permute(1, 2, 0)).permute(2, 0, 1)
        return p / p.abs().amax((0, 2), keepdim=True).clamp_min(1e-30) if unit_scale else p
    # R small inverses, in double so that they cost no accuracy; then one matrix product serves all S.
    identity = torch.eye(lower.size, dtype=torch.float64, device=d.device)
    inverse = solve(lower.to(dtype=torch.float64), identity.expand(lower.count, -1, -1)).to(d.dtype)
    if unit_scale:
        inverse = inverse / inverse.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    return torch.bmm(d.transpose(0, 1), inverse).transpose(0, 1)


def _adam(task: Task, g: Tensor, d: Tensor, group: dict) -> tuple[Tensor, Tensor]:
    """v <- beta_2 v + (1 - beta_2) g^2, and |u| of every mini-block [S, R, 1] for u = mhat / (sqrt(vhat) + eps)."""
    mu, beta = group["momentum"], group["diagonal_decay"]
    momentum_weight, square_weight, _ = weights(task.state, group)
    v = torch.addcmul(beta * task.flat("second_moment"), g, g, value=1 - beta)
    u = (v / square_weight).sqrt_().add_(group["eps"])
    torch.div(d, u, out=u)
    return v, (1 - mu) / momentum_weight * torch.linalg.vector_norm(u, dim=2, keepdim=True)


def _write(task: Task, name: str, new: Tensor, good: Tensor) -> None:
    """Writes the good mini-blocks. On a CPU, where it costs no wait, the common case needs no selection."""
    view = task.view(name)
    if not (good.device.type == "cpu" and bool(good.all())):
        new = torch.where(good, new, task.flat(name))
    view.copy_(new.reshape(view.shape))


def _with_unit_scale(fishers: SymmetricBlocks) -> SymmetricBlocks:
    """Zero blocks (inputs that were never active) replaced by I: they have no scale for damping to be relative to."""
    zero = fishers.diagonal().sum(1) == 0
    packed = fishers.to_packed()
    i = torch.arange(fishers.size, device=fishers.device)
    identity = torch.zeros_like(packed[0]).index_fill_(0, i * (i + 3) // 2, 1)
    return SymmetricBlocks.from_packed(torch.where(zero[:, None], identity, packed))


def _keep_bad(cached: SymmetricBlocks | None, new: SymmetricBlocks, bad: Tensor) -> SymmetricBlocks:
    """The new factors; a bad one gives way to the cached one."""
    if cached is None:
        return new
    return SymmetricBlocks.from_packed(torch.where(bad[:, None], cached.to_packed(), new.to_packed()))
