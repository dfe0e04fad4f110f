"""The work of a step on one kind of mini-blocks of a layer, and its launches: one for each kind, size and clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mbf_kernels import PreparedStep, StepNumbers, SymmetricBlocks

from .layers import Layer
from .partition import Blocks
from .schedule import DeviceClock, HostClock, intervals
from .sharding import is_sharded, local, local_gradient

View = Callable[[Tensor], Tensor]

# What a group says of each op: its rates, and under the op's names its other options.
_RATES = {"mbf_diagonal_step_": ("lr",), "mbf_shared_step_": ("lr", "damping"), "mbf_step_": ("lr", "damping")}
_DIAGONAL = {n: n for n in ("momentum", "weight_decay", "diagonal_decay", "eps", "maximize", "graft")}
_SHARED = _DIAGONAL | {n: n for n in ("decay", "nesterov")} | {"relative": "relative_damping"}
_STEP = {name: of_group for name, of_group in _SHARED.items() if name != "diagonal_decay"}
_OPTIONS = {"mbf_diagonal_step_": _DIAGONAL, "mbf_shared_step_": _SHARED, "mbf_step_": _STEP}


@dataclass(slots=True)
class Tensors:
    """Of a weight and what joins it: what is written, the parameters or what stands in for them, M and v, one tensor
    each or two. All lie here."""

    params: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...]
    squares: tuple[Tensor, ...] | None
    owners: tuple[Tensor, ...]  # of the gradients

    @classmethod
    def of(cls, params: Sequence[Tensor], states: dict, stand_ins: Mapping[Tensor, Tensor]) -> Tensors:
        squares = [states[param].get("second_moment") for param in params]
        owners = tuple(stand_ins.get(param, param) for param in params)
        return cls(
            tuple(map(local, owners)),
            tuple(local(states[param]["momentum"]) for param in params),
            tuple(map(local, squares)) if squares[0] is not None else None,
            owners,
        )


@dataclass(slots=True)
class Task:
    layer: Layer
    blocks: Blocks | None  # None: the diagonal step
    tensors: Tensors
    views: tuple[View | None, ...]
    state: dict

    @property
    def averaged_over(self) -> tuple:
        """The process groups over which F is averaged."""
        return self.layer.averaged_over if self.blocks is not None and self.blocks.shared else ()

    def gradients(self) -> Tensor:
        """Those of the mini-blocks, [S, R, n]: S share each of R matrices."""
        blocks = self.blocks
        grads = [local_gradient(owner) for owner in self.tensors.owners]
        viewed = [grad if view is None else view(grad) for view, grad in zip(self.views, grads, strict=True)]
        main = viewed[0].reshape(blocks.sharing, blocks.count, blocks.size - len(viewed) + 1)
        return main if len(viewed) == 1 else torch.cat([main, viewed[1].reshape(-1, 1, 1)], 2)

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


def tasks_of(layer: Layer, tensors: Tensors, state: dict) -> list[Task]:
    """The work on a layer whose ``tensors`` are its parameters, in place."""
    if not layer.blocks:
        return [Task(layer, None, tensors, (None,), state)]
    tasks = []
    for blocks in layer.blocks:
        parts = slice(2 if blocks.bias == "last" else 1)
        squares = tensors.squares[parts] if tensors.squares and blocks.shared else None
        chosen = Tensors(tensors.params[parts], tensors.momenta[parts], squares, tensors.owners[parts])
        tasks.append(Task(layer, blocks, chosen, (partial(layer.view, blocks), None)[parts], state))
    return tasks


class Launch:
    """All tasks of one kind, size and clock, as one call of a step op."""

    def __init__(self, tasks: list[Task], clock: HostClock | DeviceClock, group: dict):
        first = tasks[0]
        self._op, self._clock = first.op, clock
        self.averaged_over = first.averaged_over
        self.tasks, self.owners = tasks, [owner for task in tasks for owner in task.tensors.owners]
        self._sharded = any(map(is_sharded, self.owners))
        self._aimed = False
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
            params_move=first.layer.half,
            **matrices,
        )

    def aim(self) -> bool:
        """Prepares a step on the gradients as they are now. False where one is missing or not dense."""
        grads = self._grads()
        self._aimed = self._step.aim(grads)
        return self._aimed or all(grad is not None and grad.layout == torch.strided for grad in grads)

    def __call__(self, group: dict) -> None:
        momentum_weight, square_weight, fisher_weight = self._clock.weights(group)
        second_weight = fisher_weight if self._op == "mbf_step_" else square_weight
        options = {name: group[of_group] for name, of_group in _OPTIONS[self._op].items()}
        if self._op != "mbf_diagonal_step_":
            options["update"], options["refactor"] = self.due()
            options["update"] &= not self.averaged_over  # it has been, over all processes
        if self._aimed:
            self._step.launch(StepNumbers(momentum_weight, second_weight, group["lr"], group["damping"]), options)
        else:
            rates = {name: group[name] for name in _RATES[self._op]}
            self._step(self._grads(), momentum_weight=momentum_weight, second_weight=second_weight, **rates, **options)
        self._without_factor = False

    def _grads(self) -> list[Tensor | None]:
        if self._sharded:
            return list(map(local_gradient, self.owners))
        return [owner.grad for owner in self.owners]

    def due(self) -> tuple[bool, bool]:
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
        key = (task.op, size, param.device, param.dtype, id(task.state["clock"]), task.averaged_over)
        kinds.setdefault(key, []).append(task)
    return [Launch(alike, alike[0].state["clock"], group) for alike in kinds.values()]
