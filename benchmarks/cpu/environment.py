"""The machine of a run: what `benchmarks.environment` says, and what matters on a CPU."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import psutil

from benchmarks.environment import environment, version
from mbf_kernels import native

PACKAGES = ("torch", "numpy", "scipy", "jax", "pytorch_optimizer", "heavyball")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe(command: str) -> dict:
    return environment() | {
        "made": date.today().isoformat(),
        "command": command,
        "cores": os.cpu_count(),
        "load": round(busy_cores(), 1),
        "isa": native.cpu_isa() if native.UNAVAILABLE is None else None,
        "caches": caches(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def busy_cores(seconds: float = 2.0) -> float:
    """How many cores others keep busy: the figures are worth less with any."""
    return psutil.cpu_percent(interval=seconds) / 100 * os.cpu_count()


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches by level, as Linux tells; empty elsewhere."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found
