"""Argument checks of the ops. Every message names the op, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import DTYPES, SymmetricBlocks, check_storage


def blocks(op: str, name: str, value: object) -> None:
    if not isinstance(value, SymmetricBlocks):
        raise TypeError(f"{op}: expected {name} to be SymmetricBlocks, got {type(value).__name__}")


def storage(op: str, data: Tensor, count: int, size: int) -> None:
    check_storage(op, data, count, size)


def tensors(op: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}")


def tensor_lists(op: str, **lists: Sequence) -> None:
    for name, items in lists.items():
        if not isinstance(items, list | tuple):
            raise TypeError(f"{op}: expected {name} to be a list of tensors, got {type(items).__name__}")
        tensors(op, **{f"{name}[{i}]": item for i, item in enumerate(items)})


def no_grad(op: str, *tensors: Tensor) -> None:
    """The ops are not differentiable: a graph through them would silently be cut."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: not differentiable, but an argument requires grad; call it under torch.no_grad()")


def same_length(op: str, **lists: Sequence) -> None:
    lengths = {name: len(items) for name, items in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{op}: expected lists of one length, got {lengths}")


def one_size(op: str, fishers: Sequence[SymmetricBlocks]) -> None:
    sizes = sorted({fisher.size for fisher in fishers})
    if len(sizes) > 1:
        raise ValueError(f"{op}: expected blocks of one size per call, got sizes {sizes}")


def same_blocks(op: str, fishers: Sequence[SymmetricBlocks], factors: Sequence[SymmetricBlocks]) -> None:
    for i, (fisher, factor) in enumerate(zip(fishers, factors, strict=True)):
        if (fisher.count, fisher.size) != (factor.count, factor.size):
            raise ValueError(f"{op}: expected factors[{i}] like fishers[{i}], {fisher}, got {factor}")


def vectors(op: str, name: str, tensor: Tensor, like: Tensor, count: int, size: int, samples: bool = False) -> None:
    """[B, n], or [S, B, n] with S >= 1 when ``samples``."""
    _tensor(op, name, tensor, like)
    fits = tensor.ndim == 2 or (samples and tensor.ndim == 3 and tensor.shape[0] > 0)
    if not fits or tuple(tensor.shape[-2:]) != (count, size):
        expected = f"[{count}, {size}]" + (f" or [S, {count}, {size}] with S > 0" if samples else "")
        raise ValueError(f"{op}: expected {name} of shape {expected}, got {list(tensor.shape)}")


def right_hand_sides(op: str, rhs: Tensor, like: Tensor, count: int, size: int) -> None:
    _tensor(op, "rhs", rhs, like)
    if rhs.ndim not in (2, 3) or tuple(rhs.shape[:2]) != (count, size):
        raise ValueError(
            f"{op}: expected rhs of shape [{count}, {size}] or [{count}, {size}, k], got {list(rhs.shape)}"
        )


def decay(op: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: expected decay in [0, 1], got {value}")


def momentum(op: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{op}: expected momentum in [0, 1), got {value}")


def non_negative(op: str, **values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{op}: expected {name} to be finite and >= 0, got {value}")


def weights(op: str, count: int, **lists: Sequence[float]) -> None:
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"{op}: expected {name} to be a number or {count} of them, got {len(values)}")
        if not all(0 < value <= 1 for value in values):
            raise ValueError(f"{op}: expected {name} in (0, 1], got {list(values)}")


def step_tensors(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    fishers: Sequence[Tensor],
    factors: Sequence[Tensor],
    skipped: Sequence[Tensor],
    counts: Sequence[int],
    size: int,
) -> None:
    same_length(op, params=params, grads=grads, momenta=momenta, fishers=fishers, counts=counts)
    for name, optional in (("factors", factors), ("skipped", skipped)):
        if optional:
            same_length(op, params=params, **{name: optional})
    for i, (param, fisher, count) in enumerate(zip(params, fishers, counts, strict=True)):
        check_storage(op, fisher, count, size)
        if factors:
            check_storage(op, factors[i], count, size)
            _tensor(op, f"factors[{i}]", factors[i], params[0])
        _tensor(op, f"fishers[{i}]", fisher, params[0])
        _tensor(op, f"params[{i}]", param, params[0])
        _blocks_of(op, f"params[{i}]", param, count, size)
        _writable(op, f"params[{i}]", param)
        _writable(op, f"momenta[{i}]", momenta[i])
        for name, tensor in ((f"grads[{i}]", grads[i]), (f"momenta[{i}]", momenta[i])):
            _tensor(op, name, tensor, params[0])
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{op}: expected {name} of shape {list(param.shape)}, like its weights, got {list(tensor.shape)}"
                )
        if skipped and (skipped[i].dtype, skipped[i].numel(), skipped[i].device) != (
            torch.int64,
            1,
            param.device,
        ):
            raise ValueError(
                f"{op}: expected skipped[{i}] to be one int64 on {param.device}, got {list(skipped[i].shape)} "
                f"of {skipped[i].dtype} on {skipped[i].device}"
            )


def _tensor(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: expected {name} to be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES or tensor.dtype != like.dtype:
        expected = like.dtype if like.dtype in DTYPES else "float32 or float64"
        raise TypeError(f"{op}: expected {name} of {expected}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: expected {name} on {like.device}, got it on {tensor.device}")


def _blocks_of(op: str, name: str, tensor: Tensor, count: int, size: int) -> None:
    """The trailing dimensions multiply to ``size``, the leading ones to ``count``."""
    split, elements = tensor.ndim, 1
    while split > 0 and elements < size:
        split -= 1
        elements *= tensor.shape[split]
    if tensor.numel() != count * size or (count and elements != size):
        raise ValueError(
            f"{op}: expected {name} to be {count} blocks whose trailing dimensions multiply to {size}, "
            f"got shape {list(tensor.shape)}"
        )


def _writable(op: str, name: str, tensor: Tensor) -> None:
    if any(stride == 0 and extent > 1 for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{op}: expected {name} without repeated elements, got an expanded tensor")
