"""Where a run is made: `python -m benchmarks.gpu.environment` prints it as JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess

import torch

from benchmarks.environment import environment, version

PACKAGES = ("torch", "triton", "pybind11", "cmake", "ninja", "setuptools", "pip", "numpy", "scipy", "hypothesis")
PACKAGES += ("pytest", "pytest-xdist", "pytest-timeout", "pytest-benchmark", "scikit-learn")
SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
    "ecc.mode.current",
)


def describe(device: str) -> dict:
    return environment(device) | {
        "gpu": gpu() if device == "cuda" else None,
        "nvcc": first_match(r"release (\S+),", output(["nvcc", "--version"])),
        "compute_sanitizer": first_match(r"Version (\S+)", output(["compute-sanitizer", "--version"])),
        "cuda_of_torch": torch.version.cuda,
        "packages": {name: version(name) for name in PACKAGES},
        "processors": os.cpu_count(),
        "root": os.getuid() == 0,
    }


def gpu() -> dict:
    """What torch and the driver's tool say of the first device, clocks as they are found."""
    properties = torch.cuda.get_device_properties(0)
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    values = [value.strip() for value in output(command).split(",")]
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": dict(zip(SMI, values, strict=False)),
    }


def output(command: list[str]) -> str:
    """What a tool prints; nothing where it is missing or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def first_match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


if __name__ == "__main__":
    print(json.dumps(describe("cuda" if torch.cuda.is_available() else "cpu")))
