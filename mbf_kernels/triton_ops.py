"""The Triton kernels, of blocks for n <= 20, on NVIDIA and AMD GPUs, or interpreted on the CPU (TRITON_INTERPRET=1).

Same functions as ``reference``. Gradients, momenta and weights are read and written where they are; only a layout
with more than two levels of strides per block or per element goes through a copy. Numbers that live on the device are
read there. One launch per tensor.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference, shared
from .blocks import TILE_BLOCKS, SymmetricBlocks
from .diagonal import mbf_diagonal_step_  # noqa: F401, one of this backend's ops
from .options import StepOptions
from .views import RankOneView, View

MAX_SIZE = 20
WARPS = 4  # of a program; a lane is a block
SOLVE_COLUMNS = 8  # right-hand sides for which a program loads the factor once
_INTERPRETED_BLOCKS = 1 << 16  # of a program: interpreting costs by the program, hardly by the block


def unavailable() -> str | None:
    """Why the Triton kernels cannot run here; None if they can."""
    if _missing():
        return _missing()
    if is_interpreted() or torch.cuda.is_available():
        return None
    return "torch finds no GPU (TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, for tests)"


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Looked up without importing triton, which takes a second."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    for package in ("triton", "triton-rocm", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            major, minor = (int(part) for part in version.split(".")[:2])
            return None if (major, minor) >= (3, 6) else f"triton 3.6 or newer is needed, found {version}"
    return None


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def accumulate_(fisher: SymmetricBlocks, g: Tensor, decay: float) -> None:
    _check_size("accumulate_", fisher)
    if len(g) > 1:  # a Gram matrix over many samples is a matrix product: torch's
        return reference.accumulate_(fisher, g, decay)
    numbers = _numbers(fisher.dtype, decay, 1 - decay)
    _launch(_kernels().accumulate, fisher, fisher.data, _strided(View(g[0], fisher.size)), numbers)


def factor(fisher: SymmetricBlocks, damping: float | Tensor, relative: bool) -> tuple[SymmetricBlocks, Tensor]:
    _check_size("factor", fisher)
    lower = SymmetricBlocks(_new_storage(fisher), fisher.count, fisher.size)
    info = _new_info(fisher, fisher.count)
    numbers = _numbers(fisher.dtype, damping)
    _launch(_kernels().factor, fisher, fisher.data, lower.data, info, numbers, RELATIVE=relative)
    return lower, info


def solve(factor: SymmetricBlocks, rhs: Tensor) -> Tensor:
    _check_size("solve", factor)
    columns = rhs.shape[2]
    rhs = rhs.contiguous()
    x = torch.empty_like(rhs)
    views = [_twice(t, None, 0, factor.size * columns, factor.size, 0, columns) for t in (rhs, x)]
    width = _power_of_two(min(columns, max(SOLVE_COLUMNS, columns >> 15)))  # a grid has fewer than 65536 rows
    _launch(_kernels().solve, factor, factor.data, *views, columns, COLUMNS=width, rows=-(-columns // width))
    return x


def accumulate_factor_solve_(
    fisher: SymmetricBlocks, g: Tensor, rhs: Tensor, decay: float, damping: float | Tensor, relative: bool
) -> tuple[Tensor, Tensor]:
    _check_size("accumulate_factor_solve_", fisher)
    x = torch.empty(rhs.shape, dtype=rhs.dtype, device=rhs.device)
    info = _new_info(fisher, fisher.count)
    views = [_strided(View(tensor, fisher.size)) for tensor in (g, rhs, x)]
    numbers = _numbers(fisher.dtype, decay, 1 - decay, damping)
    kernel = _kernels().accumulate_factor_solve
    _launch(kernel, fisher, fisher.data, info, *views, numbers, RELATIVE=relative)
    return x, info


def mbf_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    fishers: Sequence[SymmetricBlocks],
    factors: Sequence[SymmetricBlocks],
    skipped: Sequence[Tensor],
    momentum_weights: Sequence[float] | Sequence[Tensor],
    fisher_weights: Sequence[float] | Sequence[Tensor],
    options: StepOptions,
) -> Tensor:
    _check_size("mbf_step_", fishers[0])
    o = options
    info = _new_info(fishers[0], sum(fisher.count for fisher in fishers))
    infos = info.split([fisher.count for fisher in fishers])
    for i, fisher in enumerate(fishers):
        grad, momentum, param = (View(tensor, fisher.size) for tensor in (grads[i], momenta[i], params[i]))
        numbers = _numbers(
            fisher.dtype, o.lr, o.damping, o.decay, 1 - o.decay, o.momentum, 1 - o.momentum,
            momentum_weights[i], fisher_weights[i], o.eps, o.weight_decay,
        )  # fmt: skip
        _launch(
            _kernels().mbf_step, fisher,
            fisher.data, factors[i].data if factors else None, infos[i], skipped[i] if skipped else None,
            _strided(grad), _strided(momentum), _strided(param), numbers,
            RELATIVE=o.relative, GRAFT=o.graft, NESTEROV=o.nesterov, MAXIMIZE=o.maximize,
            UPDATE=o.update, REFACTOR=o.refactor,
        )  # fmt: skip
        momentum.write_back()
        param.write_back()
    return info


def mbf_shared_step_(*arguments) -> Tensor:
    return shared.mbf_shared_step_(sys.modules[__name__], *arguments)


def rank_one_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    momentum_weights: Sequence[float] | Sequence[Tensor],
    options: StepOptions,
) -> None:
    o = options
    for *tensors, weight in zip(params, grads, momenta, rows, columns, momentum_weights, strict=True):
        view, param = RankOneView(*tensors), tensors[0]
        order = None if view.order[2] == 1 else view.order
        numbers = _numbers(param.dtype, o.lr, weight, o.damping, o.momentum, 1 - o.momentum, o.weight_decay)
        _start(
            _kernels().rank_one_step, param.device, param.numel(), view.grad.staged, view.momentum.staged,
            view.param.staged, view.row, view.column, order, view.columns, numbers, DECOUPLED=o.decoupled,
        )  # fmt: skip
        view.write_back()


def _strided(view: View) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A view as the kernels take it. Blocks of one stride have no inner count."""
    count, outer, inner, elements, element_outer, element_inner = view.native[1:]
    return _twice(view.staged, count if outer else None, outer, inner, elements, element_outer, element_inner)


