"""The kernels one by one: the fused op at every size, layout, mapping and count, its parts, and torch's way.

Every row checks a sample of its blocks against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.baseline import linalg_step
from benchmarks.gpu.rows import Row
from benchmarks.gpu.setting import Setting
from benchmarks.ops import DAMPING, DECAY, OPS, Problem, accumulated, damped, dense
from benchmarks.timing import measure, measure_graph
from mbf_kernels import native
from mbf_kernels.testing import assert_solves

SIZES = (4, 9, 12, 16, 20, 24, 25, 32, 48, 49, 64, 96, 128)
TRITON_SIZES = (4, 9, 12, 16, 20)
CROSSOVERS = {n: ("thread", "group") for n in (12, 16, 20)} | {n: ("group", "block") for n in (24, 32, 48, 64)}
SWEEP = (10**3, 10**4, 10**5, 10**6, 10**7)  # blocks of 9x9: where a launch costs more than its work
YARDSTICK = (32, 4096)  # blocks of 32x32, as in a public contest
PARTS_SIZES = (9, 32, 64)
DOUBLE_SIZES = (9, 32, 64, 128)
LINALG_SIZES = (16, 25, 32, 64, 128)


def rows(s: Setting) -> Iterator[Row]:
    """What matters most comes first: time may run out."""
    sizes, sweep, crossovers = (SIZES, SWEEP, CROSSOVERS)
    if s.rehearsal:
        sizes, sweep, crossovers = (4, 9, 21), (10, 100), {4: ("thread", "group")} if s.mappings else {}
    triton = [n for n in sizes if n in TRITON_SIZES] if s.triton else []
    modes = ("eager",) if s.rehearsal else ("eager", "graph")
    yield from (Kernel(s, n).row() for n in sizes)
    yield from (Kernel(s, 9, count, mode=mode).row() for count in sweep for mode in modes)
    yield from (Linalg(s, 9, 10**6 if not s.rehearsal else 100, mode=mode).row() for mode in modes)
    yield from (Kernel(s, n, mapping=m).row() for n, mappings in crossovers.items() for m in mappings)
    yield from (Kernel(s, n, backend="triton").row() for n in triton)
    yield from (Kernel(s, n, layout="channels_last").row() for n in sizes)
    n, count = YARDSTICK if not s.rehearsal else (21, 40)
    for mode in modes:
        yield Kernel(s, n, count, op="factor", mode=mode).row()
        yield Kernel(s, n, count, mode=mode).row()
        yield Linalg(s, n, count, op="cholesky_ex", mode=mode).row()
        yield Linalg(s, n, count, mode=mode).row()
    yield from (Kernel(s, n, backend="triton", layout="channels_last").row() for n in triton)
    yield from (Linalg(s, n).row() for n in (LINALG_SIZES if not s.rehearsal else (21,)))
    parts = PARTS_SIZES if not s.rehearsal else (9,)
    yield from (Kernel(s, n, op=op).row() for n in parts for op in ("accumulate_", "factor", "solve"))
    doubles = DOUBLE_SIZES if not s.rehearsal else (9,)
    yield from (Kernel(s, n, dtype=torch.float64).row() for n in doubles)


@dataclass(frozen=True)
class Kernel:
    """One measurement of one of our ops; `count` None fills the device."""

    s: Setting
    n: int
    count: int | None = None
    op: str = "accumulate_factor_solve_"
    backend: str | None = None
    mapping: str | None = None
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    mode: str = "eager"

    def row(self) -> Row:
        dtype, backend = str(self.dtype).removeprefix("torch."), self.backend or self.s.backend
        count = self.count or max(1, self.s.state_bytes // (self.dtype.itemsize * self.n * (self.n + 1) // 2))
        facts = {
            "op": self.op, "n": self.n, "count": count, "full": self.count is None, "dtype": dtype,
            "backend": backend, "mapping": self.mapping or "default", "layout": self.layout, "mode": self.mode,
        }  # fmt: skip
        words = [self.op, f"n={self.n}", f"B={count}", dtype, backend, self.mapping, self.layout]
        words += [self.mode] * (self.mode != "eager")
        name = " ".join(filter(None, words))
        # a first Triton call compiles
        return Row(name, partial(self.run, backend, count), facts, 240 if backend == "triton" else 90)

    def run(self, backend: str, count: int) -> dict:
        op = OPS[self.op]
        moved = count * op.moved(self.n, self.dtype.itemsize)
        with self.s.using(backend), self.forced():
            problems = [
                op.problem(self.s.device, count, self.n, self.dtype, self.layout, seed)
                for seed in range(self.s.sets(moved))
            ]
            op.check(problems[0])
            clock = measure_graph if self.mode == "graph" else measure
            timing = clock([partial(op.call, problem) for problem in problems], self.s.device, self.s.seconds)
        return timing.record(moved) | {"ns_per_block": timing.median / count * 1e9}

    def forced(self) -> AbstractContextManager:
        return native.cuda_mapping(self.mapping) if self.mapping else nullcontext()


@dataclass(frozen=True)
class Linalg:
    """The same work in torch.linalg."""

    s: Setting
    n: int
    count: int | None = None
    op: str = "linalg step"
    mode: str = "eager"

    def row(self) -> Row:
        count = self.count or max(1, self.s.state_bytes // (32 * self.n**2))
        facts = {"op": self.op, "n": self.n, "count": count, "dtype": "float32", "backend": "torch", "mode": self.mode}
        name = f"torch {self.op} n={self.n} B={count}" + (" graph" if self.mode == "graph" else "")
        return Row(name, partial(self.run, count), facts)

    def run(self, count: int) -> dict:
        touched = count * self.n**2 * 4
        problems = [
            Problem(self.s.device, count, self.n, torch.float32, "contiguous", seed)
            for seed in range(self.s.sets(touched))
        ]
        if self.op == "cholesky_ex":
            calls = [partial(torch.linalg.cholesky_ex, damped(p.fisher.to_dense())) for p in problems]
        else:
            calls = [partial(linalg_step, p.fisher.to_dense(), p.g, p.rhs, DECAY, DAMPING) for p in problems]
            self.check(problems[0])
        clock = measure_graph if self.mode == "graph" else measure
        timing = clock(calls, self.s.device, self.s.seconds)
        return timing.record() | {"ns_per_block": timing.median / count * 1e9}

    def check(self, p: Problem) -> None:
        index = p.sample()
        truth, _ = accumulated(dense(p.fisher, index), p.g[index])
        x = linalg_step(p.fisher.to_dense()[index], p.g[index], p.rhs[index], DECAY, DAMPING)
        assert_solves(damped(truth), x, p.rhs[index], p.rhs.dtype)
