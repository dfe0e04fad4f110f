"""A step op over tensors that stay: checked once, then repeated with new gradients at a fraction of the host's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import choose
from .blocks import SymmetricBlocks
from .options import step_options
from .step_ops import mbf_diagonal_step_, mbf_shared_step_, mbf_step_

_OPS = {"mbf_step_": mbf_step_, "mbf_shared_step_": mbf_shared_step_, "mbf_diagonal_step_": mbf_diagonal_step_}
_PREPARE = {"mbf_step_": "prepare_step", "mbf_shared_step_": "prepare_shared", "mbf_diagonal_step_": "prepare_diagonal"}

View = Callable[[Tensor], Tensor]


class PreparedStep:
    """One of the step ops, kept to be called again with other gradients.

    The first call runs the op with all its checks. Later ones only look whether every tensor is still where it was and
    every gradient laid out as before, and then launch; where something has changed, the op runs again as if it were the
    first time. So a call never does anything else than the op.

    Args:
        op: "mbf_step_", "mbf_shared_step_" or "mbf_diagonal_step_".
        params, momenta, squares: tensors; for each a tuple of one or two where a bias joins.
        views: for each of those tensors the view of it (and of its gradient, momentum and second moment) that the op
            takes; None: as it is.
        fishers, factors, skipped: as the op takes them.
    """

    def __init__(
        self,
        op: str,
        params: Sequence[tuple[Tensor, ...]],
        momenta: Sequence[tuple[Tensor, ...]],
        squares: Sequence[tuple[Tensor, ...]] | None = None,
        fishers: Sequence[SymmetricBlocks] | None = None,
        factors: Sequence[SymmetricBlocks] | None = None,
        skipped: Sequence[Tensor] | None = None,
        views: Sequence[tuple[View | None, ...]] | None = None,
    ):
        self._op = op
        self._tensors = {"params": params, "momenta": momenta, "squares": squares}
        self._matrices = {"fishers": fishers, "factors": factors, "skipped": skipped}
        self._views = views or [(None,) * len(parts) for parts in params]
        blocks = [block.data for group in (fishers, factors) for block in group or ()]
        vectors = [part for group in self._tensors.values() for parts in group or () for part in parts]
        self._written = [*vectors, *blocks, *(skipped or ())]
        self._size = fishers[0].size if fishers else 1
        self._kept: _Kept | None = None

    def __call__(
        self,
        grads: Sequence[Tensor],  # of all params in a row
        *,
        momentum_weight: float | Tensor = 1.0,
        second_weight: float | Tensor = 1.0,  # fisher_weight or square_weight
        **options,  # of the op
    ) -> None:
        """Raises what the op raises."""
        backend = choose(self._op, self._written[0].device, self._size)
        kept = self._kept
        if kept is None or not kept.fits(backend, grads, self._written):
            self._run(grads, momentum_weight, second_weight, options)
            self._kept = _Kept.of(self, backend, grads)
            return
        checked = step_options(self._op, **options)
        checked.check(self._op)
        kept.launch(kept.gradients(grads), momentum_weight, second_weight, checked)
        torch.autograd.graph.increment_version(self._written)

    def _run(self, grads: Sequence[Tensor], momentum_weight, second_weight, options: dict) -> None:
        second = "fisher_weight" if self._op == "mbf_step_" else "square_weight"
        weights = {"momentum_weight": momentum_weight, second: second_weight}
        matrices = {name: value for name, value in self._matrices.items() if self._matrices["fishers"] is not None}
        _OPS[self._op](**self._arguments(grads), **matrices, **weights, **options)

    def _arguments(self, grads: Sequence[Tensor]) -> dict[str, list]:
        """The tensors as the op takes them."""
        rest = iter(grads)
        groups = self._tensors | {"grads": [tuple(next(rest) for _ in parts) for parts in self._views]}
        if self._op == "mbf_step_":
            del groups["squares"]
        return {name: self._viewed_all(group) for name, group in groups.items()}

    def _viewed_all(self, group: Sequence[tuple[Tensor, ...]] | None) -> list | None:
        if group is None:
            return None
        return [self._viewed(parts, views) for parts, views in zip(group, self._views, strict=True)]

    @staticmethod
    def _viewed(parts: tuple[Tensor, ...], views: tuple[View | None, ...]) -> Tensor | tuple[Tensor, ...]:
        viewed = tuple(part if view is None else view(part) for part, view in zip(parts, views, strict=True))
        return viewed if len(viewed) > 1 else viewed[0]


class _Kept:
    """A launch, and what it was made for."""

    def __init__(
        self, launch: Any, backend: Any, written: Sequence[Tensor], grads: Sequence[Tensor], offsets: list[int]
    ):
        self.launch = launch
        self._backend = backend
        self._addresses = list(map(Tensor.data_ptr, written))
        self._strides = list(map(Tensor.stride, grads))
        self._kinds = {(grad.dtype, grad.device) for grad in grads}
        self._offsets = offsets if any(offsets) else None

    @classmethod
    def of(cls, step: PreparedStep, backend: Any, grads: Sequence[Tensor]) -> _Kept | None:
        """None where the backend has no launch to keep."""
        prepare = getattr(backend, _PREPARE[step._op], None)
        if prepare is None:
            return None
        arguments = step._arguments(grads)
        names = ("params", "grads", "momenta", "squares") if step._op != "mbf_step_" else ("params", "grads", "momenta")
        tensors = [arguments[name] or [] for name in names]
        if step._op == "mbf_shared_step_":
            tensors = [[parts if isinstance(parts, tuple) else (parts,) for parts in entries] for entries in tensors]
        matrices = [value or [] for value in step._matrices.values()] if step._matrices["fishers"] else []
        launch = prepare(*tensors, *matrices)
        if launch is None:
            return None
        flat = [part for parts in arguments["grads"] for part in (parts if isinstance(parts, tuple) else (parts,))]
        offsets = [view.data_ptr() - grad.data_ptr() for view, grad in zip(flat, grads, strict=True)]
        return cls(launch, backend, step._written, grads, offsets)

    def fits(self, backend: Any, grads: Sequence[Tensor], written: Sequence[Tensor]) -> bool:
        return (
            backend is self._backend
            and list(map(Tensor.stride, grads)) == self._strides
            and list(map(Tensor.data_ptr, written)) == self._addresses
            and {(grad.dtype, grad.device) for grad in grads} == self._kinds
        )

    def gradients(self, grads: Sequence[Tensor]) -> list[int]:
        addresses = list(map(Tensor.data_ptr, grads))
        return [a + o for a, o in zip(addresses, self._offsets, strict=True)] if self._offsets else addresses