def _twice(base: Tensor, count: int | None, outer: int, inner: int, elements: int, *strides: int) -> tuple:
    constant = _kernels().constant
    view = (base, count, outer, inner, constant(elements), *(constant(1) if s == 1 else s for s in strides))
    return view, view


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _numbers(dtype: torch.dtype, *numbers: float | Tensor) -> tuple[int | Tensor, ...]:
    """The bits of each number, rounded to the blocks' dtype; a number on the device as it is."""
    real, word = ("<f", "<i") if dtype == torch.float32 else ("<d", "<q")
    return tuple(x if isinstance(x, Tensor) else struct.unpack(word, struct.pack(real, x))[0] for x in numbers)


def _new_info(like: SymmetricBlocks, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=like.device)


def _new_storage(like: SymmetricBlocks) -> Tensor:
    """Storage whose padding is zero; the kernels write the blocks."""
    data = torch.empty_like(like.data)
    if like.count % TILE_BLOCKS:
        data[-1].zero_()
    return data


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """Imported by the first call, for the same reason."""
    from . import triton_kernels

    return triton_kernels


def _check_size(op: str, blocks: SymmetricBlocks) -> None:
    if blocks.size > MAX_SIZE:
        raise ValueError(
            f"{op}: backend 'triton' serves blocks of up to {MAX_SIZE}x{MAX_SIZE}, got {blocks.size}x{blocks.size}; "
            f"'cuda' and 'cpu' serve up to 128x128, 'reference' any size"
        )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The interpreter computes in numpy, which warns of the quotients of bad blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _launch(kernel, blocks: SymmetricBlocks, *arguments, **constants) -> None:
    """Runs ``kernel`` over all blocks."""
    _start(kernel, blocks.device, blocks.count, *arguments, N=blocks.size, **constants)


def _start(kernel, device: torch.device, count: int, *arguments, rows: int = 1, **constants) -> None:
    """Runs ``kernel`` over as many lanes, ``rows`` times; its arguments end with the count."""
    if is_interpreted():
        width, layout = min(_INTERPRETED_BLOCKS, _power_of_two(count)), None
        place = _without_warnings()
    else:
        width, layout = _kernels().program(WARPS)
        place = torch.cuda.device(device)
    grid = (-(-count // width), rows)
    with place:
        kernel[grid](*arguments, count, BLOCK=width, LAYOUT=layout, num_warps=WARPS, **constants)
