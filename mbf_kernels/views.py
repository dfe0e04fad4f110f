"""Tensors as blocks of n elements where they lie, by at most two levels of strides per block and per element.

A view reads and writes a tensor in place, or through a copy, ``staged``, where its strides forbid it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .checks import matrix_dimension, split_at


class Staged:
    """A tensor, and what stands for it: itself where ``strides_of`` it are not None, else a copy that has them."""

    def __init__(
        self,
        tensor: Tensor,
        strides_of: Callable[[Tensor], tuple[int, ...] | None],
        copy: Callable[[Tensor], Tensor] = Tensor.contiguous,
        read_only: bool = False,
    ):
        self.tensor, self._read_only = tensor, read_only
        strides = strides_of(tensor)
        self.staged = tensor if strides else copy(tensor)
        self.strides = strides or strides_of(self.staged)

    @property
    def in_place(self) -> bool:
        return self.staged is self.tensor

    def write_back(self) -> None:
        if not (self.in_place or self._read_only):
            self.tensor.copy_(self.staged)


class View(Staged):
    """A tensor as blocks of n elements, for the kernels."""

    def __init__(self, tensor: Tensor, n: int, read_only: bool = False):
        super().__init__(tensor, lambda t: block_strides(tuple(t.shape), t.stride(), n), read_only=read_only)
        self.native = (self.staged.data_ptr(), *self.strides)


class SharedView:
    """The mini-blocks of R matrices, [*samples, R, *elements of product n]; or of one matrix, n - 1 elements and a
    tensor of the last ones, [*samples]."""

    def __init__(self, parts: Sequence[Tensor], count: int, n: int, read_only: bool = False):
        elements = n - len(parts) + 1
        main = Staged(
            parts[0], lambda t: shared_strides(tuple(t.shape), t.stride(), count, elements), read_only=read_only
        )
        self.parts = [main]
        last = None
        if len(parts) == 2:
            last_one = Staged(parts[1], lambda t: _one_stride(tuple(t.shape), t.stride()), read_only=read_only)
            self.parts.append(last_one)
            last = (self.parts[1].staged.data_ptr(), *self.parts[1].strides)
        self.native = ((main.staged.data_ptr(), *main.strides), last)
        self.samples = parts[0].numel() // max(count * elements, 1)

    @property
    def in_place(self) -> bool:
        return all(part.in_place for part in self.parts)

    def write_back(self) -> None:
        for part in self.parts:
            part.write_back()


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


@lru_cache(maxsize=4096)
def shared_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], count: int, n: int
) -> tuple[int, int, int, int, int, int, int] | None:
    """The stride of matrices, and (inner count, outer stride, inner stride) of samples and of elements; None where
    either needs more than two levels."""
    at = matrix_dimension(shape, n, count)
    levels = _levels(shape[:at], strides[:at]), _levels(shape[at + 1 :], strides[at + 1 :])
    return (strides[at], *levels[0], *levels[1]) if None not in levels else None


def _one_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int] | None:
    levels = _levels(shape, strides)
    return (levels[2],) if levels and levels[1] == 0 else None


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


class FlatView(Staged):
    """A tensor as elements without gaps, in the order of ``strides`` without gaps."""

    def __init__(self, tensor: Tensor, strides: tuple[int, ...], read_only: bool = False):
        self.tensor, self.staged, self._read_only = tensor, tensor, read_only
        if tensor.stride() != strides and _steps(tensor.shape, tensor.stride()) != _steps(tensor.shape, strides):
            like = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
            self.staged = like.copy_(tensor)


@lru_cache(maxsize=4096)
def flat_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides themselves, or the usual ones where they leave gaps."""
    steps = _steps(shape, strides)
    dense = math.prod(size for size, _ in steps) == 1 + sum((size - 1) * stride for size, stride in steps)
    return strides if dense else _usual(shape)


class RankOneView:
    """The three tensors of a step and the s [m] and h [n] of its curvature, for the kernels: rows of ``columns``
    elements without gaps, those of a row in the ``order`` (inner count, outer stride, inner stride) of entries of h."""

    def __init__(self, param: Tensor, grad: Tensor, momentum: Tensor, row: Tensor | None, column: Tensor | None):
        if column is None:
            self.columns, self.order = param.numel(), (1, 0, 1)
            strides = flat_strides(param.shape, param.stride())
        else:
            if column.numel() == 1:  # one row has more to share than many of one element
                row, column = column, row
            # the dispatcher resolves a lazy minus of tensors, but not of those in a list of optional ones
            row, column = (vector.resolve_neg().contiguous() for vector in (row, column))
            self.columns = column.numel()
            strides, self.order = row_layout(param.shape, param.stride(), self.columns)
        self.row, self.column = row, column
        self.param, self.momentum = FlatView(param, strides), FlatView(momentum, strides)
        self.grad = FlatView(grad, strides, read_only=True)

    def write_back(self) -> None:
        self.momentum.write_back()
        self.param.write_back()


@lru_cache(maxsize=4096)
def row_layout(
    shape: tuple[int, ...], strides: tuple[int, ...], columns: int
) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Strides of rows without gaps, those given or else the usual ones, and the order of the elements of a row."""
    usual, split = _usual(shape), split_at(shape, columns)
    in_memory = sorted((i for i, size in enumerate(shape) if size != 1), key=lambda i: -strides[i])
    leading, trailing = [[i for i in in_memory if (i < split) == is_leading] for is_leading in (True, False)]
    order = _levels(tuple(shape[i] for i in trailing), tuple(usual[i] for i in trailing))
    if in_memory == sorted(leading) + trailing and order and flat_strides(shape, strides) == strides:
        return strides, order
    return usual, (columns, 0, 1)


def _usual(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """The dimensions that count, (size, stride)."""
    return [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
