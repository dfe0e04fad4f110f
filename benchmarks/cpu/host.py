"""The host's share of a step: MBF's with its kernels left out, and whole steps with next to nothing to compute."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from benchmarks.cpu.plan import Plan
from benchmarks.cpu.steps import TOGETHER, WARM_UP
from benchmarks.methods import METHODS, random_parameters
from benchmarks.optimizers import NotApplicable
from benchmarks.timing import measure, race
from mbf_kernels import native

WITHOUT_KERNELS, TINY = "kernels left out", "every tensor of one element"
SECONDS = 0.5
LAUNCHES = ("cpu_launch", "cpu_launch_shared", "cpu_launch_diagonal")


def rows(plan: Plan) -> Iterator[dict]:
    facts = {"part": "host", "what": plan.many, "tensors": len(plan.cases[plan.many].shapes)}
    yield facts | without_kernels(plan)
    for row in tiny(plan):
        yield facts | row


def without_kernels(plan: Plan) -> dict:
    method, parameters = METHODS["mbf"], random_parameters(plan.cases[plan.many].shapes, "cpu", "contiguous")
    optimizer = method.make(list(parameters.items()))
    for _ in range(WARM_UP):
        optimizer.step()
    nothing = dict.fromkeys(LAUNCHES, lambda *arguments: None)
    with mock.patch.object(native, "_C", SimpleNamespace(**vars(native._C) | nothing)):
        for _ in range(2):  # the first wakes the processor, which takes some tenths of a second
            timing = measure([optimizer.step], "cpu", SECONDS)
    return {"work": WITHOUT_KERNELS, "method": "mbf", "label": method.label} | timing.record()


def tiny(plan: Plan) -> Iterator[dict]:
    shapes = {name: (1,) * len(shape) for name, shape in plan.cases[plan.many].shapes.items()}
    parameters = list(random_parameters(shapes, "cpu", "contiguous").items())
    optimizers = {}
    for key, method in METHODS.items():
        if method.library in TOGETHER:
            try:
                optimizers[key] = method.make(parameters)
            except NotApplicable as reason:
                yield {"work": TINY, "method": key, "label": method.label, "absent": str(reason)}
    timings = race({key: optimizer.step for key, optimizer in optimizers.items()}, "cpu", plan.seconds)
    for key, timing in timings.items():
        yield {"work": TINY, "method": key, "label": METHODS[key].label} | timing.record()
