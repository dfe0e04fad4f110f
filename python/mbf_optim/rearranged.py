"""The singular pairs of a rearranged Fisher matrix, which is never formed (after Van Loan & Pitsianis 1993).

A layer's F = (1/m) sum_n vec(dW_n) vec(dW_n)^T, with dW_n = sum_t g_t a_t^T, is [pq, pq]. Its rearrangement Z has
Z(R (x) S) = vec(R) vec(S)^T, so that the best sum of r Kronecker products is a truncated SVD of Z. A vector on the left
of Z is a matrix [p, p] here, one on the right [q, q], batched over groups. All are symmetric: where samples have
several locations Z has antisymmetric pairs too, which are left out, as their sum with others has no cheap inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .affine import Rows

CHUNK = 2**24  # products of locations that are held at once


class Pair(NamedTuple):
    """R (x) S, with the singular value shared equally: |R| = |S| = sqrt(sigma)."""

    left: Tensor  # R, [groups, p, p]
    right: Tensor  # S, [groups, q, q]


class Rearranged:
    """Z, less the ``deflated`` pairs."""

    def __init__(self, rows: Rows, deflated: Sequence[Pair] = ()):
        self._samples = len(rows.inputs)
        self._inputs, self._gradients = (t.permute(2, 0, 1, 3) for t in (rows.inputs, rows.gradients))
        self._deflated = tuple(deflated)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """groups, p, q."""
        return len(self._inputs), self._inputs.shape[3], self._gradients.shape[3]

    def times(self, right: Tensor) -> Tensor:
        """Z v."""
        product = self._mean_of(right, self._gradients, self._inputs)
        return product - sum(dot(pair.right, right) * pair.left for pair in self._deflated)

    def transposed_times(self, left: Tensor) -> Tensor:
        """Z^T u."""
        product = self._mean_of(left, self._inputs, self._gradients)
        return product - sum(dot(pair.left, left) * pair.right for pair in self._deflated)

    def _mean_of(self, form: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        """(1/m) sum_n sum_{t,t'} (x_t^T form x_t') y_t y_t'^T."""
        per_sample = xs.shape[0] * xs.shape[2] ** 2
        total = 0
        for x, y in zip(*(t.split(max(1, CHUNK // per_sample), 1) for t in (xs, ys)), strict=True):
            weights = x @ form[:, None] @ x.mT
            total = total + y.flatten(1, 2).mT @ (weights @ y).flatten(1, 2)
        total = total / self._samples
        return (total + total.mT) / 2

    def start(self) -> Tensor:
        """A random v of length 1: r r^T."""
        groups, _, q = self.sizes
        r = torch.rand(groups, q, 1, dtype=self._inputs.dtype, device=self._inputs.device)
        return unit(r @ r.mT)


def top_pair(
    z: Rearranged, start: Tensor | None, tolerance: float, most: int, scale: Tensor | None = None
) -> tuple[Pair, Tensor]:
    """The largest singular pair by power iteration, with sigma [groups, 1, 1]. Stops at |Z v - sigma u| <= tolerance
    times ``scale``, a singular value to compare with (None: sigma itself), or after ``most`` iterations."""
    v = unit(z.start() if start is None else start)
    w = z.times(v)
    for _ in range(most):
        u = unit(w)
        right = z.transposed_times(u)
        sigma, v = norm(right), unit(right)
        w = z.times(v)
        if bool((norm(w - sigma * u) <= tolerance * (sigma if scale is None else scale)).all()):
            break
    return Pair(u * sigma.sqrt(), v * sigma.sqrt()), sigma


def two_pairs(z: Rearranged, start: Tensor | None, tolerance: float, most: int, dimensions: int) -> tuple[Pair, Pair]:
    """The two largest pairs by Lanczos' method on Z^T Z in ``dimensions`` >= 2 dimensions, at most ``most`` times, the
    next time from both right vectors. Stops at |Z^T u - sigma v| <= tolerance times the largest sigma."""
    basis = [unit(z.start() if start is None else start)]
    for _ in range(most):
        lefts, basis, values = _ritz(z, basis, dimensions)
        residuals = [norm(z.transposed_times(u) - s * v) for u, v, s in zip(lefts, basis, values, strict=True)]
        if bool((torch.stack(residuals) <= tolerance * values[0]).all()):
            break
    first, second = (Pair(u * s.sqrt(), v * s.sqrt()) for u, v, s in zip(lefts, basis, values, strict=True))
    return first, second


def _ritz(z: Rearranged, basis: Sequence[Tensor], dimensions: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The two largest pairs in the Krylov space that the basis begins: left vectors, right vectors, singular values."""
    vs = list(basis)
    while len(vs) < dimensions:
        vs.append(_next(z, z.transposed_times(z.times(vs[-1])), vs))
    images = torch.stack([z.times(v).flatten(1) for v in vs], 2)  # [groups, p^2, K]
    u, s, vt = torch.linalg.svd(images, full_matrices=False)
    lefts = [u[:, :, i].view(len(u), *2 * [z.sizes[1]]) for i in range(2)]
    rights = [torch.einsum("gk,gkij->gij", vt[:, i], torch.stack(vs, 1)) for i in range(2)]
    return lefts, rights, [s[:, i, None, None] for i in range(2)]


def _next(z: Rearranged, x: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """x made orthogonal to the basis; where nothing is left of it a random vector, as equal singular values need; zero
    where the basis is complete."""
    return _orthogonal(x, basis, _orthogonal(z.start(), basis, torch.zeros_like(x)))


def _orthogonal(x: Tensor, basis: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """Of length 1. Twice, as rounding asks for."""
    rounding = 1e3 * torch.finfo(x.dtype).eps * norm(x)
    for _ in range(2):
        x = x - sum(dot(b, x) * b for b in basis)
    return torch.where(norm(x) > rounding, unit(x), otherwise)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((1, 2), keepdim=True)


def norm(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x, keepdim=True)


def unit(x: Tensor) -> Tensor:
    """Of length 1, or zero."""
    length = norm(x)
    return torch.where(length > 0, x / length, 0.0)
