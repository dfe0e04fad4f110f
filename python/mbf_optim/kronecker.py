"""Algebra of Kronecker-factored matrices. vec stacks columns, so that (A (x) G) vec(X) = vec(G X A^T) for X [q, p].

Every matrix is batched over groups: A [groups, p, p], G [groups, q, q], X [groups, q, p].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks, factor, solve

BLOCK = 128  # of symmetric products
KERNEL_SIZE = 128  # up to here the inverses of all layers are kernels' work, above torch.linalg's


def gram(rows: Tensor) -> Tensor:
    """sum x x^T over samples and locations, [groups, n, n], of [m, T, groups, n]."""
    columns = rows.flatten(0, 1).permute(1, 2, 0)
    return symmetric_product(columns, columns)


def symmetric_product(x: Tensor, y: Tensor) -> Tensor:
    """X Y^T [groups, n, n] of X, Y [groups, n, k], where it is symmetric: made of what is on the diagonal and above."""
    groups, n, _ = x.shape
    product = x.new_empty(groups, n, n)
    for start in range(0, n, BLOCK):
        product[:, start : start + BLOCK, start:] = x[:, start : start + BLOCK] @ y[:, start:].mT
    return product.triu() + product.triu(1).mT


def mean_diagonal(matrix: Tensor) -> Tensor:
    """tr / n, [groups]."""
    return matrix.diagonal(dim1=1, dim2=2).mean(1)


def split_damping(a: Tensor, g: Tensor, damping: float, balanced: bool) -> tuple[Tensor, Tensor]:
    """pi sqrt(lambda) for A and sqrt(lambda) / pi for G, [groups] each, of their mean diagonals tr A / p and tr G / q:
    pi^2 is the ratio of these if balanced, else 1 (Martens & Grosse 2015, section 6.3)."""
    root = torch.full_like(a, damping**0.5)
    if not balanced:
        return root, root
    ratio = (a / g).sqrt()
    pi = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
    return root * pi, root / pi


def damped(matrix: Tensor, damping: Tensor) -> Tensor:
    """The matrix + lambda I, a lambda for each group."""
    return matrix + torch.diag_embed(damping[:, None].expand(matrix.shape[:2]))


def without_denormals(matrix: Tensor) -> Tensor:
    """With zeros for what is below eps^2 of a matrix's largest entry: products with denormal numbers are slow."""
    sizes = matrix.abs()
    return torch.where(sizes > torch.finfo(matrix.dtype).eps ** 2 * sizes.amax((1, 2), keepdim=True), matrix, 0.0)


def whitened(
    first: Sequence[Tensor], second: Sequence[Tensor], damping: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K1, K2, s1, s2 for the inverse of R (x) S + R2 (x) S2, R and S with lambda added to the magnitudes of their
    eigenvalues: K1 K1^T = R^-1 and K1^T R2 K1 = diag(s1), likewise K2 and s2 for S (Martens & Grosse 2015, appendix B).
    """
    ks, spectra = [], []
    for matrix, other in zip(first, second, strict=True):
        values, vectors = torch.linalg.eigh(matrix.double())
        root = vectors * (values.abs() + damping).rsqrt()[:, None] @ vectors.mT
        spectrum, basis = torch.linalg.eigh(root @ other.double() @ root)
        ks.append(without_denormals((root @ basis).to(matrix.dtype)))
        spectra.append(spectrum.to(matrix.dtype))
    return *ks, *spectra


def inverses(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each the inverse and, by group, whether it is one: a matrix that is not positive definite, in float64 if need
    be, has none."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    alike: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape[1], matrix.dtype, matrix.device), []).append(i)
    for (size, _, _), members in alike.items():
        stacked = torch.cat([matrices[i] for i in members])
        inverse, good = (_by_kernels if size <= KERNEL_SIZE else _by_linalg)(stacked)
        if stacked.dtype != torch.float64 and not bool(good.all()):  # more digits may do
            exact, good = _by_linalg(stacked.double())
            inverse = exact.to(stacked.dtype)
            good = good & inverse.isfinite().all(2).all(1)
        counts = [len(matrices[i]) for i in members]
        found |= dict(zip(members, zip(inverse.split(counts), good.split(counts), strict=True), strict=True))
    return [found[i] for i in range(len(matrices))]


def update_inverses(states: Sequence[dict], dampings: Sequence[dict[str, Tensor]]) -> list[dict]:
    """Of matrices of each state, damped by name, under their names and "_inverse"; the old one stays where there is no
    new one. Returns the states that keep some old one, or still have none."""
    matrices = [
        damped(state[name], lam)
        for state, by_name in zip(states, dampings, strict=True)
        for name, lam in by_name.items()
    ]
    found = iter(inverses(matrices))
    failed = []
    for state, by_name in zip(states, dampings, strict=True):
        new = {f"{name}_inverse": next(found) for name in by_name}
        complete = all(bool(good.all()) for _, good in new.values())
        if not complete:
            failed.append(state)
        if complete or new.keys() <= state.keys():
            state |= {
                name: torch.where(good[:, None, None], inverse, state.get(name, inverse))
                for name, (inverse, good) in new.items()
            }
    return failed


def _by_kernels(matrices: Tensor) -> tuple[Tensor, Tensor]:
    lower, info = factor(SymmetricBlocks.from_dense(matrices), damping=0.0)
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    inverse = solve(lower, identity)
    return (inverse + inverse.mT) / 2, info == 0


def _by_linalg(matrices: Tensor) -> tuple[Tensor, Tensor]:
    lower, info = torch.linalg.cholesky_ex(matrices)
    good = info == 0
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    return torch.cholesky_inverse(torch.where(good[:, None, None], lower, identity)).contiguous(), good
