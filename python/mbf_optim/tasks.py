"""The work of a step on one kind of mini-blocks of a layer, and its launches: one for each kind, size and clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mbf_kernels import PreparedStep, SymmetricBlocks

from .layers import Layer
from .partition import Blocks
from .schedule import DeviceClock, HostClock, intervals

View = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Tensors:
    """Of a weight and what joins it: the parameters, M and v, one tensor each or two."""

    params: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...]
    squares: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, params: Sequence[Tensor], states: dict) -> Tensors:
        momenta = tuple(states[param]["momentum"] for param in params)
        has_squares = "second_moment" in states[params[0]]
        squares = tuple(states[param]["second_moment"] for param in params) if has_squares else None
        return cls(tuple(params), momenta, squares)


@dataclass(slots=True)
class Task:
    blocks: Blocks | None  # None: the diagonal step
    tensors: Tensors
    grads: tuple[int, ...]  # which of the gradients that a launch is given
    views: tuple[View | None, ...]
    state: dict

    @property
    def op(self) -> str:
        if self.blocks is None:
            return "mbf_diagonal_step_"
        return "mbf_shared_step_" if self.blocks.shared else "mbf_step_"

    @property
    def fisher(self) -> SymmetricBlocks:
        return self.state["fisher" + self.blocks.suffix]

    def factor(self) -> SymmetricBlocks:
        """The cached factor; zero until it is written."""
        name, fisher = "factor" + self.blocks.suffix, self.fisher
        if name not in self.state:
            self.state[name] = SymmetricBlocks.zeros(fisher.count, fisher.size, fisher.dtype, fisher.device)
        return self.state[name]


def tasks_of(layer: Layer, tensors: Tensors, grads: Sequence[int], state: dict) -> list[Task]:
    """The work on a layer whose ``tensors`` are its parameters, in place."""
    if not layer.blocks:
        return [Task(None, tensors, tuple(grads), (None,), state)]
    tasks = []
    for blocks in layer.blocks:
        parts = slice(2 if blocks.bias == "last" else 1)
        squares = tensors.squares[parts] if tensors.squares and blocks.shared else None
        chosen = Tensors(tensors.params[parts], tensors.momenta[parts], squares)
        views = (partial(layer.view, blocks), None)[parts]
        tasks.append(Task(blocks, chosen, tuple(grads[parts]), views, state))
    return tasks


class Launch:
    """All tasks of one kind, size and clock, as one call of a step op."""

    def __init__(self, tasks: list[Task], clock: HostClock | DeviceClock, group: dict):
        first = tasks[0]
        self._op, self._clock = first.op, clock
        self._grads = [index for task in tasks for index in task.grads]
        self._intervals = intervals(first.blocks, group) if first.blocks else (1, 1)
        tensors = [task.tensors for task in tasks]
        matrices = {}
        if first.blocks:
            cached = self._intervals[1] > 1
            self._without_factor = cached and any("factor" + task.blocks.suffix not in task.state for task in tasks)
            matrices = {
                "fishers": [task.fisher for task in tasks],
                "factors": [task.factor() for task in tasks] if cached else None,
                "skipped": [task.state["skipped"] for task in tasks],
            }
        self._step = PreparedStep(
            self._op,
            [t.params for t in tensors],
            [t.momenta for t in tensors],
            [t.squares for t in tensors] if tensors[0].squares else None,
            views=[task.views for task in tasks],
            **matrices,
        )

    def __call__(self, grads: Sequence[Tensor], group: dict) -> None:
        momentum_weight, square_weight, fisher_weight = self._clock.weights(group)
        options = {name: group[name] for name in ("lr", "momentum", "weight_decay", "eps", "maximize", "graft")}
        if self._op != "mbf_step_":
            options["diagonal_decay"] = group["diagonal_decay"]
        if self._op != "mbf_diagonal_step_":
            options |= {name: group[name] for name in ("decay", "damping", "nesterov")}
            options["relative"] = group["relative_damping"]
            options["update"], options["refactor"] = self._due()
        self._step(
            [grads[i] for i in self._grads],
            momentum_weight=momentum_weight,
            second_weight=fisher_weight if self._op == "mbf_step_" else square_weight,
            **options,
        )
        self._without_factor = False

    def _due(self) -> tuple[bool, bool]:
        """Whether F is to be updated, and whether it is to be factored."""
        t1, t2 = self._intervals
        if t1 == t2 == 1:
            return True, True
        t = self._clock.step - 1  # the paper counts from 0
        update = t % t1 == 0
        return update, (t <= t2 and update) or t % t2 == 0 or self._without_factor


def launches_of(tasks: list[Task], group: dict) -> list[Launch]:
    kinds: dict[tuple, list[Task]] = {}
    for task in tasks:
        param, size = task.tensors.params[0], task.blocks.size if task.blocks else 0
        key = (task.op, size, param.device, param.dtype, id(task.state["clock"]))
        kinds.setdefault(key, []).append(task)
    return [Launch(alike, alike[0].state["clock"], group) for alike in kinds.values()]


class Copies:
    """A layer whose blocks are no views of its parameters: copies of them, for one step.

    [W | b] where blocks run across both; and where one of the two has no gradient, its copy, whose gradient is zero:
    it keeps its values.
    """

    def __init__(self, layer: Layer, states: dict):
        self._layer = layer
        self._real = Tensors.of(layer.params, states)
        self._state = states[layer.weight]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.params]
        if layer.joined:
            self.grads = [_joined(grads)]
            squares = None if self._real.squares is None else (_joined(self._real.squares),)
            self._copy = Tensors((_joined(self._real.params),), (_joined(self._real.momenta),), squares)
        else:
            self.grads = grads
            self._copy = Tensors(*(self._stand_in(tensors) for tensors in self._groups(self._real)))

    def tasks(self, first_grad: int) -> list[Task]:
        return tasks_of(self._layer, self._copy, range(first_grad, first_grad + len(self.grads)), self._state)

    def write_back(self) -> None:
        for real, copy in zip(self._groups(self._real), self._groups(self._copy), strict=True):
            if real is None:
                continue
            parts = (copy[0][:, :-1], copy[0][:, -1]) if self._layer.joined else copy
            for param, to, part in zip(self._layer.params, real, parts, strict=True):
                if param.grad is not None and to is not part:
                    to.copy_(part)

    @staticmethod
    def _groups(tensors: Tensors) -> tuple:
        return tensors.params, tensors.momenta, tensors.squares

    def _stand_in(self, tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        if tensors is None:
            return None
        with_grads = zip(tensors, self._layer.params, strict=True)
        return tuple(tensor if param.grad is not None else tensor.clone() for tensor, param in with_grads)


def _joined(weight_and_bias: Sequence[Tensor]) -> Tensor:
    weight, bias = weight_and_bias
    return torch.cat([weight, bias[:, None]], 1)
