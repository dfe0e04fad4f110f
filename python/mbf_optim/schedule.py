"""What is due at a step, and how far layers have come: their clocks.

Layers that step together share a clock: the steps taken and the sums of the weights in M, v and F, which undo a zero
start. It counts in Python numbers, or in a capturable group on the device, so that it advances inside a CUDA graph.
A state that no step has seen since it was made or loaded holds plain numbers, ``step`` and ``fisher_weight``; beside a
clock they are None: torch.distributed.checkpoint looks there for the names of what it loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .partition import Blocks

FRESH_SIZE = 128  # up to here a shared F is updated and factored at every step, unless told otherwise
LAZY_INTERVALS = (10, 100)  # T1 and T2 of the paper's image problems, for larger shared matrices


def intervals(blocks: Blocks, group: dict) -> tuple[int, int]:
    """T1 and T2: steps between updates of F, and between factorisations. Raises ValueError for capturable ones above
    1: a CUDA graph does the same work at every replay."""
    default = LAZY_INTERVALS if blocks.size > FRESH_SIZE and blocks.shared else (1, 1)
    t1, t2 = group["update_interval"] or default[0], group["factor_interval"] or default[1]
    if group["capturable"] and (t1, t2) != (1, 1):
        raise ValueError(
            "MBF: expected update_interval and factor_interval to be 1 with capturable=True, "
            f"got {t1} and {t2} for a matrix of {blocks.size}x{blocks.size}. "
            f"Set both to 1, or choose blocks of at most {FRESH_SIZE}, where 1 is the default"
        )
    return t1, t2


@dataclass
class HostClock:
    step: int
    fisher_weight: float

    def advance(self, group: dict, update_interval: int) -> None:
        if self.step % update_interval == 0:
            self.fisher_weight = group["decay"] * self.fisher_weight + (1 - group["decay"])
        self.step += 1

    def weights(self, group: dict) -> tuple[float, float, float]:
        """1 - mu^t, 1 - beta_2^t, and 1 - beta^k after k updates of F: the sums of the weights in M, v and F."""
        t = self.step
        return 1 - group["momentum"] ** t, 1 - group["diagonal_decay"] ** t, self.fisher_weight or 1.0

    def numbers(self) -> dict:
        return {"step": self.step, "fisher_weight": self.fisher_weight}

    def copy(self) -> HostClock:
        return HostClock(self.step, self.fisher_weight)


class DeviceClock:
    """Two float64 numbers: t and the weight of F, which is updated at every step."""

    def __init__(self, values: Tensor):
        self.values = values
        self.moments: tuple[Tensor, ...] = ()  # 1 - mu^t and 1 - beta_2^t, made of t: mu may be scheduled

    @classmethod
    def of(cls, numbers: dict, device: torch.device) -> DeviceClock:
        return cls(torch.tensor([numbers["step"], numbers["fisher_weight"]], dtype=torch.float64, device=device))

    def weights(self, group: dict) -> tuple[Tensor, Tensor, Tensor]:
        fisher = self.values[1]
        return *self.moments, fisher.clamp_min(1e-30) if group["decay"] == 1 else fisher  # F stays 0 then

    def numbers(self) -> dict:
        """Waits for the device."""
        step, fisher_weight = self.values.tolist()
        return {"step": int(step), "fisher_weight": fisher_weight}

    def copy(self) -> DeviceClock:
        return DeviceClock(self.values.clone())


def advance_on_device(clocks: list[DeviceClock], group: dict) -> None:
    if not clocks:
        return
    decay = group["decay"]
    numbers = [number for clock in clocks for number in clock.values.unbind()]
    torch._foreach_mul_(numbers, [1.0, decay] * len(clocks))
    torch._foreach_add_(numbers, [1.0, 1 - decay] * len(clocks))
    moments = []
    for name in ("momentum", "diagonal_decay"):
        sums = torch._foreach_pow(group[name], [clock.values[0] for clock in clocks])
        torch._foreach_neg_(sums)
        torch._foreach_add_(sums, 1.0)
        moments.append(sums)
    for clock, momentum, square in zip(clocks, *moments, strict=True):
        clock.moments = (momentum, square)


def share_clocks(states: list[dict], update_intervals: list[int], others: Iterable[dict], group: dict) -> None:
    """Gives the states of layers that step together their clocks: common ones to those that have come equally far.

    ``others`` are the states whose layers do not step: their clocks must not run on.
    """
    taken: dict[int, int | None] = {id(state["clock"]): None for state in others if "clock" in state}
    fresh: dict[tuple, HostClock | DeviceClock] = {}
    for state, update_interval in zip(states, update_intervals, strict=True):
        clock = state.get("clock")
        if clock is None or isinstance(clock, DeviceClock) != group["capturable"]:
            refuse_capture("the first step of a layer (it allocates state)")
            numbers = {"step": 0, "fisher_weight": 0.0} | on_host(state)
            state |= dict.fromkeys(state.keys() & numbers.keys())
            key = (update_interval, *numbers.values(), state["momentum"].device)
            if key not in fresh:
                device = state["momentum"].device
                fresh[key] = DeviceClock.of(numbers, device) if group["capturable"] else HostClock(**numbers)
            clock = fresh[key]
        elif taken.setdefault(id(clock), update_interval) != update_interval:
            refuse_capture("a step of layers that have stepped together with others so far")
            clock = fresh.setdefault((update_interval, id(clock)), clock.copy())
        state["clock"] = clock


def on_host(state: dict) -> dict:
    """The counters as Python numbers, wherever they are. Waits for the device."""
    if "clock" in state:
        return state["clock"].numbers()
    return {name: state[name] for name in ("step", "fisher_weight") if name in state}


def capturing() -> bool:
    return (
        not torch.compiler.is_compiling() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    )


def refuse_capture(what: str) -> None:
    if capturing():
        raise RuntimeError(f"MBF.step: expected {what} before the capture of a CUDA graph, got it inside")
