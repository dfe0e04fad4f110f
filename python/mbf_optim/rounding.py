"""Weights of low precision: how a step in float32 reaches them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PART, _PART_OF_CPU = 2**24, 2**18  # numbers that are rounded at once: memory, and a CPU's cache, want no more
_EXPONENT = 0x7F800000  # the bits of a float32 that are its exponent; alone they are the power of two below the number


def round_stochastically_(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Each float32 value, in place, to one of its two neighbours in ``dtype``, to the nearer one more often: right on
    average.

    A value between the numbers a < b of the dtype becomes b with probability (x - a) / (b - a). Below 2^-119 numbers of
    bfloat16 that are no multiples of 2^-126 are passed over, since processors may take them for 0. What is beyond the
    range, or not finite, stays so.
    """
    for part in values.view(-1).split(_PART_OF_CPU if values.is_cpu else _PART):
        _round_part_(part, dtype, generator)


def _round_part_(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> None:
    info = torch.finfo(dtype)
    digits = 1 - int(math.log2(info.eps))  # of a significand, the first one included
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    powers = values.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    unit = powers.mul_(info.eps).clamp_(least, info.max * info.eps)  # from one number to the next
    rounded = _uniform(values, 24 - digits, generator)  # no more digits: their sum is exact
    rounded.addcdiv_(values, unit).floor_().mul_(unit)
    torch.minimum(rounded, values.clamp(min=info.max), out=rounded)
    torch.maximum(rounded, values.clamp(max=-info.max), out=values)


def _uniform(like: Tensor, digits: int, generator: torch.Generator) -> Tensor:
    """Numbers of so many binary digits, at most 16, in [0, 1); four from every 64 random bits."""
    fours = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = fours.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    return bits.bitwise_right_shift_(16 - digits).view(like.shape).float().mul_(2.0**-digits).add_(0.5)
