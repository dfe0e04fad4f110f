"""How a group steps: which layers take part, and their launches, kept from step to step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import is_, itemgetter

import torch
from torch import Tensor

from .layers import Layer
from .schedule import DeviceClock, HostClock, advance_on_device, intervals, share_clocks
from .tasks import Copies, Tensors, launches_of, tasks_of

# Options that decide what is launched together; the others are read at every step.
STRUCTURAL = ("capturable", "update_interval", "factor_interval", "graft")
WRITTEN = ("momentum", "second_moment", "fisher", "fisher_tail")  # entries of a state that launches write


class Plan:
    """The steps of those layers of a group that have gradients, while it stays those and their state what it is."""

    def __init__(self, group: dict, layers: list[Layer], states: dict):
        self._layouts = _layouts(gradients(group))
        self._options = [group[name] for name in STRUCTURAL]
        indices = {id(param): i for i, param in enumerate(group["params"])}
        stepping = [layer for layer in layers if layer.has_grad()]
        self._states = states
        self._clocks = _share(stepping, states, group)
        in_place = [layer for layer in stepping if layer.steps_in_place()]
        self._copied = [layer for layer in stepping if not layer.steps_in_place()]
        tasks = [
            task
            for layer in in_place
            for task in tasks_of(
                layer,
                Tensors.of(layer.params, states),
                [indices[id(param)] for param in layer.params],
                states[layer.weight],
            )
        ]
        self._launches = launches_of(tasks, group)
        params = [param for layer in stepping for param in layer.params]
        self._params, self._state_of_each = list(group["params"]), list(states.values())
        self._written = [_Held(name, [states[p] for p in params if name in states[p]]) for name in WRITTEN]

    def fits(self, group: dict, grads: Sequence[Tensor | None], states: dict) -> bool:
        return (
            _layouts(grads) == self._layouts
            and [group[name] for name in STRUCTURAL] == self._options
            and _are(group["params"], self._params)
            and _are(states.values(), self._state_of_each)
            and all(held.is_current() for held in self._written)
        )

    def step(self, group: dict, grads: Sequence[Tensor | None]) -> None:
        """``group``: with its numbers as steps use them; ``grads``: of its params."""
        if group["capturable"]:
            advance_on_device([clock for clock, _ in self._clocks], group)
        else:
            for clock, update_interval in self._clocks:
                clock.advance(group, update_interval)
        for launch in self._launches:
            launch(grads, group)
        if self._copied:
            self._step_copies(group)

    def _step_copies(self, group: dict) -> None:
        copies = [Copies(layer, self._states) for layer in self._copied]
        grads: list[Tensor] = []
        tasks = []
        for copy in copies:
            tasks += copy.tasks(len(grads))
            grads += copy.grads
        for launch in launches_of(tasks, group):
            launch(grads, group)
        for copy in copies:
            copy.write_back()


class _Held:
    """One entry of many states, to notice that a user has put another tensor there, as when offloading."""

    def __init__(self, name: str, states: list[dict]):
        self._get, self._states = itemgetter(name), states
        self._tensors = list(map(self._get, states))

    def is_current(self) -> bool:
        try:
            return all(map(is_, map(self._get, self._states), self._tensors))
        except KeyError:  # taken out
            return False


def gradients(group: dict) -> list[Tensor | None]:
    return [param.grad for param in group["params"]]


def _layouts(grads: Sequence[Tensor | None]) -> list[torch.layout | None]:
    return [None if grad is None else grad.layout for grad in grads]


def _are(found: Collection, expected: Collection) -> bool:
    return len(found) == len(expected) and all(map(is_, found, expected))


def _share(layers: Sequence[Layer], states: dict, group: dict) -> list[tuple[HostClock | DeviceClock, int]]:
    """The clocks of layers that step together, each with the steps between updates of F."""
    stepping = [states[layer.weight] for layer in layers]
    update_intervals = [intervals(layer.blocks[0], group)[0] if layer.blocks else 1 for layer in layers]
    mine = set(map(id, stepping))
    others: Iterable[dict] = [state for state in states.values() if id(state) not in mine]
    share_clocks(stepping, update_intervals, others, group)
    clocks = {id(state["clock"]): (state["clock"], t1) for state, t1 in zip(stepping, update_intervals, strict=True)}
    return list(clocks.values())
