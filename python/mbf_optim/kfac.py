"""K-FAC: Martens & Grosse 2015; for convolutions KFC, Grosse & Martens 2016."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .affine import Affine, Rows
from .input_side import input_side
from .kronecker import gram, mean_diagonal, split_damping, update_inverses, without_denormals
from .layerwise import LayerwiseOptimizer
from .model_optimizer import check_range, flag, number, one_of, positive
from .replicas import Seen, Share
from .sampling import Residual

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMS = ("factored", "unbalanced", "exact")


class KFAC(LayerwiseOptimizer):
    """Kronecker-factored approximate curvature, layer by layer. For W [q, p] with the bias as last column::

        A   <- e A + (1 - e) (1/m) sum_n sum_t a a^T         a: the input with a 1 appended, at every location t
        G   <- e G + (1 - e) (1/(m T)) sum_n sum_t g g^T     g: the gradient of the output, of a sample alone
        U   = (G + sqrt(lambda) / pi I)^-1 grad (A + pi sqrt(lambda) I)^-1
        D   <- momentum D + nu U + weight_decay W
        W   <- W - lr D

    with e = min(1 - 1/k, decay) at the k-th update, pi^2 = (tr A / p) / (tr G / q), and over all layers the KL clip
    nu = min(1, sqrt(kl_clip / (lr^2 sum <U, grad>))). Linear, Conv1d and Conv2d layers have such curvature (grouped
    convolutions one for each group); all else steps along its gradient, unclipped. ``report()`` tells which.

    Args:
        model: its parameters are stepped.
        lr: alpha.
        damping: lambda.
        momentum, weight_decay: of the SGD that follows.
        decay: of the averages of A and G.
        update_interval, factor_interval: steps between updates of A and G, and between their inverses, which follow
            every update in the first 20 steps.
        kl_clip: kappa; None: no clip.
        damping_form: "factored" as above; "unbalanced": pi = 1; "exact": U = (A (x) G + lambda I)^-1 grad, by
            eigenvalues.
        spatially_uncorrelated: SUA: inputs of a convolution are taken to have no covariance between positions. Then A
            is made of two matrices, C and C + 1 wide for C channels (of a group), instead of one of C kh kw + 1;
            docs/methods.md has the formula.
        groups, distribution, mean_loss, grad_scaler, process_group: see LayerwiseOptimizer.

    A layer whose statistics or inverse are not finite keeps those it had. Raises ValueError or TypeError for an option
    out of its range and for sparse gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        damping: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.95,
        update_interval: int = 10,
        factor_interval: int = 100,
        kl_clip: float | None = 1e-3,
        damping_form: str = "factored",
        spatially_uncorrelated: bool = False,
        groups: Iterable[dict] | None = None,
        distribution: str | Residual | None = None,
        mean_loss: bool = True,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: ProcessGroup | None = None,
    ):
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay, "decay": decay,
            "update_interval": update_interval, "factor_interval": factor_interval, "kl_clip": kl_clip,
            "damping_form": damping_form, "spatially_uncorrelated": spatially_uncorrelated,
        }  # fmt: skip
        options = defaults | self._own_options()
        super().__init__(model, options, groups, distribution, mean_loss, grad_scaler, process_group)

    def _own_options(self) -> dict:
        """Of a method that builds on this one."""
        return {}

    def _check(self, options: dict) -> None:
        check_range(self._title, options)
        number(self._title, "damping", options["damping"], 0, math.inf)
        if options["damping_form"] == "exact":  # eigenvalues may be zero
            positive(self._title, "damping", options["damping"])
        number(self._title, "decay", options["decay"], 0, 1)
        one_of(self._title, "damping_form", options["damping_form"], FORMS)
        flag(self._title, "spatially_uncorrelated", options["spatially_uncorrelated"])

    def _shapes(self, layer: Affine) -> dict[str, tuple[int, ...]]:
        groups, outputs, _ = layer.shape
        group = self._group(layer)
        exact, shapes = group["damping_form"] == "exact", {}
        for name, n in (input_side(layer, group).sizes | {"G": outputs}).items():
            shapes[name] = groups, n, n
            shapes |= {f"{name}_values": (groups, n), f"{name}_vectors": (groups, n, n)} if exact else {}
            shapes |= {} if exact else {f"{name}_inverse": (groups, n, n)}
        return shapes

    def _measured(self, layer: Affine, rows: Rows, share: Share, group: dict) -> Seen:
        seen = input_side(layer, group).sums(rows)
        for tensor in (*seen.matrices.values(), *seen.sums.values()):
            tensor /= share.divisor
        seen.matrices["G"] = gram(rows.gradients) / (share.divisor * share.locations)
        return seen._replace(locations=share.locations)

    def _observe(self, layer: Affine, seen: Seen, state: dict, group: dict) -> None:
        side = input_side(layer, group)
        new = side.blocks(seen) | {"G": seen.matrices["G"]}
        if not all(bool(matrix.sum().isfinite()) for matrix in new.values()):
            self._skip(state)
            return
        state["updates"] = state.get("updates", 0) + 1
        keep = min(1 - 1 / state["updates"], group["decay"])
        for name, matrix in new.items():
            state[name] = matrix if name not in state else state[name].lerp_(matrix, 1 - keep)

    def _refresh(self, layers: list[Affine], groups: dict[int, dict]) -> None:
        factored, dampings = [], []
        for layer in layers:
            state, group = self.state[layer.weight], groups[id(layer)]
            side = input_side(layer, group)
            if side.names[0] not in state:
                continue
            if group["damping_form"] == "exact":
                _decompose(state, (*side.names, "G"))
            else:
                means = side.mean_diagonal(state), mean_diagonal(state["G"])
                of_a, of_g = split_damping(*means, group["damping"], group["damping_form"] == "factored")
                factored.append(state)
                dampings.append(dict.fromkeys(side.names, of_a) | {"G": of_g})
        for state in update_inverses(factored, dampings):
            self._skip(state)

    def _direction(self, layer: Affine, gradient: Tensor, group: dict) -> Tensor | None:
        state, side = self.state.get(layer.weight, {}), input_side(layer, group)
        inverted = f"{side.names[0]}_inverse" in state
        if f"{side.names[0]}_values" in state and (group["damping_form"] == "exact" or not inverted):
            parts = side.split(state["G_vectors"].mT @ gradient)
            found = {name: _divided(state, name, part, group["damping"]) for name, part in parts.items()}
            return state["G_vectors"] @ side.join(found)
        if inverted:
            parts = side.split(state["G_inverse"] @ gradient)
            return side.join({name: part @ state[f"{name}_inverse"] for name, part in parts.items()})
        return None

    def _structure(self, layer: Affine) -> tuple[str, int, int]:
        groups, outputs, _ = layer.shape
        side = input_side(layer, self._group(layer))
        return f"{side}, G {outputs}x{outputs}", (len(side.names) + 1) * groups, max(outputs, side.size)


def _decompose(state: dict, names: Iterable[str]) -> None:
    for name in names:
        matrix = state[name]
        values, vectors = torch.linalg.eigh(matrix.double())  # LAPACK's in float32 has given NaN for finite ones
        state[f"{name}_values"] = values.clamp_min(0).to(matrix.dtype)
        state[f"{name}_vectors"] = without_denormals(vectors.to(matrix.dtype)).contiguous()  # LAPACK's are by columns


def _divided(state: dict, name: str, part: Tensor, damping: float) -> Tensor:
    """A part, its rows in the eigenbasis of G, times (A (x) G + lambda I)^-1."""
    basis, rows = state[f"{name}_vectors"], part.shape[1] // state["G_values"].shape[1]
    outputs = state["G_values"].repeat_interleave(rows, 1)
    return (part @ basis / (outputs[:, :, None] * state[f"{name}_values"][:, None] + damping)) @ basis.mT
