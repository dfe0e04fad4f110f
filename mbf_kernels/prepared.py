"""A step op over tensors that stay: checked once, then repeated with new gradients at a fraction of the host's time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .backend import asked_for, choose
from .blocks import SymmetricBlocks
from .memory import memory_of
from .options import step_options
from .step_ops import mbf_diagonal_step_, mbf_shared_step_, mbf_step_

_OPS = {"mbf_step_": mbf_step_, "mbf_shared_step_": mbf_shared_step_, "mbf_diagonal_step_": mbf_diagonal_step_}
_PREPARE = {"mbf_step_": "prepare_step", "mbf_shared_step_": "prepare_shared", "mbf_diagonal_step_": "prepare_diagonal"}

View = Callable[[Tensor], Tensor]


class StepNumbers(NamedTuple):
    """What may change from step to step: each a number, or one on the device."""

    momentum_weight: float | Tensor
    second_weight: float | Tensor  # fisher_weight or square_weight
    lr: float | Tensor
    damping: float | Tensor


class PreparedStep:
    """One of the step ops, kept to be called again with other gradients.

    The first call runs the op with all its checks. Later ones only look whether every tensor is still where it was and
    every gradient laid out as before, and then launch; where something has changed, the op runs again as if it were the
    first time. So a call never does anything else than the op. Who has to look at all of several steps before the first
    one moves anything calls ``aim``, and where it says True ``launch``.

    Args:
        op: "mbf_step_", "mbf_shared_step_" or "mbf_diagonal_step_".
        params, momenta, squares: tensors, or for each a tuple of one, or of two where a bias joins.
        views: for each of those tensors the view of it (and of its gradient, momentum and second moment) that the op
            takes; None: as it is.
        fishers, factors, skipped: as the op takes them.
        params_move: the params are parts of memory of their own, which may be another one at every call; a call where
            they only have moved is a later one, too.
    """

    def __init__(
        self,
        op: str,
        params: Sequence[Tensor | tuple[Tensor, ...]],
        momenta: Sequence[Tensor | tuple[Tensor, ...]],
        squares: Sequence[Tensor | tuple[Tensor, ...]] | None = None,
        fishers: Sequence[SymmetricBlocks] | None = None,
        factors: Sequence[SymmetricBlocks] | None = None,
        skipped: Sequence[Tensor] | None = None,
        views: Sequence[tuple[View | None, ...]] | None = None,
        params_move: bool = False,
    ):
        if not isinstance(op, str) or op not in _OPS:
            raise ValueError(f"PreparedStep: expected op to be one of {', '.join(_OPS)}, got {op!r}")
        self._op = op
        params, momenta = checks.parts(op, "params", params), checks.parts(op, "momenta", momenta)
        squares = None if squares is None else checks.parts(op, "squares", squares)
        checks.block_lists(op, **{n: g for n, g in (("fishers", fishers), ("factors", factors)) if g is not None})
        checks.tensor_lists(op, skipped=() if skipped is None else skipped)
        self._tensors = {"params": params, "momenta": momenta, "squares": squares}
        self._matrices = {"fishers": fishers, "factors": factors, "skipped": skipped}
        self._views = views or [(None,) * len(parts) for parts in params]
        checks.same_length(op, **{n: g for n, g in self._tensors.items() if g is not None}, views=self._views)
        self._params = [part for parts in params for part in parts]
        others = [part for group in (momenta, squares) for parts in group or () for part in parts]
        blocks = [block.data for group in (fishers, factors) for block in group or ()]
        self._kept_in_place = [*others, *blocks] if params_move else [*self._params, *others, *blocks]
        self._moving = self._params if params_move else []
        self._counters = [counter.untyped_storage() for counter in skipped or ()]  # stay valid, wherever they move
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
        checks.tensor_lists(self._op, grads=grads)
        if len(grads) != len(self._params):
            raise ValueError(f"{self._op}: expected {len(self._params)} grads, got {len(grads)}")
        grads = list(grads)
        if self.aim(grads) and self._kept.takes(options):
            numbers = StepNumbers(momentum_weight, second_weight, options.pop("lr"), options.pop("damping", 0.0))
            return self.launch(numbers, options)
        self._run(grads, momentum_weight, second_weight, options)
        traced = torch.compiler.is_compiling()  # then the op itself is wanted, which a graph can hold
        if self._params and not self._params[0].is_meta and not traced:  # nothing to do, or a trace: none serves them
            self._kept = _Kept.of(self, grads, options)

    def aim(self, grads: list[Tensor]) -> bool:
        """Points the kept launch at gradients; False where they, or what is written, ask for the op itself."""
        if torch.compiler.is_compiling() or self._kept is None:
            return False
        if not self._kept.aim(grads, self._moving, self._kept_in_place):
            return False
        if torch.is_grad_enabled():
            checks.no_grad(self._op, *self._moving, *self._kept_in_place, *grads)
        return True

    def launch(self, numbers: StepNumbers, options: dict) -> None:
        """The step, once ``aim`` has said True. ``options``: the others, by the names of the first call."""
        self._kept(numbers, options)
        torch.autograd.graph.increment_version(self._params)

    def _run(
        self, grads: Sequence[Tensor], momentum_weight: float | Tensor, second_weight: float | Tensor, options: dict
    ) -> None:
        for i, grad in enumerate(grads):
            if grad.layout != torch.strided:
                raise TypeError(f"{self._op}: expected grads[{i}] to be a dense tensor, got layout {grad.layout}")
        weights = {"momentum_weight": momentum_weight, _second_weight(self._op): second_weight}
        matrices = self._matrices if self._matrices["fishers"] is not None else {}
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
        self,
        op: str,
        launch: Any,
        step: PreparedStep,
        grads: _Moving,
        params: _Moving,
        names: set[str],  # of the options
    ):
        self._op, self._launch, self._asked_for = op, launch, asked_for()
        self._grads, self._params, self._in_place = grads, params, memory_of(step._kept_in_place)
        self._names, self._like = names, step._params[:1]
        self._options: dict | None = None  # those that the launch last had

    @classmethod
    def of(cls, step: PreparedStep, grads: list[Tensor], options: dict) -> _Kept | None:
        """None where the backend has no launch to keep, or where a lazy minus stands before a tensor."""
        if any(map(Tensor.is_neg, (*step._params, *step._kept_in_place, *grads))):
            return None
        prepare = getattr(choose(step._op, step._params[0].device, step._size), _PREPARE[step._op], None)
        if prepare is None:
            return None
        arguments = step._arguments(grads)
        entries = {name: [_entry(parts) for parts in group or ()] for name, group in arguments.items()}
        tensors = [
            group if step._op == "mbf_shared_step_" else [part for parts in group for part in parts]
            for group in (entries[name] for name in ("params", "grads", "momenta", "squares") if name in entries)
        ]
        matrices = [value or [] for value in step._matrices.values()] if step._matrices["fishers"] is not None else []
        launch = prepare(*tensors, *matrices)
        if launch is None:
            return None
        of_params = _Moving(step._moving, entries["params"] if step._moving else [])
        return cls(step._op, launch, step, _Moving(grads, entries["grads"]), of_params, set(options))

    def aim(self, grads: list[Tensor], params: list[Tensor], in_place: list[Tensor]) -> bool:
        """Whether all is laid out as it was, and where it was, but for what moves: the launch takes its places."""
        if asked_for() != self._asked_for or not self._in_place.holds(in_place):
            return False
        of_grads, of_params = self._grads.addresses(grads), self._params.addresses(params)
        if of_grads is None or of_params is None:
            return False
        if any(map(Tensor.is_neg, grads)):  # a lazy minus is not in the memory
            return False
        self._launch.set_gradients(of_grads)
        if params:
            self._launch.set_params(of_params)
        return True

    def takes(self, options: dict) -> bool:
        return options.keys() == self._names

    def __call__(self, numbers: StepNumbers, options: dict) -> None:
        if options != self._options:
            checked = step_options(self._op, lr=numbers.lr, damping=numbers.damping, **options)
            checked.check(self._op)
            self._launch.set_options(checked)
            self._options = options
        self._check_rate("lr", numbers.lr)
        self._check_rate("damping", numbers.damping)
        self._check_weight("momentum_weight", numbers.momentum_weight)
        self._check_weight(_second_weight(self._op), numbers.second_weight)
        self._launch(*numbers)

    def _check_rate(self, name: str, rate: float | Tensor) -> None:
        if type(rate) is float and 0 <= rate < math.inf:
            return
        if isinstance(rate, Tensor):
            checks.device_scalars(self._op, self._like[0], **{name: rate})
        else:
            checks.non_negative(self._op, **{name: checks.number(self._op, name, rate)})

    def _check_weight(self, name: str, weight: float | Tensor) -> None:
        if type(weight) is float and 0 < weight <= 1:
            return
        is_tensor = isinstance(weight, Tensor)
        numbers = [] if is_tensor else [checks.number(self._op, name, weight)]
        checks.weights(self._op, name, numbers, [weight] if is_tensor else [], self._like)


class _Moving:
    """Tensors that may lie elsewhere at every call, and their views, which the launch takes."""

    def __init__(self, tensors: list[Tensor], views: list[tuple[Tensor, ...]]):
        self._memory = memory_of(tensors)
        parts = [part for of_tensor in views for part in of_tensor]
        offsets = [part.data_ptr() - tensor.data_ptr() for part, tensor in zip(parts, tensors, strict=True)]
        self._offsets = offsets if any(offsets) else None

    def addresses(self, tensors: list[Tensor]) -> Iterable[int] | None:
        """Of the views; None where a tensor is laid out in another way than it was."""
        addresses = self._memory.addresses(tensors)
        if addresses is None or self._offsets is None:
            return addresses
        return list(map(add, addresses, self._offsets))


def _second_weight(op: str) -> str:
    return "fisher_weight" if op == "mbf_step_" else "square_weight"


def _entry(parts: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return parts if isinstance(parts, tuple) else (parts,)
