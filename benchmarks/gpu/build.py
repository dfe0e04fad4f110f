"""The part that builds: with what this Python has, for this GPU only, off the network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import sysconfig
import time
from pathlib import Path

from benchmarks.gpu.results import Results

IN_PLACE = [sys.executable, "setup.py", "build_ext", "--inplace"]
EDITABLE = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
BACKENDS = [sys.executable, "-c", "import json, mbf_kernels; print(json.dumps(mbf_kernels.backends()))"]


def run(results: Results, seconds: float, rehearse: bool) -> dict:
    start = time.monotonic()
    capability = (results.part("environment").get("gpu") or {}).get("capability")
    record = {"env": options(capability), "commands": [], "printed": {}}
    for command in commands():
        record["commands"].append(" ".join(command))
        if rehearse:
            break
        left = seconds - (time.monotonic() - start)
        status, text = results.run(command, left, options(capability))
        record["printed"] = compiler_report(text)
        if status == 0 or status == 124 or compiling_failed(text):
            break
    else:
        return record | {"done": False, "problem": "no way of building worked: see log.txt"}
    record["seconds"] = round(time.monotonic() - start, 1)
    if not rehearse and status != 0:
        return record | {"done": False, "problem": f"the build failed with status {status}: see log.txt"}
    status, text = results.run(BACKENDS, 60)
    record["backends"] = json.loads(text.splitlines()[-1]) if status == 0 else {}
    cuda = record["backends"].get("cuda", "mbf_kernels cannot be imported: see log.txt")
    good = rehearse or cuda == "available"
    return record | {"done": good, "problem": None if good else f"backend cuda: {cuda}"}


def options(capability: str | None) -> dict[str, str]:
    """Of the build: kernels are wanted, and those of one compute capability ("9.0" -> 90) are enough."""
    chosen = {"MBF_NATIVE": "1", "MBF_CUDA": "ON"}
    return chosen | ({"MBF_CUDA_ARCHITECTURES": capability.replace(".", "")} if capability else {})


def commands() -> list[list[str]]:
    """What to try in turn. pip installs only into a virtual environment that it may write to; no system is altered."""
    return [EDITABLE, IN_PLACE] if pip_may_install() else [IN_PLACE]


def pip_may_install() -> bool:
    packages = Path(sysconfig.get_path("purelib"))
    present = all(importlib.util.find_spec(name) for name in ("pip", "setuptools"))
    return present and sys.prefix != sys.base_prefix and os.access(packages, os.W_OK)


def compiling_failed(text: str) -> bool:
    """Whether it was the compiler or CMake that failed: another way of installing would not help."""
    return "ninja: build stopped" in text or "CMake Error" in text


def compiler_report(text: str) -> dict:
    """What ptxas printed, if it was asked to: kernels, the most registers, and bytes spilled by all together."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", text)]
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", text))
    return {"kernels": len(registers), "most_registers": max(registers), "spilled": spilled} if registers else {}
