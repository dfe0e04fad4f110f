"""Two-level K-FAC: what single layers cannot see is corrected in a small space that spans all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mbf_kernels import SymmetricBlocks, factor, solve

from .affine import Affine, Rows
from .kfac import KFAC
from .model_optimizer import number

FORMS = ("multiplicative", "additive")
SPACES = ("nicolaides", "spectral", "krylov", "residual", "krylov_residual")
ROWS = ("rows_inputs", "rows_gradients")

Vectors = dict[Affine, Tensor]  # of all layers together, as matrices [groups, q, p]


class Coarse(NamedTuple):
    """A vector of R0: it lives on one layer."""

    layer: Affine
    vector: Tensor  # [groups, q, p]


class TwoLevelKFAC(KFAC):
    """K-FAC's direction zeta, corrected by R0^T beta in a space of one or two vectors r for each layer (rows of R0)::

        multiplicative   F_c = R0 F R0^T,  beta = F_c^-1 R0 (grad - F zeta),  delta = zeta + w R0^T beta
        additive         F_c[i, j] = sum(A_ij) sum(G_ij) + lambda [i = j],  delta = zeta + w R0^T F_c^-1 R0 grad

    with F = (1/m) sum_n dW_n dW_n^T + lambda I over all layers, of the samples of the last update, and A_ij, G_ij the
    covariances of inputs and of output gradients between layers i and j. The multiplicative form minimises the error
    |delta - F^-1 grad|_F, which falls by (2 w - w^2) beta^T F_c beta (``energy_change`` has the last step's). Where it
    would ascend, zeta is taken. What follows is K-FAC's: the clip, momentum, weight decay.

    Args:
        model, lr and all that KFAC takes.
        form: see above.
        coarse: for the multiplicative form. "nicolaides": r = 1; "spectral": the eigenvector of the smallest eigenvalue
            of A (x) G; "krylov": 1 and K-FAC^-1 1; "residual": K-FAC^-1 (grad - F zeta); "krylov_residual": that, and
            K-FAC^-1 of it. Each is divided by its largest element.
        weight: w >= 0. With 0 it is K-FAC.

    All layers with as many samples as the first take part. F_c, one row for each vector, is factored by the kernels up
    to 128 of them. The inputs and gradients of the last update stay in memory.

    Sources: N. Tselepidis, J. Kohler, A. Orvieto, "Two-Level K-FAC Preconditioning for Deep Learning", 2020 (additive);
    A. Koroko and others, "Analysis and Comparison of Two-Level KFAC Methods for Training Deep Neural Networks", 2023.
    Departures: F_c is that of the last update's samples, not an average; its damping is lambda |r|^2; locations of
    layers with different numbers of them are pooled in the order in which they are stored.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        form: str = "multiplicative",
        coarse: str = "nicolaides",
        weight: float = 1.0,
        **options,
    ):
        self._own = {"form": form, "coarse": coarse, "weight": weight}
        self.energy_change: Tensor | None = None
        super().__init__(model, lr, **options)

    def _own_options(self) -> dict:
        return self._own

    def _check(self, options: dict) -> None:
        super()._check(options)
        number(self._title, "weight", options["weight"], 0, math.inf)
        for name, known in (("form", FORMS), ("coarse", SPACES)):
            if options[name] not in known:
                raise ValueError(
                    f"{self._title}: expected {name} to be one of {', '.join(known)}, got {options[name]!r}"
                )
        if options["coarse"] == "spectral" and options["spatially_uncorrelated"]:  # many eigenvectors are the lowest
            raise ValueError(f"{self._title}: expected coarse other than 'spectral' with spatially_uncorrelated")

    def _observe(self, layer: Affine, rows: Rows, state: dict, group: dict) -> None:
        before = state.get("updates", 0)
        super()._observe(layer, rows, state, group)
        if state.get("updates", 0) > before:
            state |= zip(ROWS, rows[:2], strict=True)

    def _coupled(self, gradients: Vectors, directions: Vectors, groups: dict[int, dict]) -> Vectors:
        together = self._together(directions)
        options = self.param_groups[0]
        if not together or not options["weight"]:
            return directions
        zeta = {layer: directions[layer] for layer in together}
        gradient = {layer: gradients[layer] for layer in together}
        damping = {layer: groups[id(layer)]["damping"] for layer in together}
        fisher = Fisher({layer: self._rows(layer) for layer in together}, damping)
        if options["form"] == "additive":
            space, right, matrix = self._ones(together), gradient, fisher.kronecker_coarse()
        else:
            right = _minus(gradient, fisher.times(zeta))
            space = self._space(options["coarse"], right, groups)
            matrix = fisher.coarse(space)
        beta, good = _solved(matrix, torch.stack([(c.vector * right[c.layer]).sum() for c in space]))
        corrected = dict(zeta)
        for amount, c in zip(beta, space, strict=True):
            corrected[c.layer] = corrected[c.layer] + options["weight"] * amount * c.vector
        good = good & (sum((corrected[layer] * gradient[layer]).sum() for layer in together) > 0)
        self.energy_change = None
        if options["form"] == "multiplicative":
            drop = (2 * options["weight"] - options["weight"] ** 2) * (beta @ matrix @ beta)
            self.energy_change = torch.where(good, -drop, 0.0)
        return directions | {layer: torch.where(good, corrected[layer], zeta[layer]) for layer in together}

    def _together(self, directions: Vectors) -> list[Affine]:
        """Layers that have seen the same samples."""
        kept = [layer for layer in directions if ROWS[0] in self.state[layer.weight]]
        return [layer for layer in kept if len(self._rows(layer).inputs) == len(self._rows(kept[0]).inputs)]

    def _rows(self, layer: Affine) -> Rows:
        inputs, gradients = (self.state[layer.weight][name] for name in ROWS)
        return Rows(inputs, gradients, inputs.shape[1])

    def _ones(self, layers: Sequence[Affine]) -> list[Coarse]:
        return [Coarse(layer, layer.weight.new_ones(layer.shape, dtype=layer.dtype)) for layer in layers]

    def _space(self, name: str, residual: Vectors, groups: dict[int, dict]) -> list[Coarse]:
        def preconditioned(vector: Coarse) -> Coarse:
            return Coarse(vector.layer, self._direction(vector.layer, vector.vector, groups[id(vector.layer)]))

        layers = list(residual)
        if name == "spectral":
            space = [Coarse(layer, self._lowest(layer)) for layer in layers]
        elif name in ("nicolaides", "krylov"):
            space = self._ones(layers)
        else:
            space = [preconditioned(Coarse(layer, residual[layer])) for layer in layers]
        if name.startswith("krylov"):
            space += map(preconditioned, space.copy())
        return [Coarse(c.layer, _scaled(c.vector)) for c in space]

    def _lowest(self, layer: Affine) -> Tensor:
        """Of A (x) G the eigenvector of the smallest eigenvalue, in every group."""
        a, g = (torch.linalg.eigh(self.state[layer.weight][name])[1][:, :, 0] for name in "AG")
        return g[:, :, None] * a[:, None]


