"""Two-level K-FAC: what single layers cannot see is corrected in a small space that spans all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mbf_kernels import SymmetricBlocks, factor, solve

from .affine import Affine, Rows
from .kfac import KFAC
from .model_optimizer import number, one_of
from .replicas import Seen, Share
from .sample_gradients import NAMES, SAMPLES_ALONG, Factored, Whole, kept, sample_gradients

FORMS = ("multiplicative", "additive")
SPACES = ("nicolaides", "spectral", "krylov", "residual", "krylov_residual")
SUMS = ("input_sums", "output_gradient_sums")  # over inputs and over outputs, [m, T, groups]

Vectors = dict[Affine, Tensor]  # of all layers together, as matrices [groups, q, p]
Made = TypeVar("Made")


class TwoLevelKFAC(KFAC):
    """K-FAC's direction zeta, corrected by R0^T beta in a space of one or two vectors r for each layer (rows of R0)::

        multiplicative   F_c = R0 F R0^T,  beta = F_c^-1 R0 (grad - F zeta),  delta = zeta + w R0^T beta
        additive         F_c[i, j] = sum(A_ij) sum(G_ij) + lambda [i = j],  delta = zeta + w R0^T F_c^-1 R0 grad

    with F = (1/m) sum_n dW_n dW_n^T + lambda I over all layers, of the samples of the last update, and A_ij, G_ij the
    covariances of inputs and of output gradients between layers i and j, averaged as A and G are. The multiplicative
    form minimises the error |delta - F^-1 grad|_F, which falls by (2 w - w^2) beta^T F_c beta (``energy_change`` has
    the last step's). Where it would ascend, zeta is taken. What follows is K-FAC's: the clip, momentum, weight decay.

    Args:
        model, lr and all that KFAC takes.
        form: see above.
        coarse: for the multiplicative form. "nicolaides": r = 1; "spectral": the eigenvector of the smallest eigenvalue
            of A (x) G; "krylov": 1 and K-FAC^-1 1; "residual": K-FAC^-1 (grad - F zeta); "krylov_residual": that, and
            K-FAC^-1 of it. Each is divided by its largest element.
        weight: w >= 0. With 0 it is K-FAC. A move of all weights of a layer by the same number, as ones make, kills
            ReLUs: networks of those want 0.01 or less (the second authors tune it to 0.1 to 1e-4).

    These three are the same in all groups. All layers take part that had their last update in the same step as the
    latest, with as many samples. That update's inputs and output gradients, or the gradients of its samples, stay in
    memory: in every process those of all of them.

    Sources: N. Tselepidis, J. Kohler, A. Orvieto, "Two-Level K-FAC Preconditioning for Deep Learning", 2020 (additive);
    A. Koroko and others, "Analysis and Comparison of Two-Level KFAC Methods for Training Deep Neural Networks", 2023.
    Departures: the multiplicative F_c is that of the last update's samples, not an average; its damping is
    lambda |r|^2; locations of layers with different numbers of them are pooled in the order in which they are stored.
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
        self._last: tuple[tuple, list, Any] | None = None
        super().__init__(model, lr, **options)

    def _own_options(self) -> dict:
        return self._own

    def _check(self, options: dict) -> None:
        super()._check(options)
        number(self._title, "weight", options["weight"], 0, math.inf)
        one_of(self._title, "form", options["form"], FORMS)
        one_of(self._title, "coarse", options["coarse"], SPACES)
        for name in self._own:
            if options[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"{self._title}: expected {name} to be the same in all groups, "
                    f"got {self.param_groups[0][name]!r} and {options[name]!r}"
                )
        if options["coarse"] == "spectral" and options["spatially_uncorrelated"]:  # many eigenvectors are the lowest
            raise ValueError(f"{self._title}: expected coarse other than 'spectral' with spatially_uncorrelated")

    def _measured(self, layer: Affine, rows: Rows, share: Share, group: dict) -> Seen:
        root = share.root_weight
        weighted = rows.weighted(root)
        samples = {SUMS[0]: root * rows.inputs.sum(3), SUMS[1]: weighted.gradients.sum(3)}
        if group["form"] == "multiplicative":
            samples |= kept(weighted)
        for name, part in samples.items():
            samples[name] = self._replicas.concatenated(part, share.lengths, SAMPLES_ALONG.get(name, 0))
        return super()._measured(layer, rows, share, group)._replace(samples=samples)

    def _observe(self, layer: Affine, seen: Seen, state: dict, group: dict) -> None:
        before = state.get("updates", 0)
        super()._observe(layer, seen, state, group)
        if state.get("updates", 0) > before:
            for name in NAMES:
                state.pop(name, None)
            state |= seen.samples
            state["sampled"] = self.param_groups[0]["step"]

    def _coupled(self, gradients: Vectors, directions: Vectors, groups: dict[int, dict]) -> Vectors:
        together, options = self._together(directions), self.param_groups[0]
        self.energy_change = None
        if not together or not options["weight"]:
            return directions
        zeta, gradient = ({layer: vectors[layer] for layer in together} for vectors in (directions, gradients))
        damping = {layer: groups[id(layer)]["damping"] for layer in together}
        if options["form"] == "additive":
            coarse = self._kept(damping, lambda: self._additive(zeta, damping))
            right = coarse.products(gradient)
        else:
            fisher = Fisher({layer: sample_gradients(self.state[layer.weight]) for layer in together}, damping)
            coarse, right = self._multiplicative(fisher, gradient, zeta, groups)
        beta, good = _solved(coarse.matrix, right)
        moves = coarse.combination(options["weight"] * beta)
        corrected = {layer: vector + moves[layer] for layer, vector in zeta.items()}
        good = good & (sum((corrected[layer] * gradient[layer]).sum() for layer in together) > 0)
        if options["form"] == "multiplicative":
            drop = (2 * options["weight"] - options["weight"] ** 2) * (beta @ coarse.matrix @ beta)
            self.energy_change = torch.where(good, -drop, 0.0)
        return directions | {layer: torch.where(good, corrected[layer], zeta[layer]) for layer in together}

    def _additive(self, zeta: Vectors, damping: dict[Affine, float]) -> Coarse:
        layers = list(zeta)
        matrix = coarse_matrix(self._covariances(layers), [layer.groups for layer in layers])
        matrix = matrix + matrix.new_tensor(list(damping.values())).diag()
        return Coarse(self._space("nicolaides", zeta, {}), matrix)

    def _covariances(self, layers: list[Affine]) -> Tensor:
        """Those between the layers, averaged over updates as A and G are; anew where others take part."""
        states = [self.state[layer.weight] for layer in layers]
        first, members = states[0], sum(2 ** self._layers.index(layer) for layer in layers)
        if first.get("covariances_of") != members:
            first |= {"covariances_of": members, "covariance_updates": 0, "covariances_from": -1}
        if first["covariances_from"] != first["sampled"]:
            new = covariances([[state[name] for name in SUMS] for state in states])
            first["covariance_updates"] += 1
            keep = min(1 - 1 / first["covariance_updates"], self._group(layers[0])["decay"])
            first["covariances"] = torch.lerp(first["covariances"], new, 1 - keep) if keep else new
            first["covariances_from"] = first["sampled"]
        return first["covariances"]

    def _multiplicative(
        self, fisher: Fisher, gradient: Vectors, zeta: Vectors, groups: dict[int, dict]
    ) -> tuple[Coarse, Tensor]:
        """And R0 (grad - F zeta), with F zeta itself only where vectors are made of it."""
        name = self.param_groups[0]["coarse"]
        weights = fisher.mean_scores(zeta)
        rest = {layer: gradient[layer] - fisher.damping[layer] * vector for layer, vector in zeta.items()}
        if name.endswith("residual"):
            residual = {layer: vector - fisher.combination(layer, weights) for layer, vector in rest.items()}
            coarse, scores = fisher.coarse(self._space(name, residual, groups))
        else:
            coarse, scores = self._kept(fisher.damping, lambda: fisher.coarse(self._space(name, zeta, groups)))
        return coarse, coarse.products(rest) - scores @ weights

    def _kept(self, damping: dict[Affine, float], make: Callable[[], Made]) -> Made:
        """From the last step, where the options and statistics that it depends on are still the same."""
        states = [self.state[layer.weight] for layer in damping]
        values = [value for state in states for name, value in state.items() if name != self._momentum]
        options = self.param_groups[0]
        key = options["form"], options["coarse"], *damping.values(), *map(id, values)
        if self._last is None or self._last[0] != key:
            self._last = key, values, make()  # the values, as ids are of what lives
        return self._last[2]

    def _together(self, directions: Vectors) -> list[Affine]:
        """Layers that have seen the same samples, the last ones."""
        needed = SUMS if self.param_groups[0]["form"] == "additive" else NAMES
        states = {layer: self.state[layer.weight] for layer in directions}
        states = {layer: state for layer, state in states.items() if not state.keys().isdisjoint(needed)}
        seen = {layer: (state["sampled"], len(state[SUMS[0]])) for layer, state in states.items()}
        latest = max((step for step, _ in seen.values()), default=0)
        counts = [count for step, count in seen.values() if step == latest]
        return [layer for layer, place in seen.items() if place == (latest, counts[0])]

    def _space(self, name: str, residual: Vectors, groups: dict[int, dict]) -> Vectors:
        """R0: [vectors, groups, q, p] by layer."""
        space = {}
        for layer, vector in residual.items():
            if name == "spectral":
                vectors = [self._lowest(layer)]
            elif name in ("nicolaides", "krylov"):
                vectors = [torch.ones_like(vector)]
            else:
                vectors = [self._direction(layer, vector, groups[id(layer)])]
            if name.startswith("krylov"):
                vectors.append(self._direction(layer, vectors[0], groups[id(layer)]))
            space[layer] = torch.stack([_scaled(vector) for vector in vectors])
        return space

    def _lowest(self, layer: Affine) -> Tensor:
        """Of A (x) G the eigenvector of the smallest eigenvalue, in every group."""
        a, g = (torch.linalg.eigh(self.state[layer.weight][name])[1][:, :, 0] for name in "AG")
        return g[:, :, None] * a[:, None]


class Coarse(NamedTuple):
    """R0, and F_c."""

    space: Vectors  # [vectors, groups, q, p] by layer
    matrix: Tensor

    def products(self, x: Vectors) -> Tensor:
        """R0 x, [all vectors]."""
        return torch.cat([vectors.flatten(1) @ x[layer].flatten() for layer, vectors in self.space.items()])

    def combination(self, beta: Tensor) -> Vectors:
        """R0^T beta."""
        parts = beta.split([len(vectors) for vectors in self.space.values()])
        return {layer: torch.tensordot(b, v, 1) for b, (layer, v) in zip(parts, self.space.items(), strict=True)}


class Fisher:
    """F = (1/m) sum_n dW_n dW_n^T + lambda I of several layers, which is never formed."""

    def __init__(self, gradients: dict[Affine, Whole | Factored], damping: dict[Affine, float]):
        self._gradients, self.damping = gradients, damping

    def mean_scores(self, vectors: Vectors) -> Tensor:
        """Their products with dW_n over m, of every sample, [m]."""
        scores = sum(self._gradients[layer].scores(vector) for layer, vector in vectors.items())
        return scores / len(scores)

    def combination(self, layer: Affine, weights: Tensor) -> Tensor:
        """sum_n weights[n] dW_n of a layer."""
        return self._gradients[layer].combination(weights)

    def coarse(self, space: Vectors) -> tuple[Coarse, Tensor]:
        """With F_c = R0 F R0^T; and the products of all its vectors with dW_n, [vectors, m]."""
        scores = [self._gradients[layer].scores(vector) for layer, vectors in space.items() for vector in vectors]
        blocks = [self.damping[layer] * vectors.flatten(1) @ vectors.flatten(1).T for layer, vectors in space.items()]
        stacked = torch.stack(scores)
        return Coarse(space, stacked @ stacked.T / stacked.shape[1] + torch.block_diag(*blocks)), stacked


def covariances(sums: Sequence[Sequence[Tensor]]) -> Tensor:
    """sum(A_ij) and sum(G_ij) for all groups i and j of all layers, [2, groups, groups], of each layer's sums over
    inputs and over outputs [m, T, groups]. Locations are pooled to the fewer of both."""
    inputs = [part for part, _ in sums]
    count, samples = sum(part.shape[2] for part in inputs), len(inputs[0])
    owner = torch.tensor([place for place, part in enumerate(inputs) for _ in range(part.shape[2])])
    found = inputs[0].new_empty(2, count, count)
    for locations in sorted({part.shape[1] for part in inputs}):  # pairs that both have more are overwritten
        able = [place for place, part in enumerate(inputs) if part.shape[1] >= locations]
        where = torch.isin(owner, torch.tensor(able)).nonzero()[:, 0]
        for side, scale in ((0, samples), (1, samples * locations)):
            columns = torch.cat([_pooled(sums[place][side], locations) for place in able], 2).flatten(0, 1)
            found[side, where[:, None], where] = columns.T @ columns / scale
    return found


def coarse_matrix(covariances: Tensor, groups: Sequence[int]) -> Tensor:
    """sum(A_ij) sum(G_ij), summed over the groups of layers."""
    owner = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    belongs = functional.one_hot(owner).to(covariances)
    return belongs.T @ covariances.prod(0) @ belongs


def _pooled(sums: Tensor, locations: int) -> Tensor:
    """[m, T, groups] to fewer locations, by means."""
    return functional.adaptive_avg_pool1d(sums.mT, locations).mT


def _solved(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """And whether it could be solved. Vectors of R0 may be zero or depend on each other: then it is singular, and any
    solution does."""
    lengths = matrix.diagonal().sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    scaled = scale[:, None] * matrix * scale + torch.diag_embed((scale == 0).to(matrix.dtype))
    lower, info = factor(SymmetricBlocks.from_dense(scaled[None]), damping=0.0)
    pivots = lower.to_dense()[0].diagonal().square()
    if bool((info[0] == 0) & (pivots.amin() > 1000 * len(matrix) * torch.finfo(matrix.dtype).eps)):
        solution = solve(lower, (scale * right)[None])[0]
    else:
        solution = torch.linalg.pinv(scaled.nan_to_num(), hermitian=True) @ (scale * right)
    solution = scale * solution
    good = solution.isfinite().all() & matrix.isfinite().all()
    return torch.where(good, solution, 0.0), good


def _scaled(vector: Tensor) -> Tensor:
    largest = vector.abs().amax()
    return torch.where(largest > 0, vector / largest, vector)
