"""Weights of low precision: how a step in float32 reaches them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stochastically_rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each float32 value to one of its two neighbours in ``dtype``, to the nearer one more often: right on average.

    A value between the numbers a < b of the dtype becomes b with probability (x - a) / (b - a). What is not finite, or
    beyond the range, is rounded as usual.
    """
    info = torch.finfo(dtype)
    digits = 1 - int(math.log2(info.eps))  # of a significand, the first one included
    _, exponent = torch.frexp(values)
    least = int(math.log2(info.smallest_normal)) + 1
    unit = torch.ldexp(torch.ones_like(values), exponent.clamp_min(least) - digits)  # from one number to the next
    steps = 2 ** (24 - digits)  # of noise, so that the sum is exact in float32
    noise = torch.randint(steps, values.shape, generator=generator, dtype=values.dtype, device=values.device)
    rounded = (values / unit).add_(noise.div_(steps)).floor_().mul_(unit)
    inside = values.isfinite() & (values.abs() < info.max)
    return torch.where(inside, rounded, values).to(dtype)
