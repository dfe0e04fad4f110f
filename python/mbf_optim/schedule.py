"""What is due at a step, and how far a layer has come: step counters and the weights that undo a zero start.

A layer's state counts in Python numbers, ``step`` and ``fisher_weight``. In a capturable group it counts on the device:
``clock``, four float64 numbers that advance inside a CUDA graph. Layers that step together share one clock.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def advance(states: list[dict], first_blocks: list[Blocks | None], every: Iterable[dict], group: dict) -> None:
    """Counts one step of the layers of ``states``; ``every`` state of the optimizer tells which clocks must not run."""
    if group["capturable"]:
        _advance_clocks(states, every, group)
        return
    for state, blocks in zip(states, first_blocks, strict=True):
        if "clock" in state:
            state.update(on_host(state))
            del state["clock"]
        if blocks is not None and state["step"] % intervals(blocks, group)[0] == 0:
            state["fisher_weight"] = group["decay"] * state["fisher_weight"] + (1 - group["decay"])
        state["step"] += 1


def weights(state: dict, group: dict) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
    """1 - mu^t, 1 - beta_2^t, and 1 - beta^k after k updates of F: the sums of the weights in M, v and F."""
    if "clock" in state:
        _, momentum, square, fisher = state["clock"].unbind()
        return momentum, square, fisher.clamp_min(1e-30) if group["decay"] == 1 else fisher  # F stays 0 then
    t = state["step"]
    return 1 - group["momentum"] ** t, 1 - group["diagonal_decay"] ** t, state.get("fisher_weight", 0.0) or 1.0


def on_host(state: dict) -> dict:
    """The counters as Python numbers, wherever they are. Waits for the device."""
    if "clock" not in state:
        return {name: state[name] for name in ("step", "fisher_weight") if name in state}
    step, _, _, fisher_weight = state["clock"].tolist()
    return {"step": int(step), "fisher_weight": fisher_weight}


def _advance_clocks(states: list[dict], every: Iterable[dict], group: dict) -> None:
    _start_clocks(states, group)
    stepping = set(map(id, states))
    kept = {id(state["clock"]) for state in every if "clock" in state and id(state) not in stepping}
    clocks: dict[int, Tensor] = {}
    for state in states:
        clock = state["clock"]
        if id(clock) in kept:  # it runs on for those that step now
            refuse_capture("a step of layers that have stepped together with others so far")
            state["clock"] = clocks[id(clock)] if id(clock) in clocks else clock.clone()
        clocks[id(clock)] = state["clock"]
    decays = [1.0, group["momentum"], group["diagonal_decay"], group["decay"]]
    numbers = [number for clock in clocks.values() for number in clock.unbind()]
    torch._foreach_mul_(numbers, decays * len(clocks))
    torch._foreach_add_(numbers, [1.0, *(1 - decay for decay in decays[1:])] * len(clocks))


def _start_clocks(states: list[dict], group: dict) -> None:
    """Moves counters to the device; layers with equal ones share a clock."""
    started: dict[tuple, Tensor] = {}
    for state in states:
        if "clock" in state:
            continue
        refuse_capture("the first step of a layer (it allocates state)")
        t, fisher_weight, device = state.pop("step"), state.pop("fisher_weight", 0.0), state["momentum"].device
        if (t, fisher_weight, device) not in started:
            numbers = [t, 1 - group["momentum"] ** t, 1 - group["diagonal_decay"] ** t, fisher_weight]
            started[t, fisher_weight, device] = torch.tensor(numbers, dtype=torch.float64, device=device)
        state["clock"] = started[t, fisher_weight, device]


def capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str) -> None:
    if capturing():
        raise RuntimeError(f"MBF.step: expected {what} before the capture of a CUDA graph, got it inside")
