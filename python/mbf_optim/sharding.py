"""Parameters that lie on several processes: DTensors, of ``fully_shard``, HSDP and tensor parallelism."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whatever its placements."""
    module = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What of it is on this process; it shares memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it on every process; a collective where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gradient(param: Tensor) -> Tensor | None:
    """The parameter's, laid out on the processes as the parameter is: from now on, as its address is kept."""
    grad = param.grad
    if grad is None or not is_sharded(param):
        return grad
    if not is_sharded(grad):
        raise TypeError(f"MBF: expected the gradient of a DTensor to be one, got {type(grad).__name__}")
    if grad.placements != param.placements:
        param.grad = grad = grad.redistribute(param.device_mesh, param.placements)
    return grad


def local_gradient(param: Tensor) -> Tensor | None:
    grad = gradient(param)
    return None if grad is None else local(grad)


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor, of the shape of ``like``, is on this process."""
    if not is_sharded(like):
        return full
    return _replicated(full, like).redistribute(placements=like.placements).to_local()


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape of ``like``, sharded or whole, in the places of ``like``."""
    if not is_sharded(like):
        return whole(tensor)
    if not is_sharded(tensor):
        tensor = _replicated(tensor.to(like.device), like)
    return tensor.redistribute(like.device_mesh, like.placements)


def whole_of(here: Tensor, like: Tensor) -> Tensor:
    """All of a tensor of the shape of ``like``, of which ``here`` is what is on this process; a collective."""
    if not is_sharded(like):
        return here
    shape, stride = like.shape, like.stride()
    part = _dtensor().from_local(here, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return part.full_tensor()


def by_rows(rows: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor [O, ...] whose rows go with the outputs of ``like``, as the whole one."""
    if not is_sharded(like):
        return rows
    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return _dtensor().from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes of ``like`` have alike, as what it is."""
    return _replicated(tensor, like) if is_sharded(like) else tensor


def keeps_outputs_whole(params: Sequence[Tensor]) -> bool:
    """Whether each output's weights, and its bias, are on one process; of parameters some of which are sharded."""
    first = params[0]
    return all(
        is_sharded(param) and (param.device_mesh, param.placements) == (first.device_mesh, first.placements)
        for param in params
    ) and all(placement.is_replicate() or _splits_rows(placement) for placement in first.placements)


def shard_groups(param: Tensor) -> tuple[Any, ...]:
    """The process groups over whose sum a sum over the local outputs is one over all of them."""
    if not is_sharded(param):
        return ()
    dimensions = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    return tuple(param.device_mesh.get_group(i) for i in dimensions if param.device_mesh.size(i) > 1)


def check_whole(param: Tensor, name: str) -> None:
    """Raises TypeError for a parameter that has lost its shape: nobody could tell its mini-blocks."""
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"MBF: expected parameters in their own shapes, got {name} flattened by FullyShardedDataParallel; "
            "use torch.distributed.fsdp.fully_shard"
        )
    if is_sharded(param) and any(placement.is_partial() for placement in param.placements):
        raise TypeError(f"MBF: expected sharded or replicated parameters, got placements {param.placements} for {name}")


def _splits_rows(placement: Any) -> bool:
    return getattr(placement, "dim", None) == 0


def _replicated(tensor: Tensor, like: Tensor) -> Tensor:
    everywhere = [_module().Replicate()] * like.device_mesh.ndim
    return _dtensor().from_local(tensor, like.device_mesh, everywhere, run_check=False)


def _module() -> Any:
    return sys.modules["torch.distributed.tensor"]


def _dtensor() -> Any:
    return _module().DTensor
