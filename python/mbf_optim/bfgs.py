"""Algebra of BFGS for inverses H, batched: H [..., n, n], vectors [..., n].

A pair (s, y) asks for H y = s. Whatever is not finite in a pair or comes of it, ``accepts`` refuses: 0 / 0 included.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATE = 1e-4  # of s^T y / (s^T s |v|), of Goldfarb, Ren & Bahamou's code


def times(h: Tensor, vector: Tensor) -> Tensor:
    return (h @ vector[..., None])[..., 0]


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def double_damping(s: Tensor, y: Tensor, hy: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    """DD of Goldfarb, Ren & Bahamou: first an s with s^T y >= mu1 y^T H y, then, for that s, a y with
    s^T y >= mu2 s^T s.

    Args:
        s, y: [..., n]. y = 0 gives NaN.
        hy: H y.
        mu1, mu2: in [0, 1).
    """
    s = _powell(s, y, hy, mu1, dot(y, hy))
    return s, _powell(y, s, s, mu2, dot(s, s))


def _powell(x: Tensor, other: Tensor, target: Tensor, mu: float, aim: Tensor) -> Tensor:
    """theta x + (1 - theta) target, where target^T other = aim, with the largest theta <= 1 that leaves
    x^T other >= mu aim."""
    product = dot(x, other)
    theta = torch.where(product > mu * aim, 1.0, (1 - mu) * aim / (aim - product))[..., None]
    return theta * x + (1 - theta) * target


def accepts(s: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Whether s^T y > 1e-4 s^T s |v|, and has a reciprocal; [...]."""
    product = dot(s, y)
    return (product > GATE * dot(s, s) * v.norm(dim=-1)) & product.isfinite() & (1 / product).isfinite()


def gated_update(h: Tensor, s: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(I - rho s y^T) H (I - rho y s^T) + rho s s^T with rho = 1 / s^T y, where that is accepted and finite, else H;
    and whether it is, [...].

    As H + s z^T + z s^T, symmetric to the bit. No element of H is larger than the largest of its diagonal.
    """
    hy, rho = times(h, y), 1 / dot(s, y)[..., None]
    z = rho / 2 * (1 + rho * dot(y, hy)[..., None]) * s - rho * hy
    bound = h.diagonal(dim1=-2, dim2=-1).amax(-1) + 2 * s.abs().amax(-1) * z.abs().amax(-1)
    good = accepts(s, y, v) & bound.isfinite()
    s, z = (torch.where(good[..., None], vector, 0.0) for vector in (s, z))
    half = s[..., :, None] * z[..., None, :]
    return h + (half + half.mT), good


def action_update(h: Tensor, matrix: Tensor, damping: float, v: Tensor) -> tuple[Tensor, Tensor]:
    """Towards the inverse of a known matrix + damping I along H v, by its action there: s = H v, y = matrix s + damping
    s. Returns what ``gated_update`` does."""
    s = times(h, v)
    return gated_update(h, s, times(matrix, s) + damping * s, v)


def limited_product(s: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """H X for the H that the pairs make of I: the two loops of L-BFGS for all columns at once, each loop's recursion a
    triangular system.

    Args:
        s, y: pairs, oldest first, [..., t, n]. A pair of zeros is none.
        x: [..., n, c].
    """
    products = s @ y.mT
    curvature = products.diagonal(dim1=-2, dim2=-1)[..., None]
    r = products.triu() + torch.diag_embed((curvature[..., 0] == 0).to(s.dtype))
    alpha = torch.linalg.solve_triangular(r, s @ x, upper=True)
    rest = x - y.mT @ alpha
    return rest + s.mT @ torch.linalg.solve_triangular(r.mT, curvature * alpha - y @ rest, upper=False)
