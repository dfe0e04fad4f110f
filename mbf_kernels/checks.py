"""Argument checks of the ops. Every message names the op, what was expected and what came.

A check of many tensors first looks whether all is well, and only otherwise for the culprit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import add, attrgetter, le

import torch
from torch import Tensor

from .blocks import DTYPES, SymmetricBlocks, check_storage, has_memory


def blocks(op: str, name: str, value: object) -> None:
    if not isinstance(value, SymmetricBlocks):
        raise TypeError(f"{op}: expected {name} to be SymmetricBlocks, got {type(value).__name__}")


def storage(op: str, data: Tensor, count: int, size: int) -> None:
    check_storage(op, data, count, size)


def tensors(op: str, **values: object) -> None:
    for name, value in values.items():
        if not has_memory(value):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}")


def tensor_lists(op: str, **lists: Sequence) -> None:
    for name, items in lists.items():
        if not isinstance(items, list | tuple):
            raise TypeError(f"{op}: expected {name} to be a list of tensors, got {type(items).__name__}")
        if not all(map(has_memory, items)):
            tensors(op, **{f"{name}[{i}]": item for i, item in enumerate(items)})


def parts(op: str, name: str, items: Sequence[Tensor | tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """A list of tensors and pairs as tuples."""
    if not isinstance(items, list | tuple):
        raise TypeError(f"{op}: expected {name} to be a list of tensors or pairs, got {type(items).__name__}")
    entries = [item if isinstance(item, tuple) else (item,) for item in items]
    for i, entry in enumerate(entries):
        tensor_lists(op, **{f"{name}[{i}]": entry})
        if len(entry) not in (1, 2):
            raise ValueError(f"{op}: expected {name}[{i}] to be a tensor or a pair, got {len(entry)} tensors")
    return entries


def block_lists(op: str, **lists: Sequence) -> None:
    for name, items in lists.items():
        if not isinstance(items, list | tuple):
            raise TypeError(f"{op}: expected {name} to be a list of SymmetricBlocks, got {type(items).__name__}")
        if not all(isinstance(item, SymmetricBlocks) for item in items):
            for i, item in enumerate(items):
                blocks(op, f"{name}[{i}]", item)


def optional_tensor_lists(op: str, **lists: Sequence) -> None:
    for name, items in lists.items():
        if not isinstance(items, list | tuple):
            raise TypeError(f"{op}: expected {name} to be a list of tensors or None, got {type(items).__name__}")
        tensors(op, **{f"{name}[{i}]": item for i, item in enumerate(items) if item is not None})


def no_grad(op: str, *tensors: Tensor | None) -> None:
    """The ops are not differentiable: a graph through them would silently be cut."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
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


def momentum(op: str, value: float, name: str = "momentum") -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{op}: expected {name} in [0, 1), got {value}")