class Fisher:
    """F = (1/m) sum_n dW_n dW_n^T + lambda I of several layers, which is never formed."""

    def __init__(self, rows: dict[Affine, Rows], damping: dict[Affine, float]):
        self._rows, self._damping = rows, damping
        self._samples = len(next(iter(rows.values())).inputs)

    def scores(self, layer: Affine, vector: Tensor) -> Tensor:
        """vector . dW_n of every sample, [m]."""
        rows = self._rows[layer]
        return torch.einsum("mtgq,gqp,mtgp->m", rows.gradients, vector, rows.inputs)

    def times(self, vectors: Vectors) -> Vectors:
        weights = sum(self.scores(layer, vector) for layer, vector in vectors.items()) / self._samples
        return {layer: self._sum(layer, weights) + self._damping[layer] * x for layer, x in vectors.items()}

    def coarse(self, space: Sequence[Coarse]) -> Tensor:
        """R0 F R0^T."""
        scores = torch.stack([self.scores(c.layer, c.vector) for c in space])
        products = torch.stack([torch.stack([self._damped_product(c, d) for d in space]) for c in space])
        return scores @ scores.T / self._samples + products

    def _damped_product(self, c: Coarse, d: Coarse) -> Tensor:
        if c.layer is not d.layer:
            return c.vector.new_zeros(())
        return self._damping[c.layer] * (c.vector * d.vector).sum()

    def kronecker_coarse(self) -> Tensor:
        """sum(A_ij) sum(G_ij) + lambda I, groups of a layer summed."""
        layers = list(self._rows)
        matrix = torch.stack([torch.stack([self._product(i, j) for j in layers]) for i in layers])
        damping = torch.tensor([self._damping[layer] for layer in layers], dtype=matrix.dtype, device=matrix.device)
        return matrix + damping.diag()

    def _product(self, i: Affine, j: Affine) -> Tensor:
        """sum over groups of sum(A_ij) sum(G_ij), locations pooled to the fewer of both."""
        locations = min(self._rows[layer].inputs.shape[1] for layer in (i, j))
        a, b = (_pooled(self._rows[layer].inputs.sum(3), locations) for layer in (i, j))
        c, d = (_pooled(self._rows[layer].gradients.sum(3), locations) for layer in (i, j))
        inputs = torch.einsum("mtg,mth->gh", a, b) / self._samples
        gradients = torch.einsum("mtg,mth->gh", c, d) / (self._samples * locations)
        return (inputs * gradients).sum()

    def _sum(self, layer: Affine, weights: Tensor) -> Tensor:
        rows = self._rows[layer]
        return torch.einsum("m,mtgq,mtgp->gqp", weights, rows.gradients, rows.inputs)


def _pooled(sums: Tensor, locations: int) -> Tensor:
    """[m, T, groups] to fewer locations, by means."""
    return functional.adaptive_avg_pool1d(sums.mT, locations).mT


def _solved(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """And whether it could be solved."""
    lower, info = factor(SymmetricBlocks.from_dense(matrix[None]), damping=0.0)
    solution = solve(lower, right[None])[0]
    good = (info[0] == 0) & solution.isfinite().all()
    return torch.where(good, solution, 0.0), good


def _scaled(vector: Tensor) -> Tensor:
    largest = vector.abs().amax()
    return torch.where(largest > 0, vector / largest, vector)


def _minus(x: Vectors, y: Vectors) -> Vectors:
    return {layer: x[layer] - y[layer] for layer in x}
