"""Which implementation runs an op: the fastest one for the tensor's device, or the one that was asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch

from . import native, reference

NAMES = ("reference", "cpu", "cuda", "triton", "emulated")
_NOT_WRITTEN = "this version has no such kernels yet"
_forced: ContextVar[str | None] = ContextVar("mbf_kernels_backend", default=None)


def backends() -> dict[str, str]:
    """Every backend by name: "available", or the reason why it is not."""
    status = dict.fromkeys(NAMES, _NOT_WRITTEN)
    status["reference"] = "available"
    status["cpu"] = native.UNAVAILABLE or "available"
    return status


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
    status = backends()
    if name not in status:
        raise ValueError(f"use_backend: expected one of {', '.join(NAMES)}, got {name!r}")
    if status[name] != "available":
        raise RuntimeError(f"use_backend: {name!r} is not available: {status[name]}")


def choose(op: str, device: torch.device, size: int) -> ModuleType:
    """The module that runs ``op`` on blocks of ``size``. Blocks above 128 always go to the reference."""
    name = _forced.get() or os.environ.get("MBF_BACKEND")
    if name:
        _require(name)
        if name == "cpu" and device.type != "cpu":
            raise ValueError(f"{op}: backend 'cpu' expected tensors on the CPU, got them on {device}")
    elif device.type == "cpu" and native.UNAVAILABLE:
        _warn_once()
    native_cpu = name == "cpu" or (not name and device.type == "cpu" and not native.UNAVAILABLE)
    return native if native_cpu and size <= native.MAX_SIZE else reference


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(
        f"mbf_kernels: {native.UNAVAILABLE}; torch.linalg serves instead, which is much slower. "
        "Reinstall with a C++ compiler to get the kernels; `python -m mbf_kernels` tells what was found.",
        RuntimeWarning,
        stacklevel=2,
    )
