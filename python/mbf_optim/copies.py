"""A layer that cannot be stepped where it lies: copies of its tensors for one step, written back after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layers import Layer
from .rounding import stochastically_rounded
from .sharding import gradient, local, own_part, whole
from .state import States
from .tasks import Tensors, tasks_of


class Copies:
    """What a copy is made for:

    - [W | b] as one matrix, where blocks run across both;
    - a zero gradient where one of the two has none: it keeps its values;
    - float32 of parameters of low precision, the masters where they are kept;
    - whole tensors of sharded ones whose mini-blocks straddle shards: every process steps all and keeps its own part.
    """

    def __init__(self, layer: Layer, states: States, group: dict, unscale: Tensor | None, seed: int):
        """``unscale``: what the gradients of parameters of low precision are multiplied by. ``seed``: of the rounding;
        the same on all processes."""
        self._layer, self._states, self._group, self._seed = layer, states, group, seed
        params = layer.params
        self._take: Callable[[Tensor], Tensor] = whole if layer.exchanged else local
        weights = [self._weight(param) for param in params]
        momenta = [self._take(states[param]["momentum"]) for param in params]
        squares = [self._take(states[param]["second_moment"]) for param in params if "second_moment" in states[param]]
        self._copies = [self._copied(tensors) for tensors in (weights, momenta, squares)]
        grads = [self._gradient(param, weight, unscale) for param, weight in zip(params, weights, strict=True)]
        copies, momenta, squares = self._copies
        for copy, grad in zip(copies, [_joined(grads)] if layer.joined else grads, strict=True):
            copy.grad = grad
        tensors = Tensors(tuple(copies), tuple(momenta), tuple(squares) or None, tuple(copies))
        self.tasks = tasks_of(layer, tensors, states[layer.weight])

    def write_back(self) -> None:
        parts = [self._split(tensors) for tensors in self._copies]
        for i, param in enumerate(self._layer.params):
            if param.grad is None:
                continue
            for name, of_params in zip(("momentum", "second_moment"), parts[1:], strict=True):
                if of_params:
                    _write(self._states[param][name], self._own(of_params[i], param))
            self._write_weight(param, self._own(parts[0][i], param))

    def _weight(self, param: Tensor) -> Tensor:
        """In the layer's dtype. A master gives way where the parameter has been given other values since."""
        if not self._layer.half:
            return self._take(param)
        rounded = self._take(param)
        if "master" not in self._states[param]:
            return rounded.to(self._layer.dtype)
        master = self._take(self._states[param]["master"])
        return torch.where(master.to(param.dtype) == rounded, master, rounded.to(self._layer.dtype))

    def _gradient(self, param: Tensor, weight: Tensor, unscale: Tensor | None) -> Tensor:
        if param.grad is None:
            return torch.zeros_like(weight)
        grad = self._take(gradient(param)).to(self._layer.dtype)
        return grad * unscale if self._layer.half and unscale is not None else grad

    def _copied(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._layer.joined:
            return [_joined(tensors)] if tensors else []
        with_grads = zip(tensors, self._layer.params, strict=False)
        return [tensor if param.grad is not None else tensor.clone() for tensor, param in with_grads]

    def _split(self, copies: list[Tensor]) -> Sequence[Tensor]:
        return (copies[0][:, :-1], copies[0][:, -1]) if self._layer.joined and copies else copies

    def _own(self, copy: Tensor, param: Tensor) -> Tensor:
        return own_part(copy.contiguous(), param) if self._layer.exchanged else copy

    def _write_weight(self, param: Tensor, values: Tensor) -> None:
        if "master" in self._states[param] and self._layer.half:
            _write(self._states[param]["master"], values)
        elif self._layer.half and self._group["stochastic_rounding"]:
            generator = torch.Generator(values.device).manual_seed(self._seed)
            values = stochastically_rounded(values, param.dtype, generator)
        _write(param, values)


def _write(to: Tensor, values: Tensor) -> None:
    to = local(to)
    if to is not values:
        to.copy_(values)


def _joined(weight_and_bias: Sequence[Tensor]) -> Tensor:
    weight, bias = weight_and_bias
    return torch.cat([weight, bias[:, None]], 1)
