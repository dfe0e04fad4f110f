"""The largest singular pairs of a rearranged Fisher matrix: power iteration, and Lanczos' method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rearranged import Pair, Rearranged, dot, norm, unit


def top_pair(
    z: Rearranged, start: Tensor, tolerance: float, most: int, scale: Tensor | None = None
) -> tuple[Pair, Tensor]:
    """The largest singular pair by power iteration, with sigma [groups, 1, 1]. Stops at |Z v - sigma u| <= tolerance
    times ``scale``, a singular value to compare with (None: sigma itself), or after ``most`` iterations."""
    w = z.times(unit(start))
    for _ in range(most):
        u = unit(w)
        right = z.transposed_times(u)
        sigma, v = norm(right), unit(right)
        w = z.times(v)
        if bool((norm(w - sigma * u) <= tolerance * (sigma if scale is None else scale)).all()):
            break
    return Pair(u * sigma.sqrt(), v * sigma.sqrt()), sigma


def two_pairs(z: Rearranged, start: Tensor, tolerance: float, most: int, dimensions: int) -> tuple[Pair, Pair]:
    """The two largest pairs by Lanczos' method on Z^T Z in ``dimensions`` >= 2 dimensions, at most ``most`` times, the
    next time from both right vectors. Stops at |Z^T u - sigma v| <= tolerance times the largest sigma."""
    basis = [unit(start)]
    for _ in range(most):
        lefts, basis, values = _ritz(z, basis, dimensions)
        residuals = [norm(z.transposed_times(u) - s * v) for u, v, s in zip(lefts, basis, values, strict=True)]
        if bool((torch.stack(residuals) <= tolerance * values[0]).all()):
            break
    first, second = (Pair(u * s.sqrt(), v * s.sqrt()) for u, v, s in zip(lefts, basis, values, strict=True))
    return first, second


def _ritz(z: Rearranged, basis: Sequence[Tensor], dimensions: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The two largest pairs in the Krylov space that the basis begins: left vectors, right vectors, singular values."""
    vs, images = list(basis), []
    for i in range(dimensions):
        images.append(z.times(vs[i]))
        if i + 1 == len(vs) < dimensions:
            vs.append(_next(z, z.transposed_times(unit(images[i])), vs))
    us: list[Tensor] = []
    for image in images:
        us.append(_orthogonal(image, us, torch.zeros_like(image)))
    left, right = torch.stack(us, 1), torch.stack(vs, 1)  # [groups, K, ., .]
    small = torch.stack([(left * image[:, None]).sum((2, 3)) for image in images], 2)
    u, s, vt = torch.linalg.svd(small)
    lefts = [torch.einsum("gk,gkij->gij", u[:, :, i], left) for i in range(2)]
    rights = [torch.einsum("gk,gkij->gij", vt[:, i], right) for i in range(2)]
    return lefts, rights, [s[:, i, None, None] for i in range(2)]


def _next(z: Rearranged, x: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """x made orthogonal to the basis; where nothing is left of it a random vector, as equal singular values need; zero
    where the basis is complete."""
    return _orthogonal(x, basis, _orthogonal(z.right.random(), basis, torch.zeros_like(x)))


def _orthogonal(x: Tensor, basis: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """Of length 1. Twice, as rounding asks for; what loses most of its length the second time was rounding."""
    once = x - sum(dot(b, x) * b for b in basis)
    twice = once - sum(dot(b, once) * b for b in basis)
    return torch.where(norm(twice) > norm(once) / 2, unit(twice), otherwise)
