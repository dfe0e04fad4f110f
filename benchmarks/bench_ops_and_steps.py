"""The ops and the optimizers' steps for pytest-benchmark, which compares two states of the sources:

    pytest benchmarks --benchmark-autosave            before a change
    pytest benchmarks --benchmark-compare             after it

Sizes are those of `make bench FAST=1`; each call is checked before it is timed.
"""

import pytest
import torch
from mbf_optim import MBF
from torch.nn import Parameter

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


LOW_PRECISION = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, masters": (torch.bfloat16, dict(master_weights=True)),
    "bfloat16, rounded at random": (torch.bfloat16, dict(stochastic_rounding=True)),
}


@pytest.mark.parametrize("what", ["ResNet-18, a quarter of its width", "ResNet-32 (CIFAR)"])
@pytest.mark.parametrize("precision", LOW_PRECISION)
def bench_step_of_low_precision(benchmark, precision, what):
    dtype, options = LOW_PRECISION[precision]
    drawn = random_parameters(FAST.cases[what].shapes, "cpu", FAST.cases[what].layout)
    parameters = {name: Parameter(drawn[name].detach().to(dtype)) for name in drawn}
    for name, parameter in parameters.items():
        parameter.grad = drawn[name].grad.to(dtype)
    optimizer = MBF(parameters.items(), **options)
    optimizer.step()
    benchmark.group = f"{what}, low precision"
    benchmark(optimizer.step)
