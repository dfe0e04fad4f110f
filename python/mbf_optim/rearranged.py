"""A layer's rearranged Fisher matrix, which is never formed (after Van Loan & Pitsianis 1993).

A layer's F = (1/m) sum_n vec(dW_n) vec(dW_n)^T, with dW_n = sum_t g_t a_t^T, is [pq, pq]. Its rearrangement Z has
Z(R (x) S) = vec(R) vec(S)^T, so that the best sum of r Kronecker products is a truncated SVD of Z::

    Z V   = (1/m) sum_n sum_{t,t'} (g_t^T V g_t') a_t a_t'^T       for V [q, q]
    Z^T U = (1/m) sum_n sum_{t,t'} (a_t^T U a_t') g_t g_t'^T       for U [p, p]

U and V are symmetric: where samples have several locations Z has antisymmetric pairs too, which are left out, as their
sum with others has no cheap inverse.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .affine import Rows
from .symmetric import Matrices, Samples, Space


class Pair(NamedTuple):
    """R (x) S, with the singular value shared equally: |R| = |S| = sqrt(sigma)."""

    left: Tensor  # R, as a vector or [groups, p, p]
    right: Tensor  # S, as a vector or [groups, q, q]


class Rearranged:
    """Z, less some pairs, on vectors of the spaces ``left`` and ``right``, [groups, ., .]. So are its pairs.

    Args:
        rows: of the layer.
        iterations: that are expected, each a product with Z and one with Z^T.
        seed: of random vectors, which draw from no generator of torch's own.
    """

    def __init__(self, rows: Rows, iterations: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.left, self.right = (_space(part, iterations, generator) for part in rows[:2])
        self._samples, self._locations = len(rows.inputs), rows.locations
        self._deflated: tuple[Pair, ...] = ()

    def less(self, pair: Pair) -> Rearranged:
        """Z - vec(R) vec(S)^T."""
        rest = copy.copy(self)
        rest._deflated = (*self._deflated, pair)
        return rest

    def times(self, v: Tensor) -> Tensor:
        """Z V."""
        product = self.left.combination(part / self._samples for part in self.right.forms(v))
        for pair in self._deflated:
            product = product - dot(pair.right, v) * pair.left
        return product

    def transposed_times(self, u: Tensor) -> Tensor:
        """Z^T U."""
        product = self.right.combination(part / self._samples for part in self.left.forms(u))
        for pair in self._deflated:
            product = product - dot(pair.left, u) * pair.right
        return product

    def means(self) -> Pair:
        """K-FAC's A and G."""
        return Pair(self.left.total() / self._samples, self.right.total() / (self._samples * self._locations))

    def matrices(self, pair: Pair) -> Pair:
        """Of the vectors."""
        return Pair(self.left.matrix(pair.left), self.right.matrix(pair.right))


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((1, 2), keepdim=True)


def norm(x: Tensor) -> Tensor:
    """In float32 torch's own may be off by 1e-4 for large matrices, as its sum is not pairwise."""
    return dot(x, x).sqrt()


def unit(x: Tensor) -> Tensor:
    """Of length 1, or zero."""
    length = norm(x)
    return torch.where(length == 0, 0.0, x / length)


def _space(rows: Tensor, iterations: int, generator: torch.Generator) -> Space:
    """By the fewer operations: an iteration on matrices takes 4 m n^2; on samples m^2, once their products and the
    decomposition, 2 m^2 n + m^3 / 3, in float64 that count twice, are there."""
    m, locations, _, n = rows.shape
    few = locations == 1 and m * (n + m / 6) <= iterations * n**2
    return (Samples if few else Matrices)(rows.permute(2, 0, 1, 3).contiguous(), generator)
