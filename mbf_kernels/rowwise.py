"""What every block of a batch tells of itself, and the numbers that all share."""

from __future__ import annotations

import torch
from torch import Tensor


def length_ratio(u: Tensor, p: Tensor) -> Tensor:
    """|u| / |p| over the last dimension, which stays as 1; 0 where p = 0. |p| is formed relative to its largest entry,
    whose square may leave the range of the dtype."""
    peak = p.abs().amax(-1, keepdim=True)
    unit = 1 / peak.clamp_min(1e-30)
    ratio = unit * torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    ratio = ratio / torch.linalg.vector_norm(unit * p, dim=-1, keepdim=True)
    return torch.where(peak > 0, ratio, 0)


def first_bad(good: Tensor) -> Tensor:
    """1 + the index of the first False of each row, 0 where there is none."""
    bad = (~good).to(torch.int32)
    return torch.where(bad.any(1), bad.argmax(1) + 1, 0).to(torch.int32)


def flag_nonfinite(info: Tensor, vector: Tensor) -> Tensor:
    return torch.where(info != 0, info, first_bad(vector.isfinite()))


def wide(number: float | Tensor) -> float | Tensor:
    """Arithmetic among the numbers of a step is in double, on the device as in Python."""
    return number.double() if isinstance(number, Tensor) else number
