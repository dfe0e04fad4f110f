"""One step's work on one layer: its tensors as mini-blocks, its state, and what the schedule says is due."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks

from .layers import Layer
from .partition import Blocks
from .schedule import intervals


@dataclass(slots=True)
class LayerTensors:
    """W, g, M and v of a layer as the views of its blocks take them: copies where a bias joins."""

    layer: Layer
    weight: Tensor
    grad: Tensor
    momentum: Tensor
    second_moment: Tensor | None

    @classmethod
    def of(cls, layer: Layer, states: dict, maximize: bool) -> LayerTensors:
        weight, bias = layer.weight, layer.bias
        state, bias_state = states[weight], {} if bias is None else states[bias]
        square = state.get("second_moment")
        if layer.as_is:
            return cls(layer, weight, -weight.grad if maximize else weight.grad, state["momentum"], square)
        grad = layer.matrix(_grad(weight), None if bias is None else _grad(bias))
        return cls(
            layer,
            layer.matrix(weight, bias),
            -grad if maximize else grad,
            layer.matrix(state["momentum"], bias_state.get("momentum")),
            None if square is None else layer.matrix(square, bias_state.get("second_moment")),
        )

    def write_back(self, states: dict) -> None:
        """Splits [W | b] again; a parameter without a gradient keeps its values."""
        if self.layer.bias is None:
            return
        for param, columns in ((self.layer.weight, slice(0, -1)), (self.layer.bias, -1)):
            if param.grad is None:
                continue
            param.copy_(self.weight[:, columns])
            states[param]["momentum"].copy_(self.momentum[:, columns])
            if self.second_moment is not None:
                states[param]["second_moment"].copy_(self.second_moment[:, columns])


def _grad(param: Tensor) -> Tensor:
    return param.grad if param.grad is not None else torch.zeros_like(param)


@dataclass(slots=True)
class Task:
    """The blocks of one kind of one layer, in one step."""

    blocks: Blocks
    tensors: LayerTensors
    state: dict
    update: bool  # F <- beta F + (1-beta) g g^T is due
    refactor: bool  # so is its factorisation
    cached: bool  # the factor outlives the step

    @classmethod
    def of(cls, blocks: Blocks, tensors: LayerTensors, state: dict, group: dict) -> Task:
        t1, t2 = intervals(blocks, group)
        if t1 == t2 == 1:
            return cls(blocks, tensors, state, update=True, refactor=True, cached=False)
        t = state["step"] - 1  # the paper counts from 0
        update = t % t1 == 0
        missing = t2 > 1 and "factor" + blocks.suffix not in state
        refactor = (t <= t2 and update) or t % t2 == 0 or missing
        return cls(blocks, tensors, state, update, refactor, cached=t2 > 1)

    @property
    def fisher(self) -> SymmetricBlocks:
        return self.state["fisher" + self.blocks.suffix]

    @property
    def factor(self) -> SymmetricBlocks | None:
        return self.state.get("factor" + self.blocks.suffix)

    @factor.setter
    def factor(self, value: SymmetricBlocks) -> None:
        self.state["factor" + self.blocks.suffix] = value

    def view(self, name: str) -> Tensor:
        """One of the layer's tensors, its trailing dimensions one mini-block."""
        return self.blocks.view(getattr(self.tensors, name))

    def flat(self, name: str) -> Tensor:
        """One of the layer's tensors as [S, R, n]."""
        return self.blocks.flat(getattr(self.tensors, name))
