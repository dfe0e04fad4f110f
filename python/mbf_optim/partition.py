"""How a parameter becomes mini-blocks, and back.

A partition is a list of ``Blocks``: views of the parameter whose trailing dimensions are one mini-block and whose
leading ones enumerate the mini-blocks. Writing through a view writes the parameter. Where mini-blocks share one
averaged matrix, the view is [S, R, *elements]: S mini-blocks for each of R matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    view: Callable[[Tensor], Tensor]  # of the weight; with bias "column" of the weight and the bias as a last column
    bias: str = "none"  # "none": not in these blocks; "last": the last element of each; "column": see view
    each: int = 1  # mini-blocks of one output; of a row of tiles; of an input. Of averaged segments, of one run
    within_output: bool = True  # no mini-block has weights of two outputs

    @cached_property
    def shared(self) -> bool:
        return self.structure.endswith("averaged")

    @cached_property
    def packed_shape(self) -> tuple[int, ...]:
        """Of the packed triangles in checkpoints: aligned with the first dimension of the parameter, or shared."""
        triangle = self.size * (self.size + 1) // 2
        return (self.count, triangle) if self.shared else (self.count // self.each, self.each, triangle)


def partition(
    shape: torch.Size,  # of the parameter
    *,
    blocks: str,
    segment: int,  # at most this many weights of one output in a run
    grid: tuple[int, int] | None,  # (m1, m2): groups of inputs and of outputs
    average: bool,
    grafted: bool,
    bias: bool,  # the bias joins as the last column
    outputs: int | None = None,  # the number of them that are here, where no mini-block has weights of two; None: all
) -> list[Blocks]:
    """The mini-blocks of a parameter; an empty list: the diagonal step. For 2-D partitions the views take the matrix
    [O, D]. Raises ValueError where a grid does not divide the matrix, bias column included."""
    taps = math.prod(shape[2:])
    is_matrix = len(shape) == 2 or (len(shape) > 2 and taps == 1)
    if blocks == "auto":
        blocks, average = _automatic(shape, taps, grafted), True
    if not math.prod(shape):
        return []
    if blocks == "grid" and is_matrix:
        _check_grid(grid, shape[0], shape[1] + bias)
    here = outputs if outputs is not None or not shape else shape[0]
    if blocks == "filter" and len(shape) > 2:
        return [Blocks("filter", "", here * shape[1], taps, 1, _identity, each=shape[1])]
    if blocks in ("segment", "row", "column", "grid") and is_matrix:
        tiles = grid and (grid[0], here * grid[1] // shape[0])
        return _matrix_blocks(blocks, here, shape[1], bias, segment, tiles, average)
    return []


def joins_bias(shape: torch.Size, *, blocks: str, segment: int, grafted: bool) -> bool:
    """Whether the bias of this weight joins it as the homogeneous column: not where it would be a run of its own."""
    if len(shape) != 2 or not math.prod(shape) or blocks not in ("auto", "segment", "row", "column", "grid"):
        return False
    in_segments = blocks == "segment" or (blocks == "auto" and _automatic(shape, 1, grafted) == "segment")
    return not in_segments or shape[1] % segment > 0


def _automatic(shape: torch.Size, taps: int, grafted: bool) -> str:
    if len(shape) < 2 or taps > MAX_FILTER_TAPS:
        return "diagonal"
    if len(shape) == 2:
        return "segment" if grafted else "row"
    return "filter" if taps > 1 or not grafted else "segment"


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _matrix_blocks(
    blocks: str, outputs: int, inputs: int, bias: bool, segment: int, grid: tuple[int, int] | None, average: bool
) -> list[Blocks]:
    column = "column" if bias else "none"
    if blocks == "segment":
        return (
            _averaged_segments(outputs, inputs, bias, segment) if average else _segments(outputs, inputs, bias, segment)
        )
    if blocks == "row":
        place = "last" if bias and average else column
        return [_blocks("row", outputs, inputs + bias, average, lambda x: x.unsqueeze(1), place)]
    if blocks == "column":
        across = _blocks("column", inputs + bias, outputs, average, lambda x: x.t().unsqueeze(1), column)
        return [replace(across, within_output=False)]
    m1, m2 = grid
    rows, columns = outputs // m2 if m2 else 1, (inputs + bias) // m1

    def tiles(x: Tensor) -> Tensor:
        tiles = x.view(m2, rows, m1, columns).transpose(1, 2)
        return tiles.unsqueeze(2) if average else tiles

    return [replace(_blocks("grid", m1 * m2, rows * columns, average, tiles, column), each=m1, within_output=rows == 1)]


def _check_grid(grid: tuple[int, int], outputs: int, inputs: int) -> None:
    m1, m2 = grid
    if inputs % m1 or outputs % m2:
        raise ValueError(
            f"MBF: expected grid (m1, m2) to divide the {inputs} inputs (bias column included) and {outputs} outputs, "
            f"got {tuple(grid)}"
        )


def _blocks(name: str, blocks: int, size: int, average: bool, view: Callable[[Tensor], Tensor], bias: str) -> Blocks:
    if average:
        return Blocks(f"{name}, averaged", "", 1, size, blocks, view, bias)
    return Blocks(name, "", blocks, size, 1, view, bias)


def _averaged_segments(outputs: int, inputs: int, bias: bool, segment: int) -> list[Blocks]:
    """Runs of ``segment`` inputs, and a shorter last one, which the bias joins."""
    runs, rest = divmod(inputs, segment)
    parts = [
        (runs, segment, "", lambda x: x[:, : runs * segment].view(-1, runs, segment), "none"),
        (1, rest + bias, "_tail", lambda x: x[:, runs * segment :].unsqueeze(1), "last" if bias else "none"),
    ]
    return [
        Blocks("segment, averaged", suffix, count, size, outputs, view, place)
        for count, size, suffix, view, place in parts
        if count and size
    ]


def _segments(outputs: int, inputs: int, bias: bool, segment: int) -> list[Blocks]:
    """Likewise, each with a matrix of its own."""
    runs, rest = divmod(inputs + bias, segment)
    parts = [
        (runs, segment, "", lambda x: x[:, : runs * segment].view(-1, runs, segment)),
        (1, rest, "_tail", lambda x: x[:, runs * segment :].unsqueeze(1)),
    ]
    column = "column" if bias else "none"
    return [
        Blocks("segment", suffix, outputs * count, size, 1, view, column, each=count)
        for count, size, suffix, view in parts
        if count and size
    ]
