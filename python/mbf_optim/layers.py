"""What MBF steps as one: a parameter, or a weight with the bias that joins it, and its mini-blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks

from .partition import Blocks, joins_bias, partition
from .schedule import intervals

PARTITION = ("blocks", "segment", "grid", "average")  # the options that decide what a tensor's mini-blocks are


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

    def spread(self, of_matrices: Sequence[Tensor]) -> list[Tensor]:
        """Of the shapes of the parameters: to each mini-block that shares a matrix its [R, n], for all ``blocks``."""
        weight, *bias = map(torch.empty_like, self.params)
        to = torch.cat([weight, bias[0][:, None]], 1) if self.joined else weight
        for blocks, rows in zip(self.blocks, of_matrices, strict=True):
            if blocks.bias == "last":
                rows, last = rows[:, :-1], rows[:, -1]
                bias[0].copy_(last)
            view = self.view(blocks, to)
            view.copy_(rows.expand(blocks.sharing, *rows.shape).reshape(view.shape))
        return [to[:, :-1].clone(), to[:, -1].clone()] if self.joined else [to, *bias]

    def has_grad(self) -> bool:
        """Whether any parameter has a gradient. Raises TypeError for one that is sparse."""
        grads = [param.grad for param in self.params if param.grad is not None]
        for grad in grads:
            if grad.layout != torch.strided:
                raise TypeError(f"MBF: expected dense gradients, got layout {grad.layout} for {self.name}")
        return bool(grads)


def layers_of(group: dict, index_of_first: int, states: Mapping[Tensor, dict]) -> list[Layer]:
    """The layers of a param group. Biases are known by name: "x.bias" joins "x.weight".

    A tensor with state keeps the blocks that it was made for, whatever ``graft`` is now. Raises ValueError where they
    fit the other options no more.
    """
    params = group["params"]
    names = group.get("param_names") or [f"param {index_of_first + i}" for i in range(len(params))]
    by_name = dict(zip(names, params, strict=True))
    biases = {name: by_name.get(name.removesuffix("weight") + "bias") for name in names if name.endswith("weight")}
    of_weights = {name: _layer(name, by_name[name], bias, group, states) for name, bias in biases.items()}
    joined = {id(layer.bias) for layer in of_weights.values()}
    return [
        of_weights.get(name) or _layer(name, param, None, group, states)
        for name, param in by_name.items()
        if id(param) not in joined
    ]


def _layer(name: str, weight: Tensor, bias: Tensor | None, group: dict, states: Mapping[Tensor, dict]) -> Layer:
    """``bias``: one that joins where it can."""
    grafted = group["graft"] is not None
    try:
        layers = [_with_blocks(name, weight, bias, group, choice) for choice in (grafted, not grafted)]
        layer = next((layer for layer in layers if _fits(layer, states)), None)
        if layer is None:
            raise ValueError(
                "MBF: expected blocks, segment, grid and average as when the state was made, with matrices "
                f"{_held(states.get(weight, {}))} (count, size), got options that ask for {_needed(layers[0])}"
            )
        for blocks in layer.blocks:
            intervals(blocks, group)
    except ValueError as error:
        raise ValueError(f"{error} ({name}, shape {list(weight.shape)})") from None
    return layer


def _with_blocks(name: str, weight: Tensor, bias: Tensor | None, group: dict, grafted: bool) -> Layer:
    options = {"blocks": group["blocks"], "segment": group["segment"], "grafted": grafted}
    joins = bias is not None and bias.shape == weight.shape[:1] and joins_bias(weight.shape, **options)
    blocks = partition(weight.shape, grid=group["grid"], average=group["average"], bias=joins, **options)
    return Layer(name, weight, bias if joins else None, blocks)


def _fits(layer: Layer, states: Mapping[Tensor, dict]) -> bool:
    """Whether the state, where there is any, was made for the layer."""
    if layer.bias is not None and states.get(layer.bias, {}).keys() & {"step", "clock"}:  # it has stepped alone
        return False
    state = states.get(layer.weight)
    return not state or _held(state) == _needed(layer)


def _held(state: dict) -> dict[str, tuple[int, int]]:
    """Count and size of every F."""
    fishers = {name: value for name, value in state.items() if name.startswith("fisher")}
    return {name: (f.count, f.size) for name, f in fishers.items() if isinstance(f, SymmetricBlocks)}


def _needed(layer: Layer) -> dict[str, tuple[int, int]]:
    return {"fisher" + blocks.suffix: (blocks.count, blocks.size) for blocks in layer.blocks}
