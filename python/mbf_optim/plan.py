"""How a group steps: which layers take part, and their launches, kept from step to step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from operator import is_
from zlib import crc32

import torch
from torch import Tensor

from .copies import Copies
from .layers import PARTITION, Layer
from .schedule import DeviceClock, HostClock, advance_on_device, intervals, on_host, share_clocks
from .sharding import is_sharded
from .stand_ins import by_parameter, stand_ins_of
from .tasks import Launch, Task, Tensors, launches_of, tasks_of

# Options that decide what is launched together; the others are read at every step.
STRUCTURAL = (*PARTITION, "capturable", "update_interval", "factor_interval", "graft", "master_weights")
WRITTEN = ("momentum", "second_moment", "master", "fisher", "fisher_tail")  # entries of a state that launches write


class Plan:
    """The steps of those layers of a group that have gradients, while it stays those and their state what it is."""

    def __init__(self, group: dict, layers: list[Layer], states: dict):
        self._options = [group[name] for name in STRUCTURAL]
        stepping = [layer for layer in layers if layer.has_grad()]
        self._states = states
        self._clocks = _share(stepping, states, group)
        self._copied = [layer for layer in stepping if not layer.steps_in_place()]
        self._half = [layer for layer in stepping if layer.half]
        self._stand_ins = stand_ins_of([param for layer in self._half for param in layer.params], states)
        self._in_stead = by_parameter(self._stand_ins)
        apart = self._half or any(is_sharded(param) for layer in stepping for param in layer.params)
        self.traceable = group["capturable"] and isinstance(group["lr"], Tensor) and not apart
        in_place = [layer for layer in stepping if layer.steps_in_place()]
        self._launches = self._launches_of([layer for layer in in_place if not layer.half], group)
        self._of_stand_ins = self._launches_of([layer for layer in in_place if layer.half], group)
        self._copies: list[Copies] = []
        self._of_copies: list[Launch] = []
        launched = {id(owner) for launch in self._launches for owner in launch.owners}
        self._others = [param for param in group["params"] if id(param) not in launched]
        self._layouts = _layouts_of_grads(self._others)
        params = [param for layer in stepping for param in layer.params]
        self._params, self._state_of_each = list(group["params"]), list(states.values())
        self._entries = [(states[p], name, states[p][name]) for p in params for name in WRITTEN if name in states[p]]

    def fits(self, group: dict, states: dict) -> bool:
        """Whether ``step`` does now what a new plan would; to be asked before each, but for the first."""
        return (
            [group[name] for name in STRUCTURAL] == self._options
            and _are(group["params"], self._params)
            and _are(states.values(), self._state_of_each)
            and _are_held(self._entries)
            and _layouts_of_grads(self._others) == self._layouts
            and all([launch.aim() for launch in self._launches])
        )

    def start(self, group: dict, unscale: Tensor | None) -> list[tuple[Task, float]]:
        """Time goes on and copies are made. Returns the work whose F is to be averaged over processes before
        ``finish``, each with its decay. ``group``: with its numbers as steps use them. ``unscale``: as
        ``StandIns.fill`` takes it."""
        if group["capturable"]:
            advance_on_device([clock for clock, _ in self._clocks], group)
        else:
            for clock, update_interval in self._clocks:
                clock.advance(group, update_interval)
        for kind in self._stand_ins:
            kind.fill(unscale)
        for launch in self._of_stand_ins:
            launch.aim()
        self._copies = [Copies(layer, self._states, self._in_stead) for layer in self._copied]
        tasks = [task for copy in self._copies for task in copy.tasks]
        self._of_copies = launches_of(tasks, group) if tasks else []
        over_processes = [launch for launch in self._all_launches() if launch.averaged_over and launch.due()[0]]
        return [(task, group["decay"]) for launch in over_processes for task in launch.tasks]

    def finish(self, group: dict) -> None:
        for launch in self._all_launches():
            launch(group)
        for copy in self._copies:
            copy.write_back()
        self._copies, self._of_copies = [], []  # they are as large as the parameters
        for kind in self._stand_ins:
            kind.write_back(self._seed() if group["stochastic_rounding"] else None)
            kind.release()

    def _launches_of(self, layers: list[Layer], group: dict) -> list[Launch]:
        states = self._states
        tensors = [(layer, Tensors.of(layer.params, states, self._in_stead)) for layer in layers]
        return launches_of([task for layer, of in tensors for task in tasks_of(layer, of, states[layer.weight])], group)

    def _all_launches(self) -> Iterable[Launch]:
        return chain(self._launches, self._of_stand_ins, self._of_copies)

    def _seed(self) -> int:
        """Of the rounding in this step: what resumes, and what other processes step alike, round alike."""
        first = self._half[0]
        step = on_host(self._states[first.weight])["step"]
        return crc32(f"{first.name} {step}".encode())  # 32 bits: more of a seed torch's CPU generator leaves out


def _layouts_of_grads(params: Iterable[Tensor]) -> list[torch.layout | None]:
    return [None if param.grad is None else param.grad.layout for param in params]


def _are(found: Collection, expected: Collection) -> bool:
    return len(found) == len(expected) and all(map(is_, found, expected))


def _are_held(entries: list[tuple[dict, str, object]]) -> bool:
    """Whether states hold them still: a user may have put others there, as when offloading."""
    try:
        for state, name, value in entries:  # a plain loop: the fastest way for many
            if state[name] is not value:
                return False
    except KeyError:  # taken out
        return False
    return True


def _share(layers: Sequence[Layer], states: dict, group: dict) -> list[tuple[HostClock | DeviceClock, int]]:
    """The clocks of layers that step together, each with the steps between updates of F."""
    stepping = [states[layer.weight] for layer in layers]
    update_intervals = [intervals(layer.blocks[0], group)[0] if layer.blocks else 1 for layer in layers]
    mine = set(map(id, stepping))
    others: Iterable[dict] = [state for state in states.values() if id(state) not in mine]
    share_clocks(stepping, update_intervals, others, group)
    clocks = {id(state["clock"]): (state["clock"], t1) for state, t1 in zip(stepping, update_intervals, strict=True)}
    return list(clocks.values())
