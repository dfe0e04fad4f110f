"""The ops one by one, over sizes, dtypes, layouts and backends, beside other libraries' calls for the same work.

All that are compared run interleaved on the same data, each checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

import mbf_kernels
from benchmarks.cpu.copies import copies, name
from benchmarks.cpu.plan import Plan
from benchmarks.ops import LAYOUTS, OPS, Op
from benchmarks.peers import AMORTISED, INVERSE, PEERS, PRODUCT, T2, missing
from benchmarks.timing import Timing, race

BACKENDS = ("cpu", "reference")
DTYPES = (torch.float32, torch.float64)


def rows(plan: Plan) -> Iterator[dict]:
    """Peers are measured in float32."""
    for peer in PEERS:
        if missing(peer.library):
            yield {"part": "kernels", "what": peer.op, "label": peer.label, "absent": missing(peer.library)}
    for n, dtype, (op, layout) in product(plan.sizes, DTYPES, op_layouts()):
        yield from rows_of_op(plan, n, dtype, op, layout)


def op_layouts() -> list[tuple[str, str]]:
    return [(op, layout) for op in OPS for layout in (LAYOUTS if op == "mbf_step_" else LAYOUTS[:1])]


def rows_of_op(plan: Plan, n: int, dtype: torch.dtype, op: str, layout: str) -> Iterator[dict]:
    count = plan.count(n, dtype.itemsize)
    moved = count * OPS[op].moved(n, dtype.itemsize)
    inputs = ("cpu", count, n, dtype, layout, n)
    calls = {name: own_call(OPS[op], name, inputs) for name in BACKENDS if mbf_kernels.backends()[name] == "available"}
    for peer in PEERS if dtype == torch.float32 else ():
        if peer.op == op and not missing(peer.library):
            calls[peer.label] = peer.checked_call(OPS[op].problem(*inputs))
    timings = race(calls | copies([moved]), "cpu", plan.seconds)
    copied = timings.pop(name(moved))
    if INVERSE in timings:
        timings[AMORTISED] = amortised(timings[PRODUCT], timings[INVERSE])
    facts = {"part": "kernels", "op": op, "n": n, "count": count, "dtype": str(dtype).removeprefix("torch.")}
    for by, timing in timings.items():
        ratios = {"ns_per_block": timing.median / count * 1e9, "times_copy": timing.median / copied.median}
        yield facts | {"layout": layout, "by": by} | timing.record(moved) | ratios


def own_call(op: Op, backend: str, inputs: tuple) -> Callable[[], object]:
    """The op on a backend, checked. The timed call does not force the default backend: that would cost time."""
    problem = op.problem(*inputs)
    with mbf_kernels.use_backend(backend):
        op.check(problem)

    def forced():
        with mbf_kernels.use_backend(backend):
            op.call(problem)

    return forced if backend == "reference" else lambda: op.call(problem)


def amortised(product: Timing, inverse: Timing) -> Timing:
    """The paper's schedule: a product with an old inverse at every step, F and its inverse anew at every T2-th."""
    means = (getattr(product, what) + getattr(inverse, what) / T2 for what in ("median", "p20", "p80", "mean"))
    return Timing(*means, worst=inverse.worst, samples=inverse.samples)
