"""The processes that train replicas of one model, each on a part of the batch: what makes the parts one batch again."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional

from .capture import Use
from .triangles import packed, unpacked


class Extent(NamedTuple):
    """Of what a process has seen of a layer."""

    samples: int = 0
    locations: int = 0  # of all samples
    most: int = 0  # of one sample


class Share(NamedTuple):
    """What of a layer this process has seen, and the extents of what all have."""

    uses: list[Use]
    own: Extent
    everywhere: list[Extent]

    @property
    def divisor(self) -> int:
        """Of sums over samples, so that their totals are means: over the samples of a process, and over the processes
        that have seen the layer. These count alike, as they do in the gradient that DistributedDataParallel makes."""
        return max(self.own.samples, 1) * sum(bool(extent.samples) for extent in self.everywhere)

    @property
    def locations(self) -> float:
        """T, in such a mean."""
        means = [extent.locations / extent.samples for extent in self.everywhere if extent.samples]
        return sum(means) / len(means)

    @property
    def root_weight(self) -> float:
        """The root of a sample's weight in such a mean, times m of all processes: 1 where all have as many."""
        return (sum(self.lengths) / self.divisor) ** 0.5

    @property
    def lengths(self) -> list[int]:
        """m of every process."""
        return [extent.samples for extent in self.everywhere]

    @property
    def most(self) -> int:
        """Locations of a sample."""
        return max(extent.most for extent in self.everywhere)


class Seen(NamedTuple):
    """Of a layer in an update, of the samples of all processes."""

    locations: float  # T, on average
    matrices: dict[str, Tensor] = {}  # sums, symmetric [groups, n, n]
    sums: dict[str, Tensor] = {}  # others
    samples: dict[str, Tensor] = {}  # [m, ...]


Key = TypeVar("Key")


class Replicas:
    """Every process has to call the same methods in the same order, with tensors of the same shapes. Of one process
    alone they return what they get.

    Args:
        title: of the optimizer, for errors.
        group: a torch.distributed group; None: the default one, if there is one when it is needed.
        device: of numbers that are sent.
    """

    def __init__(self, title: str, group: distributed.ProcessGroup | None, device: torch.device):
        if group is not None and not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            raise TypeError(
                f"{title}: expected process_group to be a torch.distributed.ProcessGroup of this process or None, "
                f"got {group!r}"
            )
        self._title, self._group, self._device = title, group, device
        self._agreed: str | None = None  # what all processes have alike

    @property
    def count(self) -> int:
        initialized = distributed.is_available() and distributed.is_initialized()
        return distributed.get_world_size(self._group) if initialized else 1

    def table(self, rows: Sequence[Sequence[int]], of: str) -> list[Sequence[Sequence[int]]]:
        """Of each row those of all processes; RuntimeError in all if what the rows are ``of`` is not the same there."""
        if self.count == 1:
            return [[row] for row in rows]
        if of != self._agreed:
            checksum = zlib.crc32(of.encode())
            if self._gathered(torch.tensor([checksum], device=self._device)).ne(checksum).any():
                raise RuntimeError(
                    f"{self._title}: expected the {self.count} processes of the group to train the same layers, "
                    "got different ones; process_group says which processes train a model together"
                )
            self._agreed = of
        return self._gathered(torch.tensor(rows, device=self._device)).transpose(0, 1).tolist()

    def concatenated(self, samples: Tensor, lengths: Sequence[int], dim: int = 0) -> Tensor:
        """Along ``dim``, where every process has so many."""
        if self.count == 1:
            return samples
        missing = max(lengths) - samples.shape[dim]
        samples = functional.pad(samples, (0, 0) * (samples.ndim - 1 - dim) + (0, missing))
        parts = self._gathered(samples.contiguous())
        return torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)], dim)

    def totals(self, parts: Iterable[tuple[Key, Seen]]) -> Iterator[tuple[Key, Seen]]:
        """With sums over the processes, in place: one all-reduce for each device and dtype, of half of every symmetric
        matrix. What has no sums, and all of one process, comes as soon as it is there."""
        waiting = []
        for key, seen in parts:
            if self.count == 1 or not (seen.matrices or seen.sums):
                yield key, seen
            else:
                waiting.append((key, seen))
        self._all_reduce([seen for _, seen in waiting])
        yield from waiting

    def _all_reduce(self, parts: Sequence[Seen]) -> None:
        alike: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for seen in parts:
            messages = [(matrix, packed(matrix)) for matrix in seen.matrices.values()]
            for target, message in messages + [(tensor, tensor) for tensor in seen.sums.values()]:
                alike.setdefault((target.device, target.dtype), []).append((target, message))
        for pairs in alike.values():
            buffer = torch.cat([message.flatten() for _, message in pairs])
            distributed.all_reduce(buffer, group=self._group)
            totals = buffer.split([message.numel() for _, message in pairs])
            for (target, message), total in zip(pairs, totals, strict=True):
                total = total.view(message.shape)
                target.copy_(total if message is target else unpacked(total))

    def _gathered(self, tensor: Tensor) -> Tensor:
        """[processes, ...]."""
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor, group=self._group)
        return torch.stack(parts)
