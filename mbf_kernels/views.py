"""Tensors as blocks of n elements where they lie, by at most two levels of strides per block and per element."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor


class View:
    """A tensor as blocks of n elements, for the kernels: in place, or through a copy where strides forbid it."""

    def __init__(self, tensor: Tensor, n: int):
        self.tensor = tensor
        strides = block_strides(tuple(tensor.shape), tensor.stride(), n)
        self.staged = tensor if strides else tensor.contiguous()
        strides = strides or block_strides(tuple(tensor.shape), self.staged.stride(), n)
        self.native = (self.staged.data_ptr(), *strides)

    def write_back(self) -> None:
        if self.staged is not self.tensor:
            self.tensor.copy_(self.staged)


@lru_cache(maxsize=4096)
def block_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], n: int
) -> tuple[int, int, int, int, int, int] | None:
    """(inner count, outer stride, inner stride) of the blocks and of their elements, where the trailing
    dimensions multiply to n; None where either needs more than two levels."""
    split, elements = len(shape), 1
    while elements < n:
        split -= 1
        elements *= shape[split]
    levels = _levels(shape[:split], strides[:split]), _levels(shape[split:], strides[split:])
    return levels[0] + levels[1] if None not in levels else None


def _levels(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (_, outer), (count, inner) = [(1, 0)] * (2 - len(merged)) + merged
    return count, outer, inner
