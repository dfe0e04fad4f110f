"""What MBF steps as one: a parameter, or a weight with the bias that joins it, and its mini-blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .partition import Blocks, joins_bias, partition
from .schedule import intervals


@dataclass(frozen=True)
class Layer:
    name: str
    weight: Tensor
    bias: Tensor | None  # joins the weight as its last column
    blocks: list[Blocks]  # empty: the diagonal step

    @cached_property
    def params(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @cached_property
    def shared(self) -> bool:
        return any(blocks.shared for blocks in self.blocks)

    @cached_property
    def joined(self) -> bool:
        """Whether blocks need the weight and the bias as one matrix."""
        return any(blocks.bias == "column" for blocks in self.blocks)

    def steps_in_place(self) -> bool:
        """Whether the blocks are views of the parameters, all of which have gradients."""
        return not self.joined and all(param.grad is not None for param in self.params)

    def view(self, blocks: Blocks, tensor: Tensor) -> Tensor:
        """Mini-blocks of the weight, or of anything of its shape."""
        is_filter = blocks.structure == "filter"
        return blocks.view(tensor if is_filter or tensor.ndim == 2 else tensor.view(tensor.shape[:2]))

    def sharing(self, blocks: Blocks, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The mini-blocks of a weight and bias, or of their gradients, as [S, R, n]."""
        if blocks.bias == "column":
            weight = torch.cat([weight, bias[:, None]], 1)
        if blocks.bias != "last":
            return self.view(blocks, weight).reshape(blocks.sharing, blocks.count, blocks.size)
        elements = self.view(blocks, weight).reshape(blocks.sharing, 1, blocks.size - 1)
        return torch.cat([elements, bias[:, None, None]], 2)

    def has_grad(self) -> bool:
        """Whether any parameter has a gradient. Raises TypeError for one that is sparse."""
        grads = [param.grad for param in self.params if param.grad is not None]
        for grad in grads:
            if grad.layout != torch.strided:
                raise TypeError(f"MBF: expected dense gradients, got layout {grad.layout} for {self.name}")
        return bool(grads)


def layers_of(group: dict, index_of_first: int) -> list[Layer]:
    """The layers of a param group. Biases are known by name: "x.bias" joins "x.weight"."""
    params = group["params"]
    names = group.get("param_names") or [f"param {index_of_first + i}" for i in range(len(params))]
    by_name = dict(zip(names, params, strict=True))
    biases = {
        name: name.removesuffix("weight") + "bias"
        for name, param in by_name.items()
        if name.endswith("weight") and _is_bias(by_name.get(name.removesuffix("weight") + "bias"), param, group)
    }
    layers = []
    for name, param in by_name.items():
        if name in biases.values():
            continue
        bias = by_name[biases[name]] if name in biases else None
        layers.append(Layer(name, param, bias, _blocks(name, param, bias, group)))
    return layers


def _is_bias(bias: Tensor | None, weight: Tensor, group: dict) -> bool:
    if bias is None or bias.shape != weight.shape[:1]:
        return False
    grafted = group["graft"] is not None
    return joins_bias(weight.shape, blocks=group["blocks"], segment=group["segment"], grafted=grafted)


def _blocks(name: str, weight: Tensor, bias: Tensor | None, group: dict) -> list[Blocks]:
    try:
        parts = partition(
            weight.shape,
            blocks=group["blocks"],
            segment=group["segment"],
            grid=group["grid"],
            average=group["average"],
            grafted=group["graft"] is not None,
            bias=bias is not None,
        )
        for part in parts:
            intervals(part, group)
        return parts
    except ValueError as error:
        raise ValueError(f"{error} ({name}, shape {list(weight.shape)})") from None
