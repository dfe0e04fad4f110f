"""What the optimizers that look at layers have in common: all but their curvature.

A step: statistics of the layers where they are due; a direction for every layer that has statistics, and for every
other tensor its gradient; the KL clip; weight decay and momentum as in SGD.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .affine import Affine, Rows, affine_layers
from .capture import Capture, hook
from .report import Report, Row
from .sampling import Residual, residual_of

EARLY = 20  # steps in which every update of the statistics is followed at once (Ren & Goldfarb's K-FAC)


class LayerwiseOptimizer(Optimizer):
    """The methods below the line are what makes a method; they find the layer's state in ``self.state[layer.weight]``.

    Args:
        model: whose layers are looked at. Weights that are not those of a known layer step along their gradient.
        defaults: the options of every param group, among them lr, momentum, weight_decay, kl_clip, update_interval and
            factor_interval.
        groups: param groups of parameters of the model; None: one of all.
        distribution: None: the statistics are those of the loss, the empirical Fisher matrix. "categorical" (over the
            last dimension), "bernoulli" or "gaussian": of targets drawn from the outputs, the Fisher matrix; a second
            backward pass inside the model's forward, where statistics are due. Or a function of the outputs, the
            gradient of -log p(y | outputs) for drawn y, of every sample alone.
        mean_loss: whether the loss is a mean over the samples of all that is accumulated, or their sum.
        grad_scaler: what scales the loss under autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        groups: Iterable[dict] | None,
        distribution: str | Residual | None,
        mean_loss: bool,
        grad_scaler: torch.amp.GradScaler | None,
    ):
        self._title = type(self).__name__
        self._residual = None if distribution is None else residual_of(self._title, distribution)
        self._mean_loss, self._grad_scaler = mean_loss, grad_scaler
        super().__init__([{"params": list(model.parameters())}] if groups is None else groups, defaults | {"step": 0})
        group_of = {id(param): i for i, group in enumerate(self.param_groups) for param in group["params"]}
        self._layers = [
            layer for layer in affine_layers(model) if len({group_of.get(id(p)) for p in layer.params} - {None}) == 1
        ]
        self._model = model
        self._capture = Capture(model, [layer.module for layer in self._layers])
        self._capture.recording = self._residual is None
        if self._residual is not None:
            hook(self, model.register_forward_hook, self._draw)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._capture.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {id(layer): group for group, layer in self._grouped()}
        stepping = [layer for layer in self._layers if all(param.grad is not None for param in layer.params)]
        self._update_statistics(stepping, groups)
        directions = self._directions(stepping, groups)
        for group in self.param_groups:
            self._move(group, directions)
            group["step"] += 1
        self._capture.active = any(self._due(group, "update_interval") for group in self.param_groups)
        return loss

    def report(self) -> Report:
        """A row for every tensor (a bias that joins its weight in the weight's): its structure and bytes of state.
        "gradient": no layer that is known; or one that has been stepped without having been seen in training."""
        names = {id(param): name for name, param in self._model.named_parameters()}
        layers = {id(layer.weight): layer for layer in self._layers}
        joined = {id(layer.bias) for layer in self._layers if layer.bias is not None}
        return Report(
            self._row(group, param, names.get(id(param), "not in the model"), layers.get(id(param)))
            for group in self.param_groups
            for param in group["params"]
            if id(param) not in joined
        )

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but statistics keep their own dtypes."""
        super().load_state_dict(state_dict)
        saved_params = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved_params, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[param][name].dtype:
                    self.state[param][name] = value.to(param.device, copy=True)

    def __getstate__(self) -> dict:
        raise TypeError(f"{self._title}: cannot be copied or pickled, it hangs on a model's modules; save state_dict()")

    # ------------------------------------------------------------------ what makes a method

    @abstractmethod
    def _check(self, options: dict) -> None:
        """Raises ValueError or TypeError for an option out of its range."""

    @abstractmethod
    def _observe(self, layer: Affine, rows: Rows, state: dict, group: dict) -> None:
        """Updates the layer's statistics, and counts in state["updates"] or, where they are not finite,
        state["skipped"]."""

    @abstractmethod
    def _refresh(self, layers: list[Affine], groups: dict[int, dict]) -> None:
        """Makes of the statistics of layers what their directions need."""

    @abstractmethod
    def _direction(self, layer: Affine, gradient: Tensor, group: dict) -> Tensor | None:
        """Of a gradient [groups, q, p]; None where there are no statistics yet."""

    @abstractmethod
    def _structure(self, layer: Affine) -> str:
        """In words, for the report."""

    # ------------------------------------------------------------------ the step

    def _grouped(self) -> Iterable[tuple[dict, Affine]]:
        group_of = {id(param): group for group in self.param_groups for param in group["params"]}
        return ((group_of[id(layer.weight)], layer) for layer in self._layers)

    @staticmethod
    def _due(group: dict, interval: str) -> bool:
        return group["step"] % group[interval] == 0

    def _update_statistics(self, layers: list[Affine], groups: dict[int, dict]) -> None:
        changed = []
        for layer in layers:
            group, uses = groups[id(layer)], self._capture.uses(layer.module)
            if uses and self._due(group, "update_interval"):
                rows = layer.rows(uses, self._mean_loss and self._residual is None)
                self._observe(layer, self._unscaled(rows), self.state[layer.weight], group)
                changed.append(layer)
                uses.clear()
        self._capture.clear()
        refreshed = [
            layer
            for layer in layers
            if self._due(groups[id(layer)], "factor_interval")
            or (layer in changed and groups[id(layer)]["step"] <= EARLY)
        ]
        self._refresh([layer for layer in refreshed if layer.weight in self.state], groups)

    def _unscaled(self, rows: Rows) -> Rows:
        if self._grad_scaler is None or self._residual is not None:
            return rows
        return rows._replace(gradients=rows.gradients / self._grad_scaler.get_scale())

    def _directions(self, layers: list[Affine], groups: dict[int, dict]) -> dict[int, Tensor]:
        """By parameter, clipped."""
        found: dict[int, Tensor] = {}
        products: list[Tensor] = []
        for layer in layers:
            gradient = layer.joined(*[param.grad for param in layer.params])
            direction = self._direction(layer, gradient, groups[id(layer)])
            if direction is not None:
                products.append((direction * gradient).sum() * groups[id(layer)]["lr"] ** 2)
                found |= dict(zip(map(id, layer.params), layer.split(direction), strict=True))
        if products:
            total = torch.stack(products).sum()
            for group in self.param_groups:
                if group["kl_clip"] is not None:
                    factor = (group["kl_clip"] / total.abs()).sqrt().clamp(max=1.0)
                    for param in group["params"]:
                        if id(param) in found:
                            found[id(param)] = found[id(param)] * factor
        return found

    def _move(self, group: dict, directions: dict[int, Tensor]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        for param in params:
            if param.grad.layout != torch.strided:
                raise TypeError(f"{self._title}: expected dense gradients, got layout {param.grad.layout}")
        moves = [directions.get(id(param), param.grad) for param in params]
        if group["weight_decay"]:
            moves = torch._foreach_add(moves, params, alpha=group["weight_decay"])
        if group["momentum"]:
            for param in params:
                if "momentum_buffer" not in self.state[param]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            buffers = [self.state[param]["momentum_buffer"] for param in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, moves)
            moves = buffers
        torch._foreach_add_(params, moves, alpha=-group["lr"])

    def _row(self, group: dict, param: Tensor, name: str, layer: Affine | None) -> Row:
        state = self.state[param] if param in self.state else {}
        seen = layer is not None and ("updates" in state or group["step"] == 0)
        params = layer.params if layer else [param]
        states = [self.state[p] for p in params if p in self.state]
        return Row(
            name=name + (" + bias" if len(params) > 1 else ""),
            shape=tuple(param.shape),
            structure=self._structure(layer) if seen else "gradient",
            count=2 * layer.groups if seen else 0,
            size=max(layer.shape[1:]) if seen else 0,
            bytes=sum(value.nbytes for s in states for value in s.values() if isinstance(value, Tensor)),
            skipped=state.get("skipped", 0),
        )

    def _draw(self, module: nn.Module, args: tuple, outputs: Tensor) -> None:
        """The backward pass of drawn targets, from the model's forward hook."""
        if not (self._capture.active and module.training and torch.is_grad_enabled() and outputs.requires_grad):
            return
        weights = [layer.weight for layer in self._layers if layer.weight.requires_grad]
        with torch.no_grad():
            residual = self._residual(outputs.detach())
        with self._capture.only(True):
            torch.autograd.grad(outputs, weights, residual, retain_graph=True, allow_unused=True)


def check_range(title: str, options: dict) -> None:
    """What all methods share. Raises ValueError or TypeError naming the option."""
    for name in ("lr", "weight_decay"):
        number(title, name, options[name], 0, math.inf)
    number(title, "momentum", options["momentum"], 0, 1)
    if options["kl_clip"] is not None:
        number(title, "kl_clip", options["kl_clip"], 0, math.inf)
    for name in ("update_interval", "factor_interval"):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{title}: expected {name} to be an integer >= 1, got {value!r}")


def number(title: str, name: str, value: object, least: float, below: float) -> None:
    """Raises for what is not in [least, below)."""
    try:
        good = least <= float(value) < below
    except (TypeError, ValueError):
        raise TypeError(f"{title}: expected {name} to be a number, got {value!r}") from None
    if not good:
        raise ValueError(f"{title}: expected {name} in [{least}, {below}), got {value!r}")
