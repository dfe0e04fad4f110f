"""AdaFisher: Gomes et al. 2025, a diagonal of Kronecker factors in the place of Adam's second moment."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mbf_kernels import rank_one_step_

from .affine import Affine
from .diagonal_factors import Norm, factors, known_layers, sums
from .model_optimizer import ModelOptimizer, count, number, one_of, positive, scaler

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EPSILON = 1e-6  # of the normalization
AVERAGES: dict[str, Callable[[float], tuple[float, float]]] = {  # what remains of the old, and comes of the new
    "official": lambda decay: (0.1 * decay, 0.01 * decay),
    "paper": lambda decay: (decay, 1 - decay),
}


class AdaFisher(ModelOptimizer):
    """Gradients divided by the diagonal of an approximate Fisher matrix, layer by layer. For W [m, n] with the bias as
    last column, H [n] and S [m] ones at first::

        H   <- e H + f minmax(mean of h^2)          h: the input, with a 1 appended where there is a bias
        S   <- e S + f minmax(mean of s^2)          s: the gradient of the loss at the output, as autograd gives it
        F   = S H^T + lambda                        [m, n]
        M   <- beta M + (1 - beta) (grad + weight_decay W)
        W   <- W - lr / (1 - beta^t) M / F          at the t-th step of the tensor

    with minmax(v) = (v - min v) / (max v - min v + 1e-6) over the vector. Linear, Conv1d, Conv2d (all groups have one
    H), BatchNorm1d, BatchNorm2d and LayerNorm layers have such curvature, for norms (n = 2, gain and shift) of squares
    of sums: docs/methods.md. Every other tensor, and a layer not yet seen in training, has F = lambda: the step of a
    layer whose curvature is negligible. ``report()`` tells which.

    Args:
        model: its parameters are stepped.
        lr: alpha.
        beta: of the average M.
        damping: lambda > 0; lr / lambda is the step along M where there is no curvature.
        decay: gamma. e = 0.1 gamma, f = 0.01 gamma ("official") or e = gamma, f = 1 - gamma ("paper").
        update_interval: steps between updates of H and S.
        weight_decay: added to the gradient; see AdaFisherW.
        variant: "official" as in the authors' code, "paper" with the average of the paper. With the former and its
            defaults F is in [lambda, 1.085 lambda] from the third update on, later in [lambda, 1.0757 lambda]: SGD
            with momentum, nearly.
        relative_damping: tau > 0; ours, not the paper's: F = (lambda / lambda_l) (S H^T + lambda_l), lambda_l = tau
            times the mean of S H^T over the layer. Curvature then counts at any scale, and no step is longer than
            lr / lambda along M.
        groups, process_group: see ModelOptimizer; H and S go by the options of the weight's group. All samples of the
            processes count alike here, and s is of the mean of their losses.
        grad_scaler: what scales the loss under autocast.

    Statistics that are not finite are skipped, and counted. Raises ValueError or TypeError for an option out of its
    range and for sparse gradients.

    Source: D. Gomes, Y. Zhang, E. Belilovsky, G. Wolf, M. S. Hosseini, "AdaFisher: Adaptive Second Order Optimization
    via Fisher Information", ICLR 2025. Departures from the authors' code: parameters find their layer by identity, so
    that none is left unstepped or gets another's F; F = lambda, not 1, for parameters without a layer; one update of H
    and S in a step, from all uses of the layer; infinities are not replaced; padding modes and dilation count; H has an
    entry for the bias only where that is trained.
    """

    _decoupled = False
    _momentum = "average"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        beta: float = 0.9,
        damping: float = 1e-3,
        decay: float = 0.8,
        update_interval: int = 100,
        weight_decay: float = 0.0,
        variant: str = "official",
        relative_damping: float | None = None,
        groups: Iterable[dict] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: ProcessGroup | None = None,
    ):
        defaults = {
            "lr": lr, "beta": beta, "damping": damping, "decay": decay, "update_interval": update_interval,
            "weight_decay": weight_decay, "variant": variant, "relative_damping": relative_damping,
        }  # fmt: skip
        super().__init__(model, defaults, groups, process_group)
        scaler(self._title, grad_scaler)
        self._grad_scaler = grad_scaler

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = self._evaluated(closure)
        self._update_statistics()
        for group in self.param_groups:
            self._move(group)
            group["step"] += 1
        return loss

    def _check(self, options: dict) -> None:
        for name in ("lr", "weight_decay"):
            number(self._title, name, options[name], 0, float("inf"))
        for name in ("beta", "decay"):
            number(self._title, name, options[name], 0, 1)
        positive(self._title, "damping", options["damping"])
        if options["relative_damping"] is not None:
            positive(self._title, "relative_damping", options["relative_damping"])
        count(self._title, "update_interval", options["update_interval"])
        one_of(self._title, "variant", options["variant"], AVERAGES)

    def _known_layers(self, trained: Container[int] | None) -> list[Affine | Norm]:
        return known_layers(self._model, trained)

    def _shapes(self, layer: Affine | Norm) -> dict[str, tuple[int, ...]]:
        groups, outputs, n = layer.shape
        return {"H": (n,), "S": (groups * outputs,)}

    def _numbers(self, layer: Affine | Norm | None) -> dict[str, int]:
        return super()._numbers(layer) | {"step": 0}

    def _structure(self, layer: Affine | Norm) -> tuple[str, int, int]:
        groups, outputs, n = layer.shape
        m = groups * outputs
        return f"H {n}, S {m}", 2, max(n, m)

    def _update_statistics(self) -> None:
        scale = 1.0 if self._grad_scaler is None else self._grad_scaler.get_scale()
        scale *= self._replicas.count  # of the loss, which is the mean of those of the processes
        shares = self._shares(self._layers)
        parts = ((layer, sums(layer, share, scale)) for layer, share in shares.items())
        for layer, seen in self._replicas.totals(parts):
            self._observe(layer, factors(layer, shares[layer], seen.sums), self._group(layer))
        self._capture.clear()

    def _observe(self, layer: Affine | Norm, new: tuple[Tensor, Tensor], group: dict) -> None:
        state = self.state[layer.weight]
        if not all(bool(vector.isfinite().all()) for vector in new):
            self._skip(state)
            return
        state["updates"] = state.get("updates", 0) + 1
        keep, take = AVERAGES[group["variant"]](group["decay"])
        for name, vector in zip("HS", new, strict=True):
            old = state[name] if name in state else torch.ones_like(vector)
            state[name] = keep * old + take * minmax(vector)

    def _move(self, group: dict) -> None:
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is not None:
                alike.setdefault((param.device, _computed_in(param.dtype)), []).append(param)
        for (_, dtype), params in alike.items():
            self._move_alike(params, dtype, group)

    def _move_alike(self, params: list[Tensor], dtype: torch.dtype, group: dict) -> None:
        states = [self.state[param] for param in params]
        for state in states:
            state["step"] = state.get("step", 0) + 1
        written = [*params, *map(self._momentum_of, params)]
        wide = [_as(dtype, tensor) for tensor in written]
        layers = {id(param): layer for layer in self._layers for param in layer.params}
        vectors = [self._curvature(param, layers.get(id(param)), dtype, group) for param in params]
        rank_one_step_(
            wide[: len(params)], [_as(dtype, param.grad) for param in params], wide[len(params) :],
            [s for s, _ in vectors], [h for _, h in vectors],
            lr=group["lr"], momentum=group["beta"], damping=group["damping"],
            weight_decay=group["weight_decay"], decoupled=self._decoupled,
            momentum_weight=[1 - group["beta"] ** state["step"] for state in states],
        )  # fmt: skip
        for tensor, result in zip(written, wide, strict=True):
            if result is not tensor:
                tensor.copy_(result)

    def _curvature(
        self, param: Tensor, layer: Affine | Norm | None, dtype: torch.dtype, group: dict
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """s and h of F = s h^T + lambda; None: lambda everywhere."""
        state = self.state.get(layer.weight, {}) if layer else {}
        if "updates" not in state:
            return None, None
        h, s = state["H"], state["S"]
        if group["relative_damping"] is not None:
            h, s = over_mean(h), over_mean(s) * (group["damping"] / group["relative_damping"])
        if layer.bias is not None:
            h = h[-1:] if param is layer.bias else h[:-1]
        return _as(dtype, s), _as(dtype, h)


class AdaFisherW(AdaFisher):
    """AdaFisher with weight decay apart from the gradient, as in AdamW::

    M   <- beta M + (1 - beta) grad
    W   <- W - lr (1 / (1 - beta^t) M / F + weight_decay W)
    """

    _decoupled = True


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def minmax(vector: Tensor) -> Tensor:
    least, most = vector.aminmax()
    return (vector - least) / (most - least + EPSILON)


def over_mean(vector: Tensor) -> Tensor:
    """A vector of zeros is the limit of one whose entries are equal: that of a single entry, as its first ones fade."""
    mean = vector.mean()
    return torch.where(mean > 0, vector / mean, 1.0)
