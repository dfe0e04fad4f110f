"""Where tensors lie and how: what a kept launch asks before it trusts the addresses that it was made with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from . import native


class Memory(Protocol):
    """A list of tensors as it was once."""

    def addresses(self, tensors: list[Tensor]) -> Iterable[int] | None:
        """As a launch takes them, of tensors that are like those in all but their place; None where one is not."""

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether the tensors are where those were, too."""


def memory_of(tensors: list[Tensor]) -> Memory:
    """By torch's DLPack table where there is one: a question costs much less there than in Python."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None or native.UNAVAILABLE:
        return _Memory(tensors)
    try:
        return native._C.TensorMemory(table, Tensor, tensors)
    except (BufferError, RuntimeError, ValueError):  # tensors that DLPack does not know, or another DLPack
        return _Memory(tensors)


class _Memory:
    def __init__(self, tensors: list[Tensor]):
        self._layouts, self._places = self._layouts_of(tensors), list(map(Tensor.data_ptr, tensors))

    @staticmethod
    def _layouts_of(tensors: list[Tensor]) -> list[tuple] | None:
        if not all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in tensors):
            return None
        return [(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() == 0) for t in tensors]

    def addresses(self, tensors: list[Tensor]) -> list[int] | None:
        return list(map(Tensor.data_ptr, tensors)) if self._layouts_of(tensors) == self._layouts else None

    def holds(self, tensors: list[Tensor]) -> bool:
        return self.addresses(tensors) == self._places
