"""How a group steps: which layers take part, and their launches, kept from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import is_

import torch
from torch import Tensor

from .layers import Layer
from .schedule import DeviceClock, HostClock, advance_on_device, intervals, share_clocks
from .tasks import Copies, Tensors, launches_of, tasks_of

# Options that decide what is launched together; the others are read at every step.
STRUCTURAL = ("capturable", "update_interval", "factor_interval", "graft")


class Plan:
    """The steps of those layers of a group that have gradients, while it stays those and their state what it is."""

    def __init__(self, group: dict, layers: list[Layer], states: dict):
        self._present = _present(group)
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
        self._found = list(_objects(group, states))

    def fits(self, group: dict, states: dict) -> bool:
        return (
            _present(group) == self._present
            and [group[name] for name in STRUCTURAL] == self._options
            and all(map(is_, _objects(group, states), self._found))
        )

    def step(self, group: dict) -> None:
        """``group``: with its numbers as steps use them."""
        if group["capturable"]:
            advance_on_device([clock for clock, _ in self._clocks], group)
        else:
            for clock, update_interval in self._clocks:
                clock.advance(group, update_interval)
        grads = [param.grad for param in group["params"]]
        for launch in self._launches:
            launch(grads, group)
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


def _present(group: dict) -> list[torch.layout | None]:
    grads = [param.grad for param in group["params"]]
    return [grad.layout if grad is not None else None for grad in grads]


def _objects(group: dict, states: dict) -> Iterator[object]:
    """The parameters and all that states hold: any may be replaced between steps. At last an end, which nothing is."""
    return chain(group["params"], chain.from_iterable(map(dict.values, states.values())), (Plan,))


def _share(layers: Sequence[Layer], states: dict, group: dict) -> list[tuple[HostClock | DeviceClock, int]]:
    """The clocks of layers that step together, each with the steps between updates of F."""
    stepping = [states[layer.weight] for layer in layers]
    update_intervals = [intervals(layer.blocks[0], group)[0] if layer.blocks else 1 for layer in layers]
    mine = set(map(id, stepping))
    others: Iterable[dict] = [state for state in states.values() if id(state) not in mine]
    share_clocks(stepping, update_intervals, others, group)
    clocks = {id(state["clock"]): (state["clock"], t1) for state, t1 in zip(stepping, update_intervals, strict=True)}
    return list(clocks.values())
