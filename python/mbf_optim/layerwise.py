"""What the optimizers that look at layers have in common: all but their curvature.

A step: statistics of the layers where they are due; a direction for every layer that has statistics, and for every
other tensor its gradient; the KL clip; weight decay and momentum as in SGD.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .affine import Affine, Rows, affine_layers
from .capture import hook
from .model_optimizer import ModelOptimizer, flag, scaler
from .replicas import Seen, Share
from .sampling import Residual, drawn, residual_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EARLY = 20  # steps in which every update of the statistics is followed at once (Ren & Goldfarb's K-FAC)


class LayerwiseOptimizer(ModelOptimizer):
    """The methods below the line are what makes a method. A bias that joins a weight may be in another group: curvature
    goes by the options of the weight's.

    Args:
        model, groups, process_group: see ModelOptimizer. Linear and convolutional layers are looked at; what else there
            is steps along its gradient.
        defaults: the options of every param group, among them lr, momentum, weight_decay, kl_clip, update_interval and
            factor_interval.
        distribution: None: the statistics are those of the loss, the empirical Fisher matrix. "categorical" (over the
            last dimension), "bernoulli" or "gaussian": of targets drawn from the outputs, the Fisher matrix; a second
            backward pass inside the model's forward, where statistics are due. Or a function of the outputs: the
            gradient of -log p(y | outputs) for drawn y, of every sample alone; of a model that returns a tuple or a
            dictionary such a one, with None for what nothing is drawn from.
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
        process_group: ProcessGroup | None,
    ):
        super().__init__(model, defaults, groups, process_group)
        flag(self._title, "mean_loss", mean_loss)
        scaler(self._title, grad_scaler)
        self._residual = None if distribution is None else residual_of(self._title, distribution)
        self._mean_loss, self._grad_scaler = mean_loss, grad_scaler
        self._capture.recording = self._residual is None
        if self._residual is not None:
            hook(self, model.register_forward_hook, self._draw)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = self._evaluated(closure)
        groups = {id(layer): self._group(layer) for layer in self._layers}
        stepping = [layer for layer in self._layers if all(param.grad is not None for param in layer.params)]
        self._update_statistics(stepping, groups)
        directions = self._directions(stepping, groups)
        for group in self.param_groups:
            self._move(group, directions)
            group["step"] += 1
        return loss

    # ------------------------------------------------------------------ what makes a method

    @abstractmethod
    def _measured(self, layer: Affine, rows: Rows, share: Share, group: dict) -> Seen:
        """Of this process's rows, which may be none, what the statistics are made of."""

    @abstractmethod
    def _observe(self, layer: Affine, seen: Seen, state: dict, group: dict) -> None:
        """Updates the layer's statistics, and counts in state["updates"] or, where they are not finite,
        state["skipped"]."""

    @abstractmethod
    def _refresh(self, layers: list[Affine], groups: dict[int, dict]) -> None:
        """Makes of the statistics of layers what their directions need."""

    @abstractmethod
    def _direction(self, layer: Affine, gradient: Tensor, group: dict) -> Tensor | None:
        """Of a gradient [groups, q, p]; None where there are no statistics yet."""

    # ------------------------------------------------------------------ the step

    def _update_statistics(self, layers: list[Affine], groups: dict[int, dict]) -> None:
        changed = []
        self._capture.drop_unanswered()
        for layer, seen in self._replicas.totals(self._seen(layers, groups)):
            self._observe(layer, seen, self.state[layer.weight], groups[id(layer)])
            changed.append(layer)
        self._capture.clear()
        refreshed = [
            layer
            for layer in layers
            if self._due(groups[id(layer)], "factor_interval")
            or (layer in changed and self._early(self.state[layer.weight], groups[id(layer)]))
        ]
        self._refresh([layer for layer in refreshed if layer.weight in self.state], groups)

    def _seen(self, layers: list[Affine], groups: dict[int, dict]) -> Iterator[tuple[Affine, Seen]]:
        """One layer after another, as rows are large."""
        for layer, share in self._shares(layers).items():
            rows = self._unscaled(layer.rows(share.uses, self._mean_loss and self._residual is None))
            yield layer, self._measured(layer, rows.padded(share.most), share, groups[id(layer)])
            self._capture.forget(layer.module)

    @staticmethod
    def _early(state: dict, group: dict) -> bool:
        """Whether an update is followed at once."""
        return group["step"] <= EARLY or state.get("updates") == 1

    def _unscaled(self, rows: Rows) -> Rows:
        if self._grad_scaler is None or self._residual is not None:
            return rows
        return rows._replace(gradients=rows.gradients / self._grad_scaler.get_scale())

    def _directions(self, layers: list[Affine], groups: dict[int, dict]) -> dict[int, Tensor]:
        """By parameter, clipped."""
        gradients = {layer: layer.joined(*[param.grad for param in layer.params]) for layer in layers}
        found = {layer: self._direction(layer, gradient, groups[id(layer)]) for layer, gradient in gradients.items()}
        found = {layer: direction for layer, direction in found.items() if direction is not None}
        found = self._coupled({layer: gradients[layer] for layer in found}, found, groups)
        clips = self._clips(gradients, found, groups)
        found |= {layer: direction * clips[id(layer)] for layer, direction in found.items() if id(layer) in clips}
        return {
            id(param): part
            for layer, direction in found.items()
            for param, part in zip(layer.params, layer.split(direction), strict=True)
        }

    def _coupled(
        self, gradients: dict[Affine, Tensor], directions: dict[Affine, Tensor], groups: dict[int, dict]
    ) -> dict[Affine, Tensor]:
        """The directions once layers have been looked at together: as they are, but for methods that do."""
        return directions

    def _clips(
        self, gradients: dict[Affine, Tensor], directions: dict[Affine, Tensor], groups: dict[int, dict]
    ) -> dict[int, Tensor]:
        """nu, by layer with a clip. What is not finite in a layer is left to that layer."""
        products = [(u * gradients[layer]).sum() * groups[id(layer)]["lr"] ** 2 for layer, u in directions.items()]
        if not products:
            return {}
        total = torch.stack([torch.where(product.isfinite(), product, 0.0) for product in products]).sum().abs()
        kappas = {id(layer): groups[id(layer)]["kl_clip"] for layer in directions}
        return {key: (kappa / total).sqrt().clamp(max=1.0) for key, kappa in kappas.items() if kappa is not None}

    def _move(self, group: dict, directions: dict[int, Tensor]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        moves = [directions.get(id(param), param.grad) for param in params]
        if group["weight_decay"]:
            moves = torch._foreach_add(moves, params, alpha=group["weight_decay"])
        if group["momentum"]:
            buffers = [self._momentum_of(param) for param in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, moves)
            moves = buffers
        torch._foreach_add_(params, moves, alpha=-group["lr"])

    def _draw(self, module: nn.Module, args: tuple, outputs: object) -> None:
        """The backward pass of drawn targets, from the model's forward hook."""
        called = [self._layer_of[module] for module in self._capture.called]
        layers = [layer for layer in called if layer.weight.requires_grad]
        if not (layers and module.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            pairs = drawn(self._title, self._residual, outputs)
        if not pairs:
            return
        reached, residuals = zip(*pairs, strict=True)
        with self._capture.before_loss(reached):
            weights = [layer.weight for layer in layers]
            found = torch.autograd.grad(reached, weights, residuals, retain_graph=True, allow_unused=True)
        for layer, gradient in zip(layers, found, strict=True):
            if gradient is None:  # it waits until statistics are due again
                self._left_out.add(layer)

    def _awaited(self, state: dict) -> bool:
        return super()._awaited(state) and (self._residual is None or "skipped" not in state)

    def _has_momentum(self, group: dict) -> bool:
        return bool(group["momentum"])

    def _known_layers(self, trained: Container[int] | None) -> list[Affine]:
        return affine_layers(self._model, trained)
