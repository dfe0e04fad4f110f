"""Predicts what share of an H200's copy bandwidth each kernel reaches, from its machine code, on any machine with nvcc.

    python tools/predict.py        writes benchmarks/gpu/predicted.json and docs/predictions.md

A thread block of every kernel is run instruction by instruction (sass_machine.py), which checks its results and counts
its work; the counts over the rates below give the least time per mini-block that each part of a multiprocessor needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import cuda_objects
import sass
from cuda_gate import RESERVED_SHARED_BYTES, resources
from cuda_objects import ROOT, Problem, readable
from kernel_call import Kernel, call
from sass import Instruction
from sass_machine import Counts

SIZES = (4, 9, 12, 16, 20, 24, 25, 32, 48, 49, 64, 96, 128)  # those that are measured
PARTS = ("memory", "issue", "integer units", "float units", "special functions", "shared memory", "latency")
OPS = {"op": "accumulate_factor_solve_", "step": "mbf_step_"}
JSON = ROOT / "benchmarks" / "gpu" / "predicted.json"
PAGE = ROOT / "docs" / "predictions.md"

# An H200.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
COPY_BANDWIDTH = 4.3e12  # bytes per second, read and written, as measured
REGISTERS, SHARED_BYTES, WARPS, THREAD_BLOCKS = 65536, 233472, 64, 32  # of a multiprocessor
BYTES_PER_CLOCK = COPY_BANDWIDTH / MULTIPROCESSORS / CLOCK
# Warp instructions per clock of a multiprocessor.
ISSUE, INTEGER, FLOAT, MULTIPLY, SPECIAL = 4, 2, 4, 2, 0.5


@dataclass(frozen=True)
class Prediction:
    percent_of_copy: float
    limit: str
    bytes: int  # that a block must move
    clocks: dict[str, float]  # per block, of a multiprocessor's parts
    thread_blocks: int  # resident on a multiprocessor
    warps: int
    kilobytes_in_flight: float


def ideal_bytes(op: str, n: int) -> int:
    """F read and written; g and rhs read, x and info written; or g read, momentum and weights read and written."""
    return 4 * (n * (n + 1) + 3 * n) + 4 if op == "op" else 4 * (n * (n + 1) + 5 * n)


def resident(registers: int, shared: int, threads: int) -> int:
    """Thread blocks that fit on a multiprocessor."""
    warps = threads // 32
    warps_of_quarter = REGISTERS // 4 // (-(-registers // 8) * 8 * 32)
    by_registers = 4 * warps_of_quarter // warps
    by_shared = SHARED_BYTES // (-(-shared // 128) * 128 + RESERVED_SHARED_BYTES)
    return min(by_registers, by_shared, WARPS // warps, THREAD_BLOCKS)


def predict(kernel: Kernel, n: int, registers: int, counts: Counts) -> Prediction:
    blocks, threads, shared = kernel.geometry(n)
    fit = resident(registers, shared, threads)
    pipes = counts.issued
    spent = {
        "memory": 32 * (len(counts.sectors_read) + len(counts.sectors_written)) / BYTES_PER_CLOCK,
        "issue": sum(pipes.values()) / ISSUE,
        "integer units": pipes["alu"] / INTEGER,
        "float units": max((pipes["fma"] + pipes["imad"]) / FLOAT, pipes["imad"] / MULTIPLY),
        "special functions": pipes["special"] / SPECIAL,
        "shared memory": counts.shared_wavefronts + counts.global_wavefronts,
        "latency": counts.clocks / fit,
    }
    clocks = {part: clock / blocks for part, clock in spent.items()}
    limit = max(clocks, key=clocks.get)
    least = ideal_bytes(kernel.entry, n) / BYTES_PER_CLOCK
    return Prediction(
        round(100 * least / max(least, clocks[limit]), 1), limit, ideal_bytes(kernel.entry, n),
        {part: round(clock, 1) for part, clock in clocks.items()}, fit, fit * threads // 32,
        round(fit * 32 * len(counts.sectors_read) / 1024, 1),
    )  # fmt: skip


def serving(kernels: dict[str, object], entry: str, n: int) -> Iterator[Kernel]:
    """Of each mapping, the kernel that it takes for n."""
    every = [Kernel(name) for name in kernels if name.startswith(entry)]
    for mapping in ("thread", "group", "block"):
        fitting = [k for k in every if k.mapping == mapping and (k.size == n if mapping == "thread" else k.size >= n)]
        if fitting:
            yield min(fitting, key=lambda kernel: kernel.size)


def one(kernel: Kernel, code: list[Instruction], registers: int, n: int) -> tuple[str, Prediction]:
    return f"{OPS[kernel.entry]} n={n} float32 {kernel.mapping}", predict(kernel, n, registers, call(kernel, code, n))


def predictions() -> dict[str, Prediction]:
    objects = cuda_objects.compile_kernels([90], ["thread float", "group float", "block float"])
    code, registers = {}, {}
    for compiled in objects:
        listed = sass.functions(cuda_objects.disassemble(compiled.path))
        code |= {readable(mangled): instructions for mangled, instructions in listed.items()}
        registers |= {name: figures[0] for name, figures in resources(compiled.log).items()}
    cases = [(kernel, n) for n in SIZES for entry in OPS for kernel in serving(code, entry, n)]
    with ProcessPoolExecutor() as pool:
        waiting = [pool.submit(one, kernel, code[kernel.name], registers[kernel.name], n) for kernel, n in cases]
        return dict(result.result() for result in waiting)


def page(found: dict[str, Prediction]) -> str:
    rows = [(*name.split(), prediction) for name, prediction in found.items()]
    tables = [
        OP_TABLE.format(op=op, rows="\n".join(table_row(*row) for row in rows if row[0] == op)) for op in OPS.values()
    ]
    missed = [
        f"- `{op}` {n}: {p.percent_of_copy:.0f} % ({p.limit}), goal {goal(n)} %"
        for op, n, _, mapping, p in rows
        if p.percent_of_copy < goal(n) and mapping == chosen(rows, op, n)
    ]
    return PAGE_TEXT.format(
        version=cuda_objects.nvcc_version(), tables="\n\n".join(tables), missed="\n".join(missed) or "None.",
        bandwidth=COPY_BANDWIDTH / 1e12, processors=MULTIPROCESSORS, clock=CLOCK / 1e9, bytes=BYTES_PER_CLOCK,
    )  # fmt: skip


def chosen(rows: list[tuple], op: str, n: str) -> str:
    """The mapping that the library takes: the first that serves n."""
    return next(row[3] for row in rows if row[:2] == (op, n))


def goal(n: str) -> int:
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu.goals import percent_of_copy  # needs torch

    return percent_of_copy(int(n.removeprefix("n=")))


def table_row(op: str, n: str, dtype: str, mapping: str, p: Prediction) -> str:
    verdict = "reached" if p.percent_of_copy >= goal(n) else "missed"
    clocks = [f"{p.clocks[part]:.0f}" for part in PARTS]
    cells = [n.removeprefix("n="), mapping, f"{p.percent_of_copy:.0f}", f"{goal(n)}, {verdict}", p.limit, *clocks]
    return "| " + " | ".join(map(str, [*cells, p.warps, f"{p.kilobytes_in_flight:.0f}"])) + " |"


OP_TABLE = """## {op}

