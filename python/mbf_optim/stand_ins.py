"""Parameters of low precision: float32 tensors in their stead while a step is taken, rounded into them after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .rounding import round_stochastically_
from .sharding import local, local_gradient
from .state import States

_ALIGNED = 64  # elements: where vectors of any width may start


class StandIns:
    """Of parameters of one dtype and device: their masters, or float32 copies for a step, with gradients in float32.

    They are the same tensors at every step, so that launches over them can be kept; the memory of copies and gradients
    is there from ``fill`` to ``release`` only. Of sharded parameters they are what is on this process.
    """

    def __init__(self, params: Sequence[Tensor], states: States):
        self._params, self._here = params, list(map(local, params))
        self._with_grads = [param for param in params if param.grad is not None]
        self._grads = _Buffer([local(param) for param in self._with_grads])
        self._copies = None if "master" in states[params[0]] else _Buffer(self._here)
        weights = self._copies.parts if self._copies else [local(states[p]["master"]).detach() for p in params]
        self.of = dict(zip(params, weights, strict=True))
        for param, grad in zip(self._with_grads, self._grads.parts, strict=True):
            self.of[param].grad = grad

    def fill(self, unscale: Tensor | None) -> None:
        """``unscale``: what gradients are multiplied by."""
        self._grads.take()
        torch._foreach_copy_(self._grads.parts, [local_gradient(param) for param in self._with_grads])
        if unscale is not None:
            self._grads.flat.mul_(unscale.to(self._grads.flat.device))
        if self._copies:
            self._copies.take()
            torch._foreach_copy_(self._copies.parts, self._here)
        else:
            for master, here in zip(self.of.values(), self._here, strict=True):
                _follow(master, here)

    def write_back(self, seed: int | None) -> None:
        """Rounded to the nearest, or at random with a seed, the same on all processes."""
        if self._copies and seed is not None:
            generator = torch.Generator(self._copies.flat.device).manual_seed(seed)
            round_stochastically_(self._copies.flat, self._params[0].dtype, generator)
        torch._foreach_copy_(self._here, list(self.of.values()))

    def release(self) -> None:
        self._grads.release()
        if self._copies:
            self._copies.release()


def stand_ins_of(params: Iterable[Tensor], states: States) -> list[StandIns]:
    kinds: dict[tuple, list[Tensor]] = {}
    for param in params:
        kinds.setdefault((param.dtype, param.device, "master" in states[param]), []).append(param)
    return [StandIns(alike, states) for alike in kinds.values()]


def by_parameter(kinds: Iterable[StandIns]) -> dict[Tensor, Tensor]:
    return {param: tensor for kind in kinds for param, tensor in kind.of.items()}


def _follow(master: Tensor, param: Tensor) -> None:
    """A master gives way where the parameter has been given other values since."""
    torch.where(master.to(param.dtype) == param, master, param, out=master)


class _Buffer:
    """Float32 tensors like others, ``parts`` of one that is ``flat``; their memory is there from ``take`` to
    ``release``."""

    def __init__(self, like: Sequence[Tensor]):
        sizes = [-(-tensor.numel() // _ALIGNED) * _ALIGNED for tensor in like]
        starts = list(accumulate(sizes, initial=0))
        self.flat = torch.empty(starts[-1], dtype=torch.float32, device=like[0].device if like else None)
        self.parts = [
            self.flat[start:end].as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
            for tensor, (start, end) in zip(like, pairwise(starts), strict=True)
        ]
        self._bytes = self.flat.untyped_storage().nbytes()
        self.release()

    def take(self) -> None:
        self.flat.untyped_storage().resize_(self._bytes)

    def release(self) -> None:
        self.flat.untyped_storage().resize_(0)
