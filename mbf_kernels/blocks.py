"""Storage of B symmetric n x n blocks as packed lower triangles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

TILE_BLOCKS = 32  # blocks side by side in a tile
MAX_TILED_SIZE = 20  # larger blocks are stored block-major
DTYPES = (torch.float32, torch.float64)
INTEGERS = (int, torch.SymInt, Integral)  # Integral: NumPy's, too; the slowest to look for


def triangle_size(n: int) -> int:
    """T = n(n+1)/2, the scalars of one packed block."""
    return n * (n + 1) // 2


def storage_shape(count: int, size: int) -> tuple[int, ...]:
    """[ceil(B/32), T, 32] for n <= 20, else [B, T rounded up to a multiple of 4]."""
    triangle = triangle_size(size)
    if size <= MAX_TILED_SIZE:
        return (-(-count // TILE_BLOCKS), triangle, TILE_BLOCKS)
    return (count, -(-triangle // 4) * 4)


@lru_cache(maxsize=256)
def _packing(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices into a flattened n x n block: of its packed entries [T], and of the packed entry of each place [n*n]."""
    rows, columns = torch.tril_indices(n, n, device=device)
    i = torch.arange(n, device=device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return rows * n + columns, (high * (high + 1) // 2 + low).flatten()


class SymmetricBlocks:
    """B symmetric n x n blocks in packed lower triangles, the storage that every backend shares.

    Attributes: ``count`` B, ``size`` n, ``data`` the storage tensor, float32 or float64. With T = n(n+1)/2:

    - n <= 20: tiles of 32 blocks, ``data[ceil(B/32), T, 32]``, the last one padded with zero blocks;
    - n > 20: block-major, ``data[B, T_pad]``, T padded with zeros to a multiple of 4.

    Within a block entries run row by row: (0,0), (1,0), (1,1), (2,0), ...
    """

    def __init__(self, data: Tensor, count: int, size: int):
        check_storage("SymmetricBlocks", data, count, size)
        self.data = data
        self.count = count
        self.size = size

    @classmethod
    def zeros(
        cls,
        count: int,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> SymmetricBlocks:
        """``count`` zero blocks. Raises ValueError for a negative count or a size below 1, TypeError for a dtype
        other than float32 and float64."""
        _check_extent("SymmetricBlocks.zeros", count, size)
        _check_dtype("SymmetricBlocks.zeros", dtype)
        return cls(torch.zeros(storage_shape(count, size), dtype=dtype, device=device), count, size)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,  # [B, T]
    ) -> SymmetricBlocks:
        """Blocks from their packed lower triangles, one row each (the canonical form of checkpoints)."""
        _check_tensor("SymmetricBlocks.from_packed", "packed", packed, ndim=2)
        count, triangle = packed.shape
        size = (math.isqrt(8 * triangle + 1) - 1) // 2
        if size < 1 or triangle_size(size) != triangle:
            raise ValueError(
                f"SymmetricBlocks.from_packed: expected [B, n(n+1)/2] entries, got shape {list(packed.shape)}"
            )
        return cls(_store(packed.detach(), count, size), count, size)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,  # [B, n, n]
    ) -> SymmetricBlocks:
        """Blocks from symmetric matrices. Raises ValueError where |A - A^T| exceeds n eps max|A| in a block
        (this looks at the values, so it waits for the device)."""
        _check_tensor("SymmetricBlocks.from_dense", "dense", dense, ndim=3)
        count, size, columns = dense.shape
        if size != columns or size < 1:
            raise ValueError(f"SymmetricBlocks.from_dense: expected [B, n, n] blocks, got shape {list(dense.shape)}")
        dense = dense.detach()
        if dense.is_meta:
            raise ValueError("SymmetricBlocks.from_dense: expected blocks with values, got them on meta")
        if count:
            asymmetry = (dense - dense.mT).abs().amax((1, 2))
            bound = size * torch.finfo(dense.dtype).eps * dense.abs().amax((1, 2))
            bad = (asymmetry > bound).nonzero().flatten()  # a block with NaN is let through: it hurts only itself
            if len(bad):
                worst = int(bad[0])
                raise ValueError(
                    f"SymmetricBlocks.from_dense: expected symmetric blocks, but in block {worst} "
                    f"|A - A^T| reaches {float(asymmetry[worst]):.3g}"
                )
        return cls(pack_dense(dense), count, size)

    def to_packed(self) -> Tensor:
        """[B, T] packed lower triangles, in a new tensor."""
        if self.size > MAX_TILED_SIZE:
            return self.data[:, : triangle_size(self.size)].clone()
        return self.data.transpose(1, 2).reshape(-1, triangle_size(self.size))[: self.count].clone()

    def to_dense(self) -> Tensor:
        """[B, n, n], both triangles. (Of a factor L, look at the lower one.)"""
        _, unpacking = _packing(self.size, self.data.device)
        return self.to_packed()[:, unpacking].unflatten(1, (self.size, self.size))

    def diagonal(self) -> Tensor:
        """[B, n] diagonals, in a new tensor."""
        i = torch.arange(self.size, device=self.data.device)
        return self.to_packed()[:, i * (i + 3) // 2]

    @classmethod
    def cat(cls, parts: Sequence[SymmetricBlocks]) -> SymmetricBlocks:
        """The blocks of all ``parts`` (at least one, all of one size) in a row, in new storage."""
        if not isinstance(parts, list | tuple) or not all(isinstance(part, SymmetricBlocks) for part in parts):
            raise TypeError(f"SymmetricBlocks.cat: expected a list of SymmetricBlocks, got {parts!r}")
        sizes = sorted({part.size for part in parts})
        if len(sizes) != 1:
            raise ValueError(f"SymmetricBlocks.cat: expected one or more parts of one size, got sizes {sizes}")
        if sizes[0] > MAX_TILED_SIZE:
            return cls(torch.cat([part.data for part in parts]), sum(map(len, parts)), sizes[0])
        return cls.from_packed(torch.cat([part.to_packed() for part in parts]))

    def split(self, counts: Sequence[int]) -> list[SymmetricBlocks]:
        """The inverse of ``cat``: runs of ``counts`` blocks. Block-major runs share this storage."""
        if not isinstance(counts, list | tuple) or not all(isinstance(n, INTEGERS) for n in counts):
            raise TypeError(f"SymmetricBlocks.split: expected a list of integers, got {counts!r}")
        if sum(counts) != self.count or min(counts, default=0) < 0:
            raise ValueError(f"SymmetricBlocks.split: expected counts that add up to {self.count}, got {list(counts)}")
        if len(counts) == 1:
            return [self]
        if self.size > MAX_TILED_SIZE:
            runs = self.data.split(list(counts))
            return [SymmetricBlocks(run, count, self.size) for run, count in zip(runs, counts, strict=True)]
        return [SymmetricBlocks.from_packed(run) for run in self.to_packed().split(list(counts))]

    def clone(self) -> SymmetricBlocks:
        return SymmetricBlocks(self.data.clone(), self.count, self.size)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SymmetricBlocks:
        """The same blocks on another device or in another dtype (float32 or float64)."""
        _check_dtype("SymmetricBlocks.to", dtype or self.dtype)
        return SymmetricBlocks(self.data.to(device=device, dtype=dtype), self.count, self.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"SymmetricBlocks(count={self.count}, size={self.size}, dtype={self.dtype}, device='{self.device}')"


def pack_dense(
    dense: Tensor,  # [B, n, n]
) -> Tensor:
    """The storage tensor of the blocks' lower triangles; symmetry is the caller's word."""
    count, size, _ = dense.shape
    packing, _ = _packing(size, dense.device)
    return _store(dense.reshape(count, size * size)[:, packing], count, size)


def _store(packed: Tensor, count: int, size: int) -> Tensor:
    data = packed.new_zeros(storage_shape(count, size))
    if size > MAX_TILED_SIZE:
        data[:, : triangle_size(size)] = packed
    elif count:
        padding = data.shape[0] * TILE_BLOCKS - count
        rows = torch.cat([packed, packed.new_zeros(padding, triangle_size(size))]) if padding else packed
        data.copy_(rows.view(data.shape[0], TILE_BLOCKS, -1).transpose(1, 2))
    return data


def check_storage(op: str, data: Tensor, count: int, size: int) -> None:
    """Raises unless ``data`` is the storage of ``count`` blocks of ``size``."""
    _check_tensor(op, "data", data)
    _check_extent(op, count, size)
    shape = storage_shape(count, size)
    if data.shape != shape:
        raise ValueError(
            f"{op}: expected storage of shape {list(shape)} for {count} blocks of {size}x{size}, got {list(data.shape)}"
        )
    if not data.is_contiguous():
        raise ValueError(f"{op}: expected contiguous storage, got strides {list(data.stride())}")


def has_memory(value: object) -> bool:
    """Whether it is a tensor, and none that stands for others, as a DTensor does: its address is 0."""
    return isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)


def _check_extent(op: str, count: int, size: int) -> None:
    if not (isinstance(count, INTEGERS) and isinstance(size, INTEGERS)):
        raise TypeError(f"{op}: expected count and size to be integers, got {count!r} and {size!r}")
    if count < 0 or size < 1:
        raise ValueError(f"{op}: expected count >= 0 and size >= 1, got {count} and {size}")


def _check_tensor(op: str, name: str, tensor: Tensor, ndim: int | None = None) -> None:
    if not has_memory(tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: expected {name} to be a dense tensor, got layout {tensor.layout}")
    _check_dtype(op, tensor.dtype)
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{op}: expected {name} to have {ndim} dimensions, got shape {list(tensor.shape)}")


def _check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{op}: expected float32 or float64, got {dtype}")
