"""An optimizer that looks at a model's layers: what it needs beside its steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .affine import ModuleLayer
from .capture import Capture
from .report import Report, Row


class ModelOptimizer(Optimizer):
    """A subclass sets ``_layers``, each with ``module``, ``weight``, ``bias`` or None and ``params``, and ``_capture``
    of their modules. Statistics of a layer are in ``self.state[layer.weight]``, with the number of their "updates" and
    of those "skipped". Every group counts its steps in "step".

    Args:
        model: its parameters are stepped.
        defaults: the options of every param group.
        groups: param groups of parameters of the model; None: one of all.
    """

    _layers: list[ModuleLayer]
    _capture: Capture

    def __init__(self, model: nn.Module, defaults: dict[str, Any], groups: Iterable[dict] | None):
        self._title, self._model = type(self).__name__, model
        super().__init__([{"params": list(model.parameters())}] if groups is None else groups, defaults | {"step": 0})

    @abstractmethod
    def _check(self, options: dict) -> None:
        """Raises ValueError or TypeError for an option out of its range."""

    @abstractmethod
    def _structure(self, layer: ModuleLayer) -> tuple[str, int, int]:
        """For the report: in words, the number of matrices and the size of the largest."""

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._capture.restart()

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

    def _group_of(self) -> dict[int, dict]:
        """By parameter."""
        return {id(param): group for group in self.param_groups for param in group["params"]}

    @staticmethod
    def _due(group: dict, interval: str) -> bool:
        return group["step"] % group[interval] == 0

    def _evaluated(self, closure: Callable[[], float] | None) -> float | None:
        """The closure's loss, if there is one, with gradients that are dense from here on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        return loss

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise TypeError(f"{self._title}: expected dense gradients, got layout {param.grad.layout}")

    def _row(self, group: dict, param: Tensor, name: str, layer: ModuleLayer | None) -> Row:
        state = self.state.get(param, {})
        seen = layer is not None and ("updates" in state or group["step"] == 0)
        params = layer.params if layer else [param]
        states = [self.state[p] for p in params if p in self.state]
        structure, count, size = self._structure(layer) if seen else ("gradient", 0, 0)
        return Row(
            name=name + (" + bias" if len(params) > 1 else ""),
            shape=tuple(param.shape),
            structure=structure,
            count=count,
            size=size,
            bytes=sum(value.nbytes for s in states for value in s.values() if isinstance(value, Tensor)),
            skipped=state.get("skipped", 0),
        )


def check_range(title: str, options: dict) -> None:
    """What all methods share. Raises ValueError or TypeError naming the option."""
    for name in ("lr", "weight_decay"):
        number(title, name, options[name], 0, math.inf)
    number(title, "momentum", options["momentum"], 0, 1)
    if options["kl_clip"] is not None:
        number(title, "kl_clip", options["kl_clip"], 0, math.inf)
    for name in ("update_interval", "factor_interval"):
        count(title, name, options[name])


def number(title: str, name: str, value: object, least: float, below: float) -> None:
    """Raises for what is not in [least, below)."""
    try:
        good = least <= float(value) < below
    except (TypeError, ValueError):
        raise TypeError(f"{title}: expected {name} to be a number, got {value!r}") from None
    if not good:
        raise ValueError(f"{title}: expected {name} in [{least}, {below}), got {value!r}")


def positive(title: str, name: str, value: object) -> None:
    """Raises for what is not in (0, inf)."""
    number(title, name, value, 0, math.inf)
    if value == 0:
        raise ValueError(f"{title}: expected {name} > 0, got {value!r}")


def count(title: str, name: str, value: object) -> None:
    """Raises for what is not an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{title}: expected {name} to be an integer >= 1, got {value!r}")
