"""The step of tensors without blocks: Adam in the grafted form, the paper's in the paper form.

Both keep the heavy-ball momentum M <- mu M + g, so that Adam's first moment is (1 - mu) M.
"""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],  # M
    second_moments: list[Tensor],  # v
    *,
    lr: float | Tensor,  # alpha
    momentum: float,  # mu
    momentum_weight: float | Tensor,  # 1 - mu^t
    decay: float,  # beta_2
    square_weight: float | Tensor,  # 1 - beta_2^t
    weight_decay: float,  # gamma
    eps: float,
    adam: bool,
) -> None:
    """W <- (1 - alpha gamma) W - alpha E / (sqrt(v / (1 - beta_2^t)) + eps), with M <- mu M + g and

    - adam: v <- beta_2 v + (1 - beta_2) g^2, E = (1 - mu) M / (1 - mu^t): ``torch.optim.AdamW``;
    - else: v <- beta_2 v + (1 - beta_2) E^2, E = (1 - mu) M: the authors' code, which corrects the bias of the second
      moment only and squares the averaged gradient.

    The tensors share device, dtype and t; alpha and the weights may be numbers on the device.
    """
    dtype = params[0].dtype
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    means = torch._foreach_mul(momenta, _as(dtype, (1 - momentum) / (momentum_weight if adam else 1)))
    squared = grads if adam else means
    torch._foreach_mul_(second_moments, decay)
    torch._foreach_addcmul_(second_moments, squared, squared, value=1 - decay)
    lengths = torch._foreach_mul(second_moments, _as(dtype, 1 / square_weight))
    torch._foreach_sqrt_(lengths)
    torch._foreach_add_(lengths, eps)
    if weight_decay:
        torch._foreach_mul_(params, _as(dtype, 1 - lr * weight_decay))
    if isinstance(lr, Tensor):  # addcdiv takes no tensor
        torch._foreach_mul_(means, _as(dtype, lr))
        lr = 1.0
    torch._foreach_addcdiv_(params, means, lengths, value=-lr)


def _as(dtype: torch.dtype, value: float | Tensor) -> float | Tensor:
    """A number on the device in the dtype of the tensors, which one launch for all of them wants."""
    return value.to(dtype) if isinstance(value, Tensor) else value
