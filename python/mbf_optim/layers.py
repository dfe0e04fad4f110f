"""What MBF steps as one: a parameter, or a weight with the bias that joins it, and its mini-blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mbf_kernels import SymmetricBlocks

from .partition import Blocks, joins_bias, partition
from .schedule import intervals
from .sharding import check_whole, is_sharded, keeps_outputs_whole, local, shard_groups

PARTITION = ("blocks", "segment", "grid", "average")  # the options that decide what a tensor's mini-blocks are
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


@dataclass(frozen=True)
class Layer:
    name: str
    weight: Tensor
    bias: Tensor | None  # joins the weight as its last column
    blocks: list[Blocks]  # empty: the diagonal step. Of what is stepped here: a shard, or a whole tensor
    exchanged: bool = False  # mini-blocks straddle shards: a step gathers whole tensors

    @cached_property
    def params(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def dtype(self) -> torch.dtype:
        """That steps compute in, and the state has. Not kept, for ``model.to`` may change the weight's."""
        return torch.float32 if self.weight.dtype in HALF else self.weight.dtype

    @property
    def half(self) -> bool:
        return self.weight.dtype in HALF

    @cached_property
    def shared(self) -> bool:
        return any(blocks.shared for blocks in self.blocks)

    @cached_property
    def joined(self) -> bool:
        """Whether blocks need the weight and the bias as one matrix."""
        return any(blocks.bias == "column" for blocks in self.blocks)

    @cached_property
    def averaged_over(self) -> tuple:
        """The process groups over which shared matrices are averaged."""
        return shard_groups(self.weight) if self.shared and not self.exchanged else ()

    def everywhere(self, shared: bool) -> bool:
        """Whether all processes have the same matrices, of those that are shared or not."""
        return shared or self.exchanged or not is_sharded(self.weight)

    def saved_shapes(self, blocks: Blocks) -> tuple[tuple[int, ...], ...]:
        """Of matrices in checkpoints, all processes' together; and in those of version 0.1, a row for every matrix."""
        shape = blocks.packed_shape
        if not self.everywhere(blocks.shared):
            shape = (self.weight.shape[0], *shape[1:])
        return shape, (math.prod(shape[:-1]), shape[-1])

    def steps_in_place(self) -> bool:
        """Whether the blocks are views of the parameters as they lie here, all of which have gradients."""
        return not (self.joined or self.exchanged) and all(param.grad is not None for param in self.params)

    def view(self, blocks: Blocks, tensor: Tensor) -> Tensor:
        """Mini-blocks of the weight, or of anything of its shape."""
        is_filter = blocks.structure == "filter"
        return blocks.view(tensor if is_filter or tensor.ndim == 2 else tensor.view(tensor.shape[:2]))

    def spread(self, of_matrices: Sequence[Tensor], to: Sequence[Tensor]) -> list[Tensor]:
        """To each mini-block that shares a matrix its [R, n], for all ``blocks``; of the shapes of ``to``."""
        weight, *bias = map(torch.empty_like, to)
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

    A tensor that is there under several names is stepped once, as the first. One that has been stepped keeps the blocks
    that it was stepped with, whatever ``graft`` is now. Raises ValueError where they fit the other options no more,
    TypeError for a parameter that cannot be stepped.
    """
    params = group["params"]
    names = group.get("param_names") or [f"param {index_of_first + i}" for i in range(len(params))]
    if len(names) != len(params):  # somebody has replaced them, as DeepSpeed does by one flat tensor
        raise ValueError(f"MBF: expected a name for every parameter of a group, got {len(names)} for {len(params)}")
    first_names = {id(param): name for name, param in reversed(list(zip(names, params, strict=True)))}
    by_name = {name: param for name, param in zip(names, params, strict=True) if first_names[id(param)] == name}
    biases = {name: by_name.get(name.removesuffix("weight") + "bias") for name in by_name if name.endswith("weight")}
    of_weights = {name: _layer(name, by_name[name], bias, group, states) for name, bias in biases.items()}
    joined = {id(layer.bias) for layer in of_weights.values()}
    return [
        of_weights.get(name) or _layer(name, param, None, group, states)
        for name, param in by_name.items()
        if id(param) not in joined
    ]


def _layer(name: str, weight: Tensor, bias: Tensor | None, group: dict, states: Mapping[Tensor, dict]) -> Layer:
    """``bias``: one that joins where it can."""
    check_dtype(name, weight)
    check_whole(weight, name)
    grafted = group["graft"] is not None
    try:
        # As the options ask for; or as they did, or without the bias, when the state was made.
        choices = [(choice, joining) for joining in _joining(weight, bias, states) for choice in (grafted, not grafted)]
        layers = (_with_blocks(name, weight, joining, group, choice) for choice, joining in choices)
        first = next(layers)
        layer = next((layer for layer in chain([first], layers) if fits(layer, states)), None)
        if layer is None:
            held = [list(_packed(value)) for value in fishers(states.get(weight, {})).values()]
            asked = [list(blocks.packed_shape) for blocks in first.blocks]
            raise ValueError(
                "MBF: expected blocks, segment, grid and average as when the state was made, with packed matrices "
                f"{held}, got options that ask for {asked}"
            )
        for blocks in layer.blocks:
            intervals(blocks, group)
    except ValueError as error:
        raise ValueError(f"{error} ({name}, shape {list(weight.shape)})") from None
    return layer


def check_dtype(name: str, param: Tensor) -> None:
    if isinstance(param, torch.nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"MBF: expected parameters with shapes, got {name} of a lazy module; run the model once first")
    if is_traceable_wrapper_subclass(local(param)):
        raise TypeError(
            f"MBF: expected plain tensors or DTensors of them, got {type(local(param)).__name__} for {name}"
        )
    if param.dtype not in DTYPES:
        known = "float32, float64, bfloat16 or float16"
        raise TypeError(f"MBF: expected {known} parameters, got {param.dtype} for {name}")


def _with_blocks(name: str, weight: Tensor, bias: Tensor | None, group: dict, grafted: bool) -> Layer:
    shape = weight.shape
    options = {"blocks": group["blocks"], "segment": group["segment"], "grafted": grafted}
    joins = bias is not None and joins_bias(shape, **options)
    options |= {"grid": group["grid"], "average": group["average"], "bias": joins}
    layer = Layer(name, weight, bias if joins else None, partition(shape, **options))
    if not layer.blocks or not any(map(is_sharded, layer.params)):
        return layer
    if not (keeps_outputs_whole(layer.params) and all(blocks.within_output for blocks in layer.blocks)):
        return replace(layer, exchanged=True)
    with torch.no_grad():
        return replace(layer, blocks=partition(shape, outputs=local(weight).shape[0], **options))


def _joining(weight: Tensor, bias: Tensor | None, states: Mapping[Tensor, dict]) -> list[Tensor | None]:
    """The bias and none, the better one first. It stays with the weight, or alone, as when its state was made. At first
    one that is trained does not join a weight that is frozen: checkpoints of several processes would leave it out."""
    alike = bias is not None and bias.shape == weight.shape[:1]
    if not alike or (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return [None]
    alone = not weight.requires_grad and bias.requires_grad
    if state := states.get(bias):
        alone = steps_alone(state)
    return [None, bias] if alone else [bias, None]


def fits(layer: Layer, states: Mapping[Tensor, dict]) -> bool:
    """Whether the state, where there is any, was made for the layer."""
    if layer.bias is not None and steps_alone(states.get(layer.bias, {})):
        return False
    state = states.get(layer.weight, {})
    return not used(state) or "momentum" not in state or has_matrices(layer, state)  # without it, somebody else's


def steps_alone(state: dict) -> bool:
    """Of a bias."""
    return "step" in state or "clock" in state


def used(state: dict) -> bool:
    """Whether it is more than what a new optimizer makes; of what joins a weight, the weight's says so."""
    return "clock" in state or bool(state.get("step")) or bool(state.get("observed"))


def has_matrices(layer: Layer, state: dict) -> bool:
    """Whether they are those of the layer, at work or as checkpoints hold them."""
    needed = {"fisher" + blocks.suffix: blocks for blocks in layer.blocks}
    found = fishers(state)
    return found.keys() == needed.keys() and all(
        (value.count, value.size) == (needed[name].count, needed[name].size)
        if isinstance(value, SymmetricBlocks)
        else tuple(value.shape) in layer.saved_shapes(needed[name])
        for name, value in found.items()
    )


def _packed(value: SymmetricBlocks | Tensor) -> torch.Size:
    return (value.to_packed() if isinstance(value, SymmetricBlocks) else value).shape


def fishers(state: dict) -> dict[str, SymmetricBlocks | Tensor]:
    return {name: value for name, value in state.items() if name.startswith("fisher") and name != "fisher_weight"}
