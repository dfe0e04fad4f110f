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
    steps: list[int],  # t, from 1
    *,
    lr: float,  # alpha
    momentum: float,  # mu
    decay: float,  # beta_2
    weight_decay: float,  # gamma
    eps: float,
    adam: bool,
) -> None:
    """W <- (1 - alpha gamma) W - alpha E / (sqrt(v / (1 - beta_2^t)) + eps), with M <- mu M + g and

    - adam: v <- beta_2 v + (1 - beta_2) g^2, E = (1 - mu) M / (1 - mu^t): ``torch.optim.AdamW``;
    - else: v <- beta_2 v + (1 - beta_2) E^2, E = (1 - mu) M: the authors' code, which corrects the bias of the second
      moment only and squares the averaged gradient.
    """
    if not params:
        return
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    means = torch._foreach_mul(momenta, [(1 - momentum) / (1 - momentum**t if adam else 1) for t in steps])
    squared = grads if adam else means
    torch._foreach_mul_(second_moments, decay)
    torch._foreach_addcmul_(second_moments, squared, squared, value=1 - decay)
    lengths = torch._foreach_mul(second_moments, [1 / (1 - decay**t) for t in steps])
    torch._foreach_sqrt_(lengths)
    torch._foreach_add_(lengths, eps)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, means, lengths, value=-lr)
