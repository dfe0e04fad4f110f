"""One step's work on one layer: its tensors as mini-blocks, its state, and what the schedule says is due."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mbf_kernels import SymmetricBlocks

from .layers import Layer
from .partition import Blocks

FRESH_SIZE = 128  # up to here a shared F is updated and factored at every step, unless told otherwise
LAZY_INTERVALS = (10, 100)  # T1 and T2 of the paper's image problems, for larger shared matrices


@dataclass
class LayerTensors:
    """W, g, M and v of a layer as the views of its blocks take them: copies where a bias joins."""

    layer: Layer
    weight: Tensor
    grad: Tensor
    momentum: Tensor
    second_moment: Tensor | None

    @classmethod
    def of(cls, layer: Layer, states: dict, maximize: bool) -> LayerTensors:
        def joined(tensors: list[Tensor]) -> Tensor:
            return layer.matrix(*tensors, *[None] * (2 - len(tensors)))

        grads = [param.grad if param.grad is not None else param.new_zeros(param.shape) for param in layer.params]
        squares = [states[param].get("second_moment") for param in layer.params]
        grad = joined(grads)
        return cls(
            layer,
            joined(layer.params),
            -grad if maximize else grad,
            joined([states[param]["momentum"] for param in layer.params]),
            joined(squares) if squares[0] is not None else None,
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


@dataclass
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
        t = state["step"] - 1  # the paper counts from 0
        default = LAZY_INTERVALS if blocks.shared and blocks.size > FRESH_SIZE else (1, 1)
        t1 = group["update_interval"] or default[0]
        t2 = group["factor_interval"] or default[1]
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

    def fisher_weight(self, decay: float) -> float:
        """1 - beta^k after k updates, this step's included: the sum of the weights in F."""
        weight = self.state["fisher_weight"]
        return decay * weight + (1 - decay) if self.update else weight
