"""The ops and the optimizers' steps for pytest-benchmark, which compares two states of the sources:

    pytest benchmarks --benchmark-autosave            before a change
    pytest benchmarks --benchmark-compare             after it

Sizes are those of `make bench FAST=1`; each call is checked before it is timed.
"""

import pytest
import torch

from benchmarks.cpu.plan import FAST
from benchmarks.methods import METHODS, check_first_steps, random_parameters
from benchmarks.ops import OPS


@pytest.mark.parametrize("n", FAST.sizes)
@pytest.mark.parametrize("op", OPS)
def bench_op(benchmark, op, n):
    problem = OPS[op].problem("cpu", FAST.count(n), n, torch.float32, "contiguous", n)
    OPS[op].check(problem)
    benchmark.group = f"{op}, n = {n}"
    benchmark(OPS[op].call, problem)


@pytest.mark.parametrize("what", FAST.cases)
@pytest.mark.parametrize("name", ["adam", "mbf"])
def bench_step(benchmark, name, what):
    parameters = random_parameters(FAST.cases[what].shapes, "cpu", FAST.cases[what].layout)
    optimizer = METHODS[name].make(list(parameters.items()))
    check_first_steps(parameters, METHODS[name], optimizer)
    benchmark.group = what
    benchmark(optimizer.step)
