"""Which implementation runs an op: the fastest one for the tensor's device, or the one that was asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch

from . import native, reference, triton_ops

NAMES = ("reference", "cpu", "cuda", "triton", "emulated")
_forced: ContextVar[str | None] = ContextVar("mbf_kernels_backend", default=None)


def backends() -> dict[str, str]:
    """Every backend by name: "available", or the reason why it is not."""
    reasons = {
        "reference": None,
        "cpu": native.UNAVAILABLE,
        "cuda": native.cuda_unavailable(),
        "triton": triton_ops.unavailable(),
        "emulated": native.emulated_unavailable(),
    }
    return {name: reasons[name] or "available" for name in NAMES}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the ``with`` block on one backend. The environment variable MBF_BACKEND does the same for
    a whole process. Raises ValueError for an unknown name, RuntimeError with the reason for an unavailable one."""
    _require(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _require(name: str) -> None:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"use_backend: expected one of {', '.join(NAMES)}, got {name!r}")
    status = backends()
    if status[name] != "available":
        raise RuntimeError(f"use_backend: {name!r} is not available: {status[name]}")


def asked_for() -> str | None:
    """The backend that ``use_backend`` or the environment names, which may be no backend's name."""
    return _forced.get() or os.environ.get("MBF_BACKEND") or None


def choose(op: str, device: torch.device, size: int) -> Any:
    """What runs ``op`` on blocks of ``size``: the five functions of ``reference``. Blocks above 128 always go to the
    reference."""
    name = asked_for()
    if name:
        _require(name)
        _require_device(op, name, device)
    else:
        name = _fastest(device, size)
    return _implementation(name) if name == "triton" or size <= native.MAX_SIZE else reference


def _fastest(device: torch.device, size: int) -> str:
    if device.type == "cpu":
        if native.UNAVAILABLE:
            _warn_once(native.UNAVAILABLE)
        return "reference" if native.UNAVAILABLE else "cpu"
    if device.type != "cuda":
        return "reference"
    if not native.cuda_unavailable():
        return "cuda"
    if not triton_ops.unavailable() and size <= triton_ops.MAX_SIZE:
        return "triton"
    _warn_once(native.cuda_unavailable())
    return "reference"


def _require_device(op: str, name: str, device: torch.device) -> None:
    on_cpu = name in ("cpu", "emulated") or (name == "triton" and triton_ops.is_interpreted())
    if name != "reference" and device.type != ("cpu" if on_cpu else "cuda"):
        where = "on the CPU" if on_cpu else "on a GPU"
        raise ValueError(f"{op}: backend {name!r} expected tensors {where}, got them on {device}")


def _implementation(name: str) -> Any:
    if name == "reference":
        return reference
    if name == "triton":
        return triton_ops
    return {"cpu": native.CPU, "cuda": native.CUDA, "emulated": native.EMULATED}[name]


@lru_cache(maxsize=8)
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"mbf_kernels: {reason}; torch.linalg serves instead, which is much slower. "
        "`python -m mbf_kernels` tells what was found, README.md (Install) how to build the kernels.",
        RuntimeWarning,
        stacklevel=2,
    )
