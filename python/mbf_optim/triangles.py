"""Symmetric matrices as half as many numbers, whatever their size."""

from __future__ import annotations

from torch import Tensor


def packed(matrix: Tensor) -> Tensor:
    """The n (n + 1) / 2 numbers of each [groups, n, n] as a rectangle, LAPACK's full packed format: of the triangle the
    lower left, and above it the rest, transposed."""
    n = matrix.shape[1]
    width, even = n - n // 2, 1 - n % 2
    rectangle = matrix.new_zeros(len(matrix), n + even, width)
    rectangle[:, even:] = matrix[:, :, :width].tril()
    rectangle[:, : n // 2, 1 - even :] += matrix[:, width:, width:].triu()
    return rectangle


def unpacked(rectangle: Tensor) -> Tensor:
    """[groups, n, n] again."""
    groups, rows, width = rectangle.shape
    even = int(rows > 2 * width)
    n = rows - even
    lower = rectangle.new_zeros(groups, n, n)
    lower[:, :, :width] = rectangle[:, even:].tril()
    lower[:, width:, width:] = rectangle[:, : n // 2, 1 - even :].triu().mT
    return lower + lower.tril(-1).mT