def non_negative(op: str, **values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{op}: expected {name} to be finite and >= 0, got {value}")


def number(op: str, name: str, value: object) -> float:
    if type(value) is float:
        return value
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise TypeError(f"{op}: expected {name} to be a number or a 0-d tensor, got {value!r}")


def flag(op: str, name: str, value: object) -> bool:
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: expected {name} to be true or false, got {value!r}") from None


def device_scalars(op: str, like: Tensor, **values: Tensor | None) -> None:
    """Numbers on the device of ``like``; their values are not looked at, because that would wait for the device."""
    for name, value in values.items():
        if value is None:
            continue
        if value.dtype not in DTYPES:
            raise TypeError(f"{op}: expected {name} of float32 or float64, got {value.dtype}")
        if value.ndim:
            raise ValueError(f"{op}: expected {name} to be a 0-d tensor, got shape {list(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{op}: expected {name} on {like.device}, got it on {value.device}")


def weights(op: str, name: str, numbers: Sequence[float], tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """One number in (0, 1] for each of ``params``, or one tensor."""
    given = tensors or numbers
    if len(given) != len(params):
        raise ValueError(f"{op}: expected {name} to be a number or {len(params)} of them, got {len(given)}")
    for tensor in tensors:
        device_scalars(op, params[0], **{name: tensor})
    if not all(0 < number <= 1 for number in numbers):
        raise ValueError(f"{op}: expected {name} in (0, 1], got {list(numbers)}")


def step_tensors(
    op: str,
    params: Sequence[Tensor],
    skipped: Sequence[Tensor] = (),
    **like_params: Sequence[Tensor],  # of the shapes of the params; all but grads are written
) -> None:
    """What the tensors of every step have in common."""
    same_length(op, params=params, **like_params)
    _alike(op, params=params, **like_params)
    for name, tensors in like_params.items():
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{op}: expected {name}[{i}] of shape {list(param.shape)}, like its weights, "
                    f"got {list(tensor.shape)}"
                )
    for name, written in (like_params | {"params": params}).items():
        for i, tensor in enumerate(written):
            if name != "grads" and not tensor.is_contiguous() and _repeats(tensor):
                raise ValueError(
                    f"{op}: expected {name}[{i}] without repeated elements, got strides {list(tensor.stride())} "
                    f"of shape {list(tensor.shape)}"
                )
    one = (torch.int64, 1, params[0].device, torch.strided)
    for i, counter in enumerate(skipped):
        if (counter.dtype, counter.numel(), counter.device, counter.layout) != one:
            raise ValueError(
                f"{op}: expected skipped[{i}] to be one dense int64 on {params[0].device}, got {list(counter.shape)} "
                f"of {counter.dtype}, {counter.layout}, on {counter.device}"
            )


def step_matrices(
    op: str,
    params: Sequence[Tensor],  # the first of every problem
    fishers: Sequence[Tensor],
    factors: Sequence[Tensor],
    skipped: Sequence[Tensor],
    counts: Sequence[int],
    size: int,
) -> None:
    """Storage of F and L for every problem of a step."""
    for name, items in (("fishers", fishers), ("counts", counts), ("factors", factors), ("skipped", skipped)):
        if items or name in ("fishers", "counts"):
            same_length(op, params=params, **{name: items})
    _alike(op, params=params, fishers=fishers, factors=factors)
    for storages in (fishers, factors):
        for data, count in zip(storages, counts, strict=bool(storages)):
            check_storage(op, data, count, size)


def blocks_of(op: str, params: Sequence[Tensor], counts: Sequence[int], size: int) -> None:
    for i, (param, count) in enumerate(zip(params, counts, strict=True)):
        if not _divides(param, count, size):
            raise ValueError(
                f"{op}: expected params[{i}] to be {count} blocks whose trailing dimensions multiply to {size}, "
                f"got shape {list(param.shape)}"
            )


def shared_blocks_of(op: str, params: Sequence[Sequence[Tensor]], counts: Sequence[int], size: int) -> None:
    """[*samples, R, *elements], the elements multiplying to n; or, with a bias [*samples], R = 1 and n - 1 elements."""
    for i, (parts, count) in enumerate(zip(params, counts, strict=True)):
        main, elements = parts[0], size - len(parts) + 1
        split = matrix_dimension(main.shape, elements, count)
        if split is None:
            raise ValueError(
                f"{op}: expected params[{i}] of shape [*samples, {count}, *elements], the elements multiplying to "
                f"{elements}, got {list(main.shape)}"
            )
        if len(parts) == 2 and (count != 1 or parts[1].shape != main.shape[:split]):
            raise ValueError(
                f"{op}: expected the second of params[{i}] of shape {list(main.shape[:split])} beside one matrix, "
                f"got {list(parts[1].shape)} beside {count}"
            )


def rank_one(
    op: str, params: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None]
) -> None:
    """s [m] and h [n] for each of ``params`` of m leading and n trailing elements, or neither."""
    same_length(op, params=params, rows=rows, columns=columns)
    for i, (param, s, h) in enumerate(zip(params, rows, columns, strict=True)):
        if s is None and h is None:
            continue
        if s is None or h is None or s.ndim != 1 or h.ndim != 1 or not _divides(param, s.numel(), h.numel()):
            found = ["none" if vector is None else list(vector.shape) for vector in (s, h)]
            raise ValueError(
                f"{op}: expected rows[{i}] [m] and columns[{i}] [n], or neither, for m leading and n trailing elements "
                f"of params[{i}] {list(param.shape)}, got {found[0]} and {found[1]}"
            )
        _tensor(op, f"rows[{i}]", s, params[0])
        _tensor(op, f"columns[{i}]", h, params[0])


