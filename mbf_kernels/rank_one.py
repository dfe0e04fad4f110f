"""The step of tensors whose curvature has rank one, in plain torch: the specification, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .options import StepOptions
from .rowwise import wide


def rank_one_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    momentum_weights: Sequence[float] | Sequence[Tensor],
    options: StepOptions,
) -> None:
    for arguments in zip(params, grads, momenta, rows, columns, momentum_weights, strict=True):
        _step(*arguments, options)


def _step(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    s: Tensor | None,
    h: Tensor | None,
    momentum_weight: float | Tensor,
    o: StepOptions,
) -> None:
    lr = wide(o.lr)
    f = o.damping if s is None else torch.outer(s, h).view(w.shape) + o.damping
    if not o.decoupled:
        g = g + o.weight_decay * w
    m.mul_(o.momentum).add_(g, alpha=1 - o.momentum)
    if o.decoupled:
        w.mul_(1 - lr * o.weight_decay)
    w.sub_(lr / wide(momentum_weight) * (m / f))
