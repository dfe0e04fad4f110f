"""How a parameter becomes mini-blocks, and back.

A partition is a list of ``Blocks``: views of the parameter whose trailing dimensions are one mini-block and whose
leading ones enumerate the mini-blocks. Writing through a view writes the parameter. Where mini-blocks share one
averaged matrix, the view is [S, R, *elements]: S mini-blocks for each of R matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

STRUCTURES = ("auto", "filter", "segment", "row", "column", "grid", "diagonal")
MAX_FILTER_TAPS = 128  # "auto" leaves larger kernels to the diagonal: n^2 / 2 floats of state per n weights


@dataclass(frozen=True)
class Blocks:
    """``count`` matrices of ``size`` x ``size``, each shared by ``sharing`` mini-blocks (1: by none)."""

    structure: str
    suffix: str  # tells the state of several ``Blocks`` of one parameter apart
    count: int
    size: int
    sharing: int
    view: Callable[[Tensor], Tensor]

    @cached_property
    def shared(self) -> bool:
        return self.structure.endswith("averaged")

    def flat(self, tensor: Tensor) -> Tensor:
        """[S, R, n], a view where strides allow it."""
        return self.view(tensor).reshape(self.sharing, self.count, self.size)


def partition(
    shape: torch.Size,  # of the parameter
    *,
    blocks: str,
    segment: int,  # at most this many weights of one output in a run
    grid: tuple[int, int] | None,  # (m1, m2): groups of inputs and of outputs
    average: bool,
    grafted: bool,
    bias: bool,  # the bias joins as the last column
) -> list[Blocks]:
    """The mini-blocks of a parameter; an empty list: the diagonal step. For 2-D partitions the views take the matrix
    [O, D], bias column included. Raises ValueError where a grid does not divide the matrix."""
    taps = math.prod(shape[2:])
    is_matrix = len(shape) == 2 or (len(shape) > 2 and taps == 1)
    if blocks == "auto":
        blocks, average = _automatic(shape, taps, grafted), True
    if not math.prod(shape):
        return []
    if blocks == "filter" and len(shape) > 2:
        return [Blocks("filter", "", shape[0] * shape[1], taps, 1, _identity)]
    if blocks in ("segment", "row", "column", "grid") and is_matrix:
        return _matrix_blocks(blocks, shape[0], shape[1] + bias, segment, grid, average)
    return []


def joins_bias(shape: torch.Size, blocks: str) -> bool:
    """Whether the bias of this weight joins it as the homogeneous column."""
    return len(shape) == 2 and blocks in ("auto", "segment", "row", "column", "grid")


def _automatic(shape: torch.Size, taps: int, grafted: bool) -> str:
    if len(shape) < 2 or taps > MAX_FILTER_TAPS:
        return "diagonal"
    if len(shape) == 2:
        return "segment" if grafted else "row"
    return "filter" if taps > 1 or not grafted else "segment"


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _matrix_blocks(
    blocks: str, outputs: int, inputs: int, segment: int, grid: tuple[int, int] | None, average: bool
) -> list[Blocks]:
    if blocks == "segment":
        return _segments(outputs, inputs, segment, average)
    if blocks == "row":
        return [_blocks("row", outputs, inputs, average, lambda x: x.unsqueeze(1))]
    if blocks == "column":
        return [_blocks("column", inputs, outputs, average, lambda x: x.t().unsqueeze(1))]
    m1, m2 = grid
    if inputs % m1 or outputs % m2:
        raise ValueError(
            f"MBF: expected grid (m1, m2) to divide the {inputs} inputs (bias column included) and {outputs} outputs, "
            f"got {tuple(grid)}"
        )
    rows, columns = outputs // m2, inputs // m1

    def tiles(x: Tensor) -> Tensor:
        return x.unflatten(1, (m1, columns)).unflatten(0, (m2, rows)).transpose(1, 2)

    return [_blocks("grid", m1 * m2, rows * columns, average, tiles)]


def _blocks(name: str, blocks: int, size: int, average: bool, view: Callable[[Tensor], Tensor]) -> Blocks:
    if average:
        return Blocks(f"{name}, averaged", "", 1, size, blocks, view)
    return Blocks(name, "", blocks, size, 1, view)


def _segments(outputs: int, inputs: int, segment: int, average: bool) -> list[Blocks]:
    """Runs of ``segment`` inputs, and a shorter last one."""
    runs, rest = divmod(inputs, segment)
    parts = [
        (runs, segment, "", lambda x: x[:, : runs * segment].unflatten(1, (runs, segment))),
        (1, rest, "_tail", lambda x: x[:, runs * segment :].unsqueeze(1)),
    ]
    name = "segment, averaged" if average else "segment"
    return [
        Blocks(name, suffix, count if average else outputs * count, size, outputs if average else 1, view)
        for count, size, suffix, view in parts
        if count and size
    ]
