"""The step of tensors without blocks in torch's ``_foreach`` functions: any device, a few launches for all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .options import StepOptions
from .rowwise import wide


def mbf_diagonal_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    squares: Sequence[Tensor],
    momentum_weights: Sequence[float] | Sequence[Tensor],
    square_weights: Sequence[float] | Sequence[Tensor],
    options: StepOptions,
) -> None:
    alike: dict[tuple, list[int]] = {}
    for i, weights in enumerate(zip(momentum_weights, square_weights, strict=True)):
        alike.setdefault(tuple(id(w) if isinstance(w, Tensor) else w for w in weights), []).append(i)
    for indices in alike.values():
        lists = [[items[i] for i in indices] for items in (params, grads, momenta, squares)]
        _step(*lists, momentum_weights[indices[0]], square_weights[indices[0]], options)


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    squares: list[Tensor],
    momentum_weight: float | Tensor,
    square_weight: float | Tensor,
    o: StepOptions,
) -> None:
    dtype, lr = params[0].dtype, wide(o.lr)
    momentum_weight, square_weight = wide(momentum_weight), wide(square_weight)
    torch._foreach_mul_(momenta, o.momentum)
    torch._foreach_add_(momenta, grads, alpha=-1 if o.maximize else 1)
    means = torch._foreach_mul(momenta, _as(dtype, (1 - o.momentum) / (momentum_weight if o.graft else 1)))
    squared = grads if o.graft else means
    torch._foreach_mul_(squares, o.diagonal_decay)
    torch._foreach_addcmul_(squares, squared, squared, value=1 - o.diagonal_decay)
    lengths = torch._foreach_mul(squares, _as(dtype, 1 / square_weight))
    torch._foreach_sqrt_(lengths)
    torch._foreach_add_(lengths, o.eps)
    if o.weight_decay:
        torch._foreach_mul_(params, _as(dtype, 1 - lr * o.weight_decay))
    if isinstance(lr, Tensor):  # addcdiv takes no tensor
        torch._foreach_mul_(means, _as(dtype, lr))
        lr = 1.0
    torch._foreach_addcdiv_(params, means, lengths, value=-lr)


def _as(dtype: torch.dtype, value: float | Tensor) -> float | Tensor:
    """A number on the device in the dtype of the tensors, which one launch for all of them wants."""
    return value.to(dtype) if isinstance(value, Tensor) else value
