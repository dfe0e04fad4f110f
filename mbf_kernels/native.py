"""The native CPU kernels: hands the addresses and strides of checked tensors to ``_C``.

Same functions as ``reference``. Gradients, momenta and weights are read and written where they are; only a
layout with more than two levels of strides per block or per element goes through a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import reference
from .blocks import SymmetricBlocks
from .options import StepOptions

try:
    import mbf_kernels._C as _C
except ImportError as error:
    _C = None
    UNAVAILABLE = f"the native kernels are not built ({error})"
else:
    UNAVAILABLE = None

MAX_SIZE = _C.MAX_SIZE if _C else 0


def cpu_isas() -> list[str]:
    """CPU instruction sets compiled in and supported by this processor, best first."""
    return _C.cpu_isas()


def cpu_isa() -> str:
    """The instruction set in use: the best one, or what MBF_CPU_ISA or ``set_cpu_isa`` chose."""
    return _C.cpu_isa()


def set_cpu_isa(name: str) -> None:
    """Uses one of ``cpu_isas()`` from now on. Raises ValueError for any other name."""
    _C.set_cpu_isa(name)


def accumulate_(fisher: SymmetricBlocks, g: Tensor, decay: float) -> None:
    if len(g) > 1:  # a Gram matrix over many samples is a matrix product: torch's
        return reference.accumulate_(fisher, g, decay)
    grad = _View(g[0], fisher.size)
    problem = _C.Problem(count=fisher.count, fisher=fisher.data.data_ptr(), grad=grad.native)
    _launch(_C.Op.accumulate_, fisher, [problem], decay=decay)


def factor(fisher: SymmetricBlocks, damping: float, relative: bool) -> tuple[SymmetricBlocks, Tensor]:
    lower = SymmetricBlocks(torch.zeros_like(fisher.data), fisher.count, fisher.size)
    info = _new_info(fisher.data, fisher.count)
    problem = _C.Problem(
        count=fisher.count, fisher=fisher.data.data_ptr(), factor=lower.data.data_ptr(), info=info.data_ptr()
    )
    _launch(_C.Op.factor, fisher, [problem], damping=damping, relative=relative)
    return lower, info


def solve(factor: SymmetricBlocks, rhs: Tensor) -> Tensor:
    rhs = rhs.contiguous()
    x = torch.empty_like(rhs)
    problem = _C.Problem(count=factor.count, factor=factor.data.data_ptr(), rhs=_columns(rhs), out=_columns(x))
    _launch(_C.Op.solve, factor, [problem], rhs_count=rhs.shape[2])
    return x


def accumulate_factor_solve_(
    fisher: SymmetricBlocks, g: Tensor, rhs: Tensor, decay: float, damping: float, relative: bool
) -> tuple[Tensor, Tensor]:
    x = torch.empty(rhs.shape, dtype=rhs.dtype, device=rhs.device)
    info = _new_info(fisher.data, fisher.count)
    views = [_View(tensor, fisher.size) for tensor in (g, rhs, x)]
    problem = _C.Problem(
        count=fisher.count, fisher=fisher.data.data_ptr(), info=info.data_ptr(),
        grad=views[0].native, rhs=views[1].native, out=views[2].native,
    )  # fmt: skip
    _launch(_C.Op.accumulate_factor_solve_, fisher, [problem], decay=decay, damping=damping, relative=relative)
    return x, info


def mbf_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    fishers: Sequence[SymmetricBlocks],
    factors: Sequence[SymmetricBlocks],
    skipped: Sequence[Tensor],
    momentum_weights: Sequence[float],
    fisher_weights: Sequence[float],
    options: StepOptions,
) -> Tensor:
    size = fishers[0].size
    info = _new_info(fishers[0].data, sum(fisher.count for fisher in fishers))
    info_address = info.data_ptr()
    problems, written = [], []
    for i, fisher in enumerate(fishers):
        grad, momentum, param = (_View(tensor, size) for tensor in (grads[i], momenta[i], params[i]))
        written += [momentum, param]
        problem = _C.Problem(
            count=fisher.count,
            fisher=fisher.data.data_ptr(),
            factor=factors[i].data.data_ptr() if factors else 0,
            info=info_address,
            skipped=skipped[i].data_ptr() if skipped else 0,
            momentum_scale=(1 - options.momentum) / momentum_weights[i],
            fisher_scale=1 / fisher_weights[i],
            grad=grad.native,
            rhs=momentum.native,
            out=param.native,
        )
        problems.append(problem)
        info_address += fisher.count * info.element_size()
    _launch(_C.Op.mbf_step_, fishers[0], problems, **vars(options))
    for view in written:
        view.write_back()
    return info


class _View:
    """A tensor as blocks of n elements, for the kernels: in place, or through a copy where strides forbid it."""

    def __init__(self, tensor: Tensor, n: int):
        self.tensor = tensor
        strides = _block_strides(tuple(tensor.shape), tensor.stride(), n)
        self.staged = tensor if strides else tensor.contiguous()
        strides = strides or _block_strides(tuple(tensor.shape), self.staged.stride(), n)
        self.native = (self.staged.data_ptr(), *strides)

    def write_back(self) -> None:
        if self.staged is not self.tensor:
            self.tensor.copy_(self.staged)


@lru_cache(maxsize=4096)
def _block_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], n: int
) -> tuple[int, int, int, int, int, int] | None:
    """(inner count, outer stride, inner stride) of the blocks and of their elements, where the trailing
    dimensions multiply to n; None where either needs more than two levels."""
    split, elements = len(shape), 1
    while elements < n:
        split -= 1
        elements *= shape[split]
    levels = _levels(shape[:split], strides[:split]), _levels(shape[split:], strides[split:])
    return levels[0] + levels[1] if None not in levels else None


def _levels(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (_, outer), (count, inner) = [(1, 0)] * (2 - len(merged)) + merged
    return count, outer, inner


def _columns(x: Tensor) -> tuple[int, ...]:
    """The first column of contiguous [B, n, k], the others following at distance 1."""
    _, n, k = x.shape
    return (x.data_ptr(), x.shape[0], 0, n * k, n, 0, k)


def _new_info(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=like.device)


def _launch(op: _C.Op, blocks: SymmetricBlocks, problems: list[_C.Problem], **parameters) -> None:
    dtype = _C.DType.float32 if blocks.dtype == torch.float32 else _C.DType.float64
    _C.cpu_launch(op, dtype, blocks.size, problems, _C.Parameters(**parameters), torch.get_num_threads())
