"""A layer that cannot be stepped where it lies: copies of its tensors for one step, written back after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layers import Layer
from .sharding import local, local_gradient, own_part, whole_of
from .state import States
from .tasks import Tensors, tasks_of


class Copies:
    """What a copy is made for:

    - [W | b] as one matrix, where blocks run across both;
    - a zero gradient where one of the two has none: it keeps its values;
    - whole tensors of sharded ones whose mini-blocks straddle shards: every process steps all and keeps its own part.
    """

    def __init__(self, layer: Layer, states: States, stand_ins: Mapping[Tensor, Tensor]):
        """``stand_ins``: of parameters of low precision."""
        self._layer, self._states = layer, states
        params = layer.params
        self._weights = [stand_ins.get(param, param) for param in params]
        weights = self._taken(self._weights)
        momenta = self._taken([states[param]["momentum"] for param in params])
        squares = self._taken([states[param]["second_moment"] for param in params if "second_moment" in states[param]])
        self._copies = [self._copied(tensors) for tensors in (weights, momenta, squares)]
        grads = [self._gradient(*of_param) for of_param in zip(params, self._weights, weights, strict=True)]
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
            state = self._states[param]
            originals = (self._weights[i], state["momentum"], state.get("second_moment"))
            for original, of_params in zip(originals, parts, strict=True):
                if of_params:
                    _write(original, self._own(of_params[i], param))

    def _taken(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._take(*pair) for pair in zip(tensors, self._layer.params, strict=False)]

    def _take(self, tensor: Tensor, param: Tensor) -> Tensor:
        return whole_of(local(tensor), param) if self._layer.exchanged else local(tensor)

    def _gradient(self, param: Tensor, weight: Tensor, taken: Tensor) -> Tensor:
        if param.grad is None:
            return torch.zeros_like(taken)
        return self._take(local_gradient(weight), param)

    def _copied(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._layer.joined:
            return [_joined(tensors)] if tensors else []
        with_grads = zip(tensors, self._layer.params, strict=False)
        return [tensor if param.grad is not None else tensor.clone() for tensor, param in with_grads]

    def _split(self, copies: list[Tensor]) -> Sequence[Tensor]:
        return (copies[0][:, :-1], copies[0][:, -1]) if self._layer.joined and copies else copies

    def _own(self, copy: Tensor, param: Tensor) -> Tensor:
        return own_part(copy.contiguous(), param) if self._layer.exchanged else copy


def _write(to: Tensor, values: Tensor) -> None:
    to = local(to)
    if to is not values:
        to.copy_(values)


def _joined(weight_and_bias: Sequence[Tensor]) -> Tensor:
    weight, bias = weight_and_bias
    return torch.cat([weight, bias[:, None]], 1)
