"""The hyper-parameters of MBF, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .partition import STRUCTURES

FLAGS = (
    "relative_damping", "nesterov", "average", "maximize", "capturable", "master_weights", "stochastic_rounding",
)  # fmt: skip


def check_options(options: dict) -> None:
    """Raises ValueError or TypeError naming the first option that is out of range."""
    for name in FLAGS:
        _require(isinstance(options[name], bool), name, "True or False", options[name])
    for name in ("lr", "damping", "weight_decay", "eps"):
        value = _number(name, options[name])
        _require(value >= 0 and math.isfinite(value), name, "finite and >= 0", options[name])
    for name, upper in (("momentum", 1), ("diagonal_decay", 1)):
        _require(0 <= _number(name, options[name]) < upper, name, "in [0, 1)", options[name])
    _require(0 <= _number("decay", options["decay"]) <= 1, "decay", "in [0, 1]", options["decay"])
    for name in ("update_interval", "factor_interval"):
        value = options[name]
        _require(value is None or _is_count(value), name, "None or an integer >= 1", value)
        if options["capturable"]:
            _require(value in (None, 1), name, "None or 1 with capturable=True", value)
    _require(_is_count(options["segment"]), "segment", "an integer >= 1", options["segment"])
    _require(_is_one_of(options["graft"], (None, "adam")), "graft", 'None or "adam"', options["graft"])
    _require(_is_one_of(options["blocks"], STRUCTURES), "blocks", f"one of {', '.join(STRUCTURES)}", options["blocks"])
    grid = options["grid"]
    is_grid = isinstance(grid, tuple | list) and len(grid) == 2 and all(map(_is_count, grid))
    _require(grid is None or is_grid, "grid", "None or two integers >= 1", grid)
    _require(options["blocks"] != "grid" or grid is not None, "grid", '(m1, m2) with blocks="grid"', grid)
    _require(not options["differentiable"], "differentiable", "False: steps have no derivatives", True)
    if options["stochastic_rounding"]:
        others = options["master_weights"] or options["capturable"]
        _require(not others, "stochastic_rounding", "False with master_weights or capturable", True)
    if options["capturable"]:
        for name in ("lr", "damping"):
            if isinstance(options[name], Tensor):
                _check_on_device(name, options[name], options.get("params", ()))


def with_numbers(group: dict) -> dict:
    """A copy of the group with lr and damping as steps use them: floats, or numbers on the device (in double, too)."""
    return group | {name: _number_for_steps(name, group[name], group["capturable"]) for name in ("lr", "damping")}


def _number_for_steps(name: str, value: float | Tensor, capturable: bool) -> float | Tensor:
    on_device = capturable and isinstance(value, Tensor) and value.numel() == 1
    return value.view(()).double() if on_device else _number(name, value)


def keep_device_scalars(group: dict, own: dict) -> None:
    """After loading: how a group runs is its own, and so are its rates' tensors, or floats; their values are loaded."""
    group["capturable"] = own["capturable"]
    for name in ("lr", "damping"):
        if not isinstance(own[name], Tensor):
            group[name] = float(group[name])
        elif own["capturable"]:
            group[name] = own[name].fill_(float(group[name]))


def _check_on_device(name: str, value: Tensor, params: Iterable[Tensor]) -> None:
    expected = f"{name} to be a number or a float32 or float64 tensor"
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"MBF: expected {expected} with capturable=True, got {value.dtype}")
    for param in params:
        if param.device != value.device:
            raise ValueError(
                f"MBF: expected {expected} on {param.device} with capturable=True, got it on {value.device}"
            )


def _is_one_of(value: object, known: tuple[str | None, ...]) -> bool:
    return (value is None or isinstance(value, str)) and value in known


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"MBF: Tensor {name} must be 1-element, got shape {list(value.shape)}")
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"MBF: expected {name} to be a number, got {value!r}")


def _require(good: bool, name: str, expected: str, value: object) -> None:
    if not good:
        raise ValueError(f"MBF: expected {name} to be {expected}, got {value!r}")
