"""The two roofs of this machine: how fast it copies, and how fast it multiplies large matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.cpu.copies import copies, name
from benchmarks.cpu.plan import Plan
from benchmarks.timing import measure


def rows(plan: Plan) -> Iterator[dict]:
    moved = 2 * plan.copy_bytes
    timing = measure([copies([moved])[name(moved)]], "cpu", 4 * plan.seconds)
    yield {"part": "roofs", "what": "copy", **timing.record(moved)}
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(2, plan.product_size, plan.product_size, dtype=dtype)
        timing = measure([lambda a=a, b=b: a @ b], "cpu", 4 * plan.seconds)
        facts = {"part": "roofs", "what": "matrix product", "dtype": str(dtype).removeprefix("torch.")}
        yield facts | timing.record() | {"gflops": 2 * plan.product_size**3 / timing.p20 * 1e-9}