| n | mapping | % of copy | goal | limit | memory | issue | integer | float | special | shared | latency | warps | KB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}"""

PAGE_TEXT = """# Predicted, not measured

What share of an H200's copy bandwidth each CUDA kernel can reach at most, read off its machine code for sm_90 (nvcc
{version}); contiguous float32 gradients, a device full of blocks. `python tools/predict.py` writes this page and
`benchmarks/gpu/predicted.json`, which the GPU benchmarks print beside what they measure. No GPU is needed.

## How

A thread block of each kernel is run on the CPU, instruction by instruction (`tools/sass_machine.py`), on random blocks;
the run counts only if its results agree with float64. What it counts is turned into clocks of a multiprocessor per
mini-block, each part at its full rate; the largest is the limit, and memory's own share of it the prediction:

- memory: sectors of 32 bytes touched, at {bytes:.1f} bytes per clock: {bandwidth:g} TB/s (a measured copy) over
  {processors} multiprocessors at {clock} GHz;
- issue: 4 warp instructions per clock; integer, logic, comparison and selection: 2; multiply-add of integers: 2;
  floats: 4; square roots, reciprocals, conversions, MATCH and REDUX: 1/2;
- shared: one wavefront of 32 banks per clock, bank conflicts counted, and one per 128-byte line of global memory;
- latency: clocks of a lone thread block, from a scoreboard with published latencies (29 for shared memory, 600 for
  global, 18 for special functions), divided by the thread blocks that registers and shared memory have room for;
- warps: resident on a multiprocessor; KB: what their reads ask of memory in all, of which about 26 KB must be under way
  at any time (4.3 TB/s times some 800 ns).

What it leaves out: contention between warps other than for the parts above, misses of the instruction cache (a kernel
may be 200 KB long), latency under load, the ramps of a launch, and other clock rates. Parts of a wide access that lanes
share are taken to merge. So every figure is an upper bound; where the next limit is within a tenth, expect less.

## Predicted to miss its goal

In the mapping that the library chooses, and what limits it:

{missed}

{tables}

Columns from memory to latency: clocks of a multiprocessor per mini-block. The first mapping of an n is the one that the
library chooses.
"""


def main() -> int:
    try:
        found = predictions()
    except Problem as problem:
        print(problem)
        return 1
    JSON.write_text(json.dumps({name: asdict(p) for name, p in found.items()}, indent=1) + "\n")
    PAGE.write_text(page(found))
    print(f"wrote {JSON} and {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
