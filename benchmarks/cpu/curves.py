"""What a block costs in the fused op, against how many there are and against their size; and the knees in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from benchmarks.cpu.plan import Plan
from benchmarks.ops import FUSED, OPS, Problem, triangle
from benchmarks.timing import measure
from mbf_kernels import SymmetricBlocks

OP = OPS[FUSED]
TILE = 32  # so many blocks more than asked for are never half a tile


def rows(plan: Plan) -> Iterator[dict]:
    yield from against_count(plan)
    yield from against_size(plan)


def against_count(plan: Plan) -> Iterator[dict]:
    """One problem of each size, checked once; the smaller counts are its first blocks."""
    for n in plan.curve_sizes:
        counts = [count for count in plan.counts if 4 * count * triangle(n) <= plan.curve_bytes]
        whole = Problem("cpu", counts[-1], n, torch.float32, "contiguous", n)
        OP.check(whole)
        for threads in sorted({1, torch.get_num_threads()}):
            with using_threads(threads):
                for count in counts:
                    yield {"part": "against count", "threads": threads} | timed(first(whole, count), plan)


def against_size(plan: Plan) -> Iterator[dict]:
    for n in plan.all_sizes:
        problem = Problem("cpu", plan.count(n), n, torch.float32, "contiguous", n)
        OP.check(problem)
        yield {"part": "against size", "threads": torch.get_num_threads()} | timed(problem, plan)


def first(problem: Problem, count: int) -> SimpleNamespace:
    """The problem of the first blocks alone, in the same memory."""
    blocks = problem.fisher
    stored = -(-count // TILE) if blocks.data.ndim == 3 else count
    fisher = SymmetricBlocks(blocks.data[:stored], count, blocks.size)
    return SimpleNamespace(fisher=fisher, g=problem.g[:count], rhs=problem.rhs[:count])


def timed(problem: Problem | SimpleNamespace, plan: Plan) -> dict:
    count, n = len(problem.fisher), problem.fisher.size
    moved = count * OP.moved(n, 4)
    timing = measure([lambda: OP.call(problem)], "cpu", plan.seconds / 2)
    return {"n": n, "count": count} | timing.record(moved) | {"ns_per_block": timing.median / count * 1e9}


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)
