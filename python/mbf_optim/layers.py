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

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The tensor that the views of ``blocks`` take: the weight as it is where no bias joins, else a copy of
        [W | b]."""
        if self.as_is:
            return weight
        if weight.ndim > 2:
            weight = weight.view(weight.shape[:2])
        return weight if self.bias is None else torch.cat([weight, bias[:, None]], 1)

    @cached_property
    def as_is(self) -> bool:
        """Whether the views of ``blocks`` take the weight itself: no bias joins, no 1x1 taps to drop."""
        is_filter = not self.blocks or self.blocks[0].structure == "filter"
        return self.bias is None and (is_filter or self.weight.ndim == 2)


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
    return bias is not None and joins_bias(weight.shape, group["blocks"]) and bias.shape == weight.shape[:1]


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
