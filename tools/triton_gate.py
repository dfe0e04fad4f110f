"""Compiles the Triton kernels ahead of time, for GPUs that need not be there, and pins what came out.

    python tools/triton_gate.py            compiles, and writes the table of this triton version into triton_gate.json
    python tools/triton_gate.py --check    compiles, and fails where a kernel spills or differs from its table

A version of triton without a table is held to the rule alone: no spills, but for SPILLS_ALLOWED. Vectors have the most
general strides, which need the most registers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mbf_kernels import triton_kernels
from mbf_kernels.triton_ops import WARPS

PINNED = Path(__file__).with_suffix(".json")
TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
STEP = dict(RELATIVE=True, GRAFT=True, NESTEROV=True, MAXIMIZE=False, UPDATE=True, REFACTOR=True)
VARIANTS = {  # kernel, its constants, whether it has a factor to store
    "accumulate": ("accumulate", {}, False),
    "factor": ("factor", dict(RELATIVE=True), True),
    "solve": ("solve", dict(COLUMNS=1), True),
    "accumulate_factor_solve": ("accumulate_factor_solve", dict(RELATIVE=True), False),
    "mbf_step grafted": ("mbf_step", STEP, False),
    "mbf_step, factor stored": ("mbf_step", STEP, True),
}
ELEMENTWISE = {"rank_one_step": ("rank_one_step", dict(DECOUPLED=True), False)}  # likewise, over elements: n = 1
# The 3x3 filter and the largest block, and in float64 the largest one that fits in registers.
CASES = [(variant, dtype, n) for dtype, n in (("float32", 9), ("float32", 20), ("float64", 13)) for variant in VARIANTS]
CASES += [(variant, dtype, 1) for dtype in ("float32", "float64") for variant in ELEMENTWISE]
# Two registers to a number: L alone takes 210 of the 255 of a thread at n = 14, and from there on the kernels spill.
SPILLS_ALLOWED = [("mbf_step grafted", "float64", 20)]
NUMBERS = {"accumulate": 2, "factor": 1, "solve": 0, "accumulate_factor_solve": 3, "mbf_step": 10, "rank_one_step": 6}


def compiled(variant: str, dtype: str, n: int, target: str):
    """The compiled kernel, as a launch on contiguous storage and strided vectors would make it."""
    name, constants, has_factor = (VARIANTS | ELEMENTWISE)[variant]
    kernel = getattr(triton_kernels, name)
    lanes = TARGETS[target].warp_size
    layout = gl.BlockedLayout([1], [lanes], [WARPS], [0])
    constants = constants | dict(N=n, BLOCK=lanes * WARPS, LAYOUT=layout)
    real, word = ("*fp32", "i32") if dtype == "float32" else ("*fp64", "i64")
    view = (real, "i32", "i64", "i64", "constexpr", "i64", "i64")
    views = {} if variant in ELEMENTWISE else dict.fromkeys(("grad", "rhs", "momentum", "param", "out"), (view, view))
    types = dict.fromkeys(("grad", "momentum", "param", "row", "column"), real) | dict(order=("i32",) * 3)
    types |= dict(fisher=real, stored=real if has_factor else "constexpr", info="*i32", skipped="*i64")
    types |= views | dict(numbers=(word,) * NUMBERS[name], columns="i32", count="i32")
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    values = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in views:
            values |= {(i, read, 4): n for read in (0, 1)}
        elif signature[argument] == "constexpr":
            values[(i,)] = constants.get(argument)
    source = GluonASTSource(kernel, signature, values)
    return triton.compile(source, target=TARGETS[target], options=dict(num_warps=WARPS))


def figures(variant: str, dtype: str, n: int, target: str) -> dict[str, int]:
    """Registers, bytes spilled, bytes of shared memory and instructions of one kernel."""
    kernel = compiled(variant, dtype, n, target)
    return _amd_figures(kernel.asm["amdgcn"]) if target.startswith("hip") else _nvidia_figures(kernel.asm["cubin"])


def _nvidia_figures(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", code, re.MULTILINE)
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return dict(
        registers=number["REG"],
        spilled=number["STACK"] + number["LOCAL"],
        shared=number["SHARED"],
        instructions=len(instructions),
    )


def _amd_figures(code: str) -> dict[str, int]:
    number = {key: int(value) for key, value in re.findall(r"^\s+-?\s*\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    return dict(
        registers=number["vgpr_count"],
        spilled=number["private_segment_fixed_size"],
        shared=number["group_segment_fixed_size"],
        instructions=len(re.findall(r"^\t[sv]_|^\t(?:global|flat|scratch|buffer|ds)_", code, re.MULTILINE)),
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def measure() -> dict[str, dict[str, int]]:
    """The figures of every kernel of the table, by "target, variant, dtype, n"."""
    cases = [(*case, target) for target in TARGETS for case in [*CASES, *SPILLS_ALLOWED]]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(figures, *zip(*cases, strict=True))
        return {f"{target}, {_name(*case)}": result for (*case, target), result in zip(cases, results, strict=True)}


def _name(variant: str, dtype: str, n: int) -> str:
    return f"{variant}, {dtype}, n = {n}"


def complaints(measured: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]) -> list[str]:
    """Spills that are not allowed, and what differs from the table, if there is one."""
    allowed = tuple(_name(*case) for case in SPILLS_ALLOWED)
    spilled = [name for name, kernel in measured.items() if kernel["spilled"] and not name.endswith(allowed)]
    found = [f"{name}: spills {measured[name]['spilled']} bytes" for name in spilled]
    for name in sorted(expected.keys() | measured.keys()) if expected else ():
        if expected.get(name) != measured.get(name):
            found.append(f"{name}: expected {expected.get(name)}, got {measured.get(name)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the pinned figures instead of writing them")
    check = parser.parse_args().check
    pinned = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    measured = measure()
    found = complaints(measured, pinned.get(triton.__version__, {}) if check else {})
    if not check:
        pinned[triton.__version__] = measured
        PINNED.write_text(_one_kernel_per_line(pinned))
    print(f"triton {triton.__version__}: {len(measured)} kernels", *found, sep="\n")
    return 1 if found else 0


def _one_kernel_per_line(pinned: dict[str, dict[str, dict[str, int]]]) -> str:
    tables = []
    for version, table in sorted(pinned.items()):
        lines = [f"    {json.dumps(name)}: {json.dumps(kernel)}" for name, kernel in table.items()]
        tables.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(tables) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
