"""Spaces of symmetric matrices X = sum_n sum_{t,t'} w[n, t, t'] x_t x_t'^T of given rows x, [groups, m, T, n].

A vector is a tensor [groups, ., .] with the matrix's length and angles: the sum of its elements' products is tr X Y.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .kronecker import symmetric_product

CHUNK = 2**24  # weights that are held at once


class Space(ABC):
    def __init__(self, generator: torch.Generator):
        """``generator``: on the CPU, of what is random."""
        self._generator = generator

    def _random_like(self, tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=self._generator, dtype=tensor.dtype).to(tensor.device)

    @abstractmethod
    def forms(self, vector: Tensor) -> Iterator[Tensor]:
        """x_t^T X x_t' of every sample, [groups, m, T, T]: some samples at a time."""

    @abstractmethod
    def combination(self, weights: Iterable[Tensor]) -> Tensor:
        """The vector of such weights, symmetric in t and t'."""

    @abstractmethod
    def total(self) -> Tensor:
        """The vector of sum_n sum_t x_t x_t^T."""

    @abstractmethod
    def random(self) -> Tensor:
        """A vector of a positive semidefinite matrix."""

    @abstractmethod
    def vector(self, matrix: Tensor) -> Tensor:
        """With the forms of a symmetric matrix [groups, n, n]."""

    @abstractmethod
    def matrix(self, vector: Tensor) -> Tensor:
        """[groups, n, n]."""


class Matrices(Space):
    """A vector is its matrix."""

    def __init__(self, rows: Tensor, generator: torch.Generator):
        super().__init__(generator)
        groups, _, locations, _ = rows.shape
        self._rows = rows
        self._parts = rows.split(max(1, CHUNK // (groups * locations**2)), 1)

    def forms(self, vector: Tensor) -> Iterator[Tensor]:
        for part in self._parts:
            yield (part.flatten(1, 2) @ vector).view_as(part) @ part.mT

    def combination(self, weights: Iterable[Tensor]) -> Tensor:
        return sum(_combination(part, rows) for part, rows in zip(weights, self._parts, strict=True))

    def total(self) -> Tensor:
        columns = self._rows.flatten(1, 2).mT
        return symmetric_product(columns, columns)

    def random(self) -> Tensor:
        root = self._random_like(self._rows[:, 0, :1])
        return root.mT @ root

    def vector(self, matrix: Tensor) -> Tensor:
        return matrix

    def matrix(self, vector: Tensor) -> Tensor:
        return vector


class Samples(Space):
    """A vector is L^T w, [groups, m, 1], with L L^T = K and K[n, n'] = (x_n^T x_n')^2 = tr x_n x_n^T x_n' x_n'^T: the
    inner products of what is combined. For one location.

    Rows are divided by the longest: K is at most 1, and 0 where all are zero. It may be singular; what is decomposed is
    K + e I, as if every sample had a small matrix of its own beside, with the e that rounding asks for. In float64, as
    that matrix has the length sqrt(e).
    """

    def __init__(self, rows: Tensor, generator: torch.Generator):
        super().__init__(generator)
        wide = rows[:, :, 0].double()
        longest = wide.norm(dim=2).amax(1)[:, None, None].clamp_min(torch.finfo(rows.dtype).tiny)
        wide = wide / longest
        self._square, self._rows = longest.square().to(rows.dtype), wide[:, :, None].to(rows.dtype)
        m, n = wide.shape[1:]
        gram = symmetric_product(wide, wide).square_()
        gram.diagonal(dim1=1, dim2=2).add_(m * (m + 2 * n) * torch.finfo(gram.dtype).eps)
        self._root = torch.linalg.cholesky_ex(gram).L.to(rows.dtype)

    def forms(self, vector: Tensor) -> Iterator[Tensor]:
        yield (self._root @ vector * self._square)[..., None]

    def combination(self, weights: Iterable[Tensor]) -> Tensor:
        (part,) = weights
        return self._root.mT @ part[..., 0] * self._square

    def total(self) -> Tensor:
        return self.combination([torch.ones_like(self._rows[..., :1])])

    def random(self) -> Tensor:
        return self.combination([self._random_like(self._rows[..., :1])])

    def vector(self, matrix: Tensor) -> Tensor:
        rows = self._rows[:, :, 0]
        return torch.linalg.solve_triangular(self._root, (rows @ matrix * rows).sum(2, keepdim=True), upper=False)

    def matrix(self, vector: Tensor) -> Tensor:
        weights = torch.linalg.solve_triangular(self._root.mT, vector, upper=True)
        return _combination(weights[..., None], self._rows)


def _combination(weights: Tensor, rows: Tensor) -> Tensor:
    return symmetric_product((weights @ rows).flatten(1, 2).mT, rows.flatten(1, 2).mT)
