"""K-FAC: Martens & Grosse 2015; for convolutions KFC, Grosse & Martens 2016."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .affine import Affine, Rows
from .kronecker import factors, split_damping, update_inverses
from .layerwise import LayerwiseOptimizer
from .model_optimizer import check_range, number, positive
from .sampling import Residual

FORMS = ("factored", "unbalanced", "exact")
FACTORS = ("A", "G")


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
        groups, distribution, mean_loss, grad_scaler: see LayerwiseOptimizer.

    A layer whose statistics or inverse are not finite keeps those it had. Raises ValueError or TypeError for an option
    out of its range and for sparse gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        damping: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.95,
        update_interval: int = 10,
        factor_interval: int = 100,
        kl_clip: float | None = 1e-3,
        damping_form: str = "factored",
        groups: Iterable[dict] | None = None,
        distribution: str | Residual | None = None,
        mean_loss: bool = True,
        grad_scaler: torch.amp.GradScaler | None = None,
    ):
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay, "decay": decay,
            "update_interval": update_interval, "factor_interval": factor_interval, "kl_clip": kl_clip,
            "damping_form": damping_form,
        }  # fmt: skip
        super().__init__(model, defaults | self._own_options(), groups, distribution, mean_loss, grad_scaler)

    def _own_options(self) -> dict:
        """Of a method that builds on this one."""
        return {}

    def _check(self, options: dict) -> None:
        check_range(self._title, options)
        number(self._title, "damping", options["damping"], 0, math.inf)
        if options["damping_form"] == "exact":  # eigenvalues may be zero
            positive(self._title, "damping", options["damping"])
        number(self._title, "decay", options["decay"], 0, 1)
        if options["damping_form"] not in FORMS:
            raise ValueError(
                f"{self._title}: expected damping_form to be one of {', '.join(FORMS)}, got {options['damping_form']!r}"
            )

    def _observe(self, layer: Affine, rows: Rows, state: dict, group: dict) -> None:
        new = factors(rows)
        if not all(bool(matrix.sum().isfinite()) for matrix in new):
            state["skipped"] = state.get("skipped", 0) + 1
            return
        state["updates"] = state.get("updates", 0) + 1
        keep = min(1 - 1 / state["updates"], group["decay"])
        for name, matrix in zip(FACTORS, new, strict=True):
            state[name] = matrix if name not in state else keep * state[name] + (1 - keep) * matrix

    def _refresh(self, layers: list[Affine], groups: dict[int, dict]) -> None:
        factored, dampings = [], []
        for layer in layers:
            state, group = self.state[layer.weight], groups[id(layer)]
            if FACTORS[0] not in state:
                continue
            if group["damping_form"] == "exact":
                self._decompose(state)
            else:
                pair = [state[name] for name in FACTORS]
                factored.append(state)
                dampings.append(split_damping(*pair, group["damping"], group["damping_form"] == "factored"))
        update_inverses(factored, FACTORS, dampings)

    def _decompose(self, state: dict) -> None:
        for name in FACTORS:
            matrix = state[name]
            values, vectors = torch.linalg.eigh(matrix.double())  # LAPACK's in float32 has given NaN for finite ones
            state[f"{name}_values"] = values.clamp_min(0).to(matrix.dtype)
            state[f"{name}_vectors"] = vectors.to(matrix.dtype)

    def _direction(self, layer: Affine, gradient: Tensor, group: dict) -> Tensor | None:
        state = self.state.get(layer.weight, {})
        if "A_values" in state and (group["damping_form"] == "exact" or "A_inverse" not in state):
            a, g = state["A_vectors"], state["G_vectors"]
            spectrum = state["G_values"][:, :, None] * state["A_values"][:, None] + group["damping"]
            return g @ ((g.mT @ gradient @ a) / spectrum) @ a.mT
        if "A_inverse" in state:
            return state["G_inverse"] @ gradient @ state["A_inverse"]
        return None

    def _structure(self, layer: Affine) -> tuple[str, int, int]:
        groups, outputs, inputs = layer.shape
        return f"A {inputs}x{inputs}, G {outputs}x{outputs}", 2 * groups, max(outputs, inputs)
