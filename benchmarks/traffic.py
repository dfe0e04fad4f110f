"""What a training step sends between processes: the collective calls of its engine and of its optimizer.

Only shapes and dtypes count: tensors may be on the meta device, and the process group one that sends nothing.
Parameters are float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mbf_optim import MBF
from mbf_optim.layers import Layer, layers_of
from mbf_optim.sharding import local
from mbf_optim.state import needs_squares
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Adam, Optimizer

from mbf_kernels import SymmetricBlocks


@dataclass(frozen=True, order=True)
class Message:
    """A collective call. Its payload: the tensor that is summed, copied or gathered, whole."""

    collective: str  # "all_reduce", "all_gather", "reduce_scatter" or "broadcast"
    bytes: int


def sent(messages: Iterable[Message], processes: int) -> float:
    """Bytes that a process sends, in rings: the lower bounds of all collectives but the broadcast; there the mean."""
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
    return sum(passes[message.collective] * message.bytes for message in messages) * (processes - 1) / processes


def summed_gradients(params: Iterable[Tensor]) -> list[Message]:
    """DDP's, as one: it cuts them into buckets of 25 MiB."""
    return [Message("all_reduce", sum(param.nbytes for param in params))]


def updated_parameters(params: Iterable[Tensor]) -> list[Message]:
    """ZeroRedundancyOptimizer's."""
    return [Message("broadcast", param.nbytes) for param in params]


def scattered_gradients(model: FSDPModule, processes: int) -> list[Message]:
    """``fully_shard``'s."""
    return [Message("reduce_scatter", _padded_bytes(params, processes)) for _, params in _units(model)]


def gathered_parameters(model: FSDPModule, processes: int) -> list[Message]:
    """``fully_shard``'s: for the forward pass, and again for the backward pass but of what the root holds itself."""
    return [
        Message("all_gather", _padded_bytes(params, processes))
        for unit, params in _units(model)
        for _ in range(1 if unit is model else 2)
    ]


def _units(model: FSDPModule) -> Iterable[tuple[nn.Module, list[Tensor]]]:
    """Modules that are sharded as one, innermost first, with their parameters."""
    taken: set[Tensor] = set()
    for module in reversed(list(model.modules())):
        if isinstance(module, FSDPModule):
            params = [param for param in module.parameters() if param not in taken]
            taken.update(params)
            yield from [(module, params)] if params else []


def _padded_bytes(params: Iterable[Tensor], processes: int) -> int:
    """Of whole tensors, when every process has equally many rows."""
    rows = ((math.ceil(param.shape[0] / processes) * processes, param) for param in params)
    return sum(count * math.prod(param.shape[1:]) * param.dtype.itemsize for count, param in rows)


def optimizer_messages(optimizer: Optimizer, processes: int) -> list[Message]:
    """Of a step that updates all matrices."""
    if not isinstance(optimizer, MBF):
        return []
    groups = [(group, layers_of(group, 0, optimizer.state)) for group in optimizer.param_groups]
    exchanged = [(group, layer) for group, layers in groups for layer in layers if layer.exchanged]
    gathers = [message for group, layer in exchanged for message in _gathers(layer, group, processes)]
    sums: dict[tuple, int] = {}  # all matrices of a dtype that several processes average: one message
    for layer in (layer for _, layers in groups for layer in layers if layer.averaged_over):
        key = (layer.averaged_over, layer.dtype)
        size = sum(math.prod(blocks.packed_shape) for blocks in layer.blocks) * layer.dtype.itemsize
        sums[key] = sums.get(key, 0) + size
    return gathers + [Message("all_reduce", size) for size in sums.values()]


def _gathers(layer: Layer, group: dict, processes: int) -> list[Message]:
    """Whole tensors, where mini-blocks straddle shards: weight, momentum, gradient, and what else there is."""
    tensors = 3 + needs_squares(layer, group)
    return [Message("all_gather", _padded_bytes([param], processes)) for param in layer.params for _ in range(tensors)]


def state_bytes(optimizer: Optimizer) -> int:
    """On this process, with or without memory; Adam's before its first step too."""
    if isinstance(optimizer, Adam):
        params = [local(param) for group in optimizer.param_groups for param in group["params"]]
        return sum(2 * param.nbytes + 4 for param in params)
    entries = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local(value).nbytes for value in entries if isinstance(value, Tensor)) + sum(
        value.nbytes for value in entries if isinstance(value, SymmetricBlocks)
    )
