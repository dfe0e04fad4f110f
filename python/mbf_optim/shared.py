"""The step of mini-blocks that share averaged matrices.

R matrices F_r, each the average over the S mini-blocks that share it. The matrices of all layers are damped and
factored in one launch per block size; every mini-block then takes its own direction and, grafted, its own length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks, accumulate_, factor, solve

from .tasks import Task


def shared_step_(tasks: list[Task], group: dict) -> None:
    for task in tasks:
        if task.update:
            accumulate_(task.fisher, task.flat("grad"), decay=group["decay"])
    factors = _factor_due(tasks, group["damping"], group["relative_damping"])
    for task, lower in zip(tasks, factors, strict=True):
        _move(task, lower, group)


def _factor_due(tasks: list[Task], damping: float, relative: bool) -> list[SymmetricBlocks]:
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
    lr, mu = float(group["lr"]), group["momentum"]
    g = task.flat("grad")
    m = mu * task.flat("momentum") + g
    d = mu * m + g if group["nesterov"] else m
    p = solve(lower, d.permute(1, 2, 0)).permute(2, 0, 1)
    good = g.isfinite().all(2) & p.isfinite().all(2) & (lower.diagonal() > 0).all(1)
    moved = {"momentum": m}
    rate = lr
    if group["graft"]:
        v, u = _adam(task, g, d, group)
        rate = lr * _length_ratio(u, p)
        moved["second_moment"] = v
    moved["weight"] = (1 - lr * group["weight_decay"]) * task.flat("weight") - rate * p
    for name, new in moved.items():
        view = task.view(name)
        view.copy_(torch.where(good[..., None], new, task.flat(name)).reshape(view.shape))
    task.state["skipped"] += (~good).sum()


def _adam(task: Task, g: Tensor, d: Tensor, group: dict) -> tuple[Tensor, Tensor]:
    """v <- beta_2 v + (1 - beta_2) g^2, and the step u = mhat / (sqrt(vhat) + eps)."""
    t, mu, beta = task.state["step"], group["momentum"], group["diagonal_decay"]
    v = beta * task.flat("second_moment") + (1 - beta) * g.square()
    mean = (1 - mu) / (1 - mu**t) * d
    return v, mean / ((v / (1 - beta**t)).sqrt() + group["eps"])


def _length_ratio(
    u: Tensor,  # [S, R, n]
    p: Tensor,  # [S, R, n]
) -> Tensor:
    """|u| / |p| of every mini-block, [S, R, 1]; 0 where p = 0. |p| is formed relative to its largest entry, whose
    square may leave the range of the dtype."""
    peak = p.abs().amax(2, keepdim=True)
    unit = 1 / peak.clamp_min(1e-30)
    length = torch.linalg.vector_norm(unit * p, dim=2, keepdim=True)
    return torch.where(peak > 0, unit * torch.linalg.vector_norm(u, dim=2, keepdim=True) / length, 0)


def _with_unit_scale(fishers: SymmetricBlocks) -> SymmetricBlocks:
    """Zero blocks (inputs that were never active) replaced by I: they have no scale for damping to be relative to."""
    zero = fishers.diagonal().sum(1) == 0
    identity = torch.eye(fishers.size, dtype=fishers.dtype, device=fishers.device)
    ones = SymmetricBlocks.from_dense(identity[None]).to_packed()
    return SymmetricBlocks.from_packed(torch.where(zero[:, None], ones, fishers.to_packed()))


def _keep_bad(cached: SymmetricBlocks | None, new: SymmetricBlocks, bad: Tensor) -> SymmetricBlocks:
    """The new factors; a bad one gives way to the cached one."""
    if cached is None:
        return new
    return SymmetricBlocks.from_packed(torch.where(bad[:, None], cached.to_packed(), new.to_packed()))