def matrix_dimension(shape: Sequence[int], elements: int, count: int) -> int | None:
    """Which dimension enumerates the matrices: of size ``count``, before one or more that multiply to ``elements``."""
    split = split_at(shape, elements)
    if split is None:
        return None
    if split == len(shape):  # one element: a dimension of its own all the same
        split -= 1
        if split < 0 or shape[split] != 1:
            return None
    while split > 1 and shape[split - 1] == 1 != count:
        split -= 1
    return split - 1 if split > 0 and shape[split - 1] == count else None


def split_at(shape: Sequence[int], elements: int) -> int | None:
    """How many dimensions lead those that multiply to ``elements``; None where none do."""
    split, product = len(shape), 1
    while split > 0 and product < elements:
        split -= 1
        product *= shape[split]
    return split if product == elements else None


def _alike(op: str, **lists: Sequence[Tensor]) -> None:
    """All dense, of the dtype and on the device of the first."""
    like = next(iter(lists.values()))[0]
    kinds = {(tensor.dtype, tensor.device, tensor.layout) for items in lists.values() for tensor in items}
    if len(kinds) == 1 and like.dtype in DTYPES and like.layout == torch.strided:
        return
    for name, items in lists.items():
        for i, tensor in enumerate(items):
            _tensor(op, f"{name}[{i}]", tensor, like)


def _tensor(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: expected {name} to be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES or tensor.dtype != like.dtype:
        expected = like.dtype if like.dtype in DTYPES else "float32 or float64"
        raise TypeError(f"{op}: expected {name} of {expected}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: expected {name} on {like.device}, got it on {tensor.device}")


def _divides(tensor: Tensor, count: int, size: int) -> bool:
    """Whether the trailing dimensions multiply to ``size``, the leading ones to ``count``."""
    return tensor.numel() == count * size and (not tensor.numel() or split_at(tensor.shape, size) is not None)


def _repeats(tensor: Tensor) -> bool:
    """Whether two elements are one in memory. Dimensions that interleave, which views of plain tensors do not, are
    taken to."""
    last = 0  # the distance of the last element of the dimensions so far from the first
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1:
            if stride <= last:
                return True
            last += (extent - 1) * stride
    return False


def memory(op: str, written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor | None]]) -> None:
    """Raises ValueError where a tensor begins in the memory of another and one of the two is written, or where what is
    written is an inference tensor and this is not inference mode.

    Of a tensor with gaps only the first element is known to be its own: the views of one weight interleave.
    """
    if not torch.is_inference_mode_enabled():
        for name, tensors in written.items():
            inference = list(map(Tensor.is_inference, tensors))
            if any(inference):
                which = f"{name}[{inference.index(True)}]"
                raise ValueError(f"{op}: expected to write to {which}, got an inference tensor: clone() it")
    lists = (*written.values(), *read.values())
    tensors = [tensor for items in lists for tensor in items if tensor is not None]
    starts = list(map(Tensor.data_ptr, tensors))
    ends = map(add, starts, map(_BYTES, tensors))
    if not all(map(le, sorted(ends), sorted(starts)[1:])):  # not one after another
        _disjoint(op, written, read)


_BYTES = attrgetter("nbytes")


def _disjoint(op: str, written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor | None]]) -> None:
    places = []
    for is_written, lists in ((True, written), (False, read)):
        for name, tensors in lists.items():
            for i, tensor in enumerate(tensors):
                if tensor is not None and tensor.numel():
                    start, own = tensor.data_ptr(), tensor.numel() if _is_dense(tensor) else 1
                    places.append((start, start + own * tensor.element_size(), is_written, f"{name}[{i}]"))
    ends = {True: (0, ""), False: (0, "")}  # how far what is written reaches so far, and what is read; and who
    for start, end, is_written, name in sorted(places):
        for other_is_written, (other_end, other) in ends.items():
            if start < other_end and (is_written or other_is_written):
                raise ValueError(f"{op}: expected memory of its own for each tensor, got {other} and {name} in one")
        ends[is_written] = max(ends[is_written], (end, name))


def _is_dense(tensor: Tensor) -> bool:
    """Whether elements follow each other without gaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    if _repeats(tensor):
        return False
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == last + 1
