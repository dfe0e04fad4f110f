"""MBF as PyTorch's test suite describes an optimizer: an OptimizerInfo with inputs for every option.

Who imports this is skipped where that suite, a private part of torch, cannot be imported.
"""

import copy
from functools import partial

import pytest
import torch
from brute_force import PAPER
from mbf_optim import MBF
from test_mbf import PARTITIONS
from test_param_groups import OVERRIDES, Problem
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, PolynomialLR, ReduceLROnPlateau, StepLR

from mbf_kernels.testing import assert_bitwise

suite = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch's test suite cannot be imported (it needs expecttest)"
)
OptimizerInput, ErrorOptimizerInput = suite.OptimizerInput, suite.ErrorOptimizerInput


def inputs(device, dtype=None):
    """Every option alone, every partition, the paper's form, and rates as tensors."""
    number = partial(torch.tensor, dtype=torch.float64, device=device)
    options = {"default": {}, "the paper's form": PAPER}
    options |= {f"non-default {name}": override for name, override in OVERRIDES.items()}
    options |= {f"blocks: {name}": it for name, it in PARTITIONS.items() if it not in options.values()}
    options["maximize, weight_decay"] = dict(maximize=True, weight_decay=0.1)
    options["Tensor lr and damping"] = dict(lr=number(0.01), damping=number(0.2))
    options["Tensor lr and damping, capturable"] = dict(lr=number(0.01), damping=number(0.2), capturable=True)
    options["Tensor lr, capturable, the paper's form"] = PAPER | dict(lr=number(0.01), capturable=True)
    return [OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in options.items()]


def error_inputs(device, dtype):
    """Those of every optimizer, and what MBF cannot do; tests/test_mbf.py has its options' bounds."""
    param = torch.nn.Parameter(torch.ones(2, 3, device=device, dtype=dtype))
    complex_param = torch.nn.Parameter(torch.ones(2, 3, device=device, dtype=torch.complex64))
    return [
        *suite.get_error_inputs_for_all_optims(device, dtype),
        ErrorOptimizerInput(
            OptimizerInput(params=[complex_param], kwargs={}, desc="complex parameters"),
            error_type=TypeError,
            error_regex="complex64",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=[param], kwargs=dict(differentiable=True), desc="differentiable"),
            error_type=ValueError,
            error_regex="MBF: expected differentiable to be False.*, got True",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=[dict(params=[param], differentiable=True)], kwargs={}, desc="differentiable group"),
            error_type=ValueError,
            error_regex="MBF: expected differentiable to be False.*, got True",
        ),
    ]


INFO = suite.OptimizerInfo(
    MBF,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [],
        [lambda opt: ExponentialLR(opt, gamma=0.9)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
        [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4), lambda opt: ExponentialLR(opt, gamma=0.9)],
        [lambda opt: PolynomialLR(opt, power=0.9, total_iters=4)],
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=(),
    not_og_supported_flags=tuple(OVERRIDES),
    has_capturable_arg=True,
    supports_complex=False,
)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


class Maker:
    """Makes runs of one input: a problem on the device, and MBF with the input's options for it."""

    def __init__(self, device, number):
        self.device, self._number = device, number

    @property
    def options(self):
        """A copy: schedulers write into a tensor."""
        return copy.deepcopy(INFO.optim_inputs_func(self.device)[self._number].kwargs)

    def __call__(self, **overrides):
        problem = Problem(device=self.device)
        return problem, INFO.optim_cls(problem.named.items(), **(self.options | overrides))


def _makers(count):
    names = [optimizer_input.desc for optimizer_input in INFO.optim_inputs_func("cpu")][:count]
    return [pytest.param(Maker(d, i), id=f"{d}-{name}") for d in DEVICES for i, name in enumerate(names)]


over_inputs = pytest.mark.parametrize("make", _makers(None))
over_devices = pytest.mark.parametrize("make", _makers(1))  # the default options alone


def assert_equal_trees(actual, expected):
    """Nested dicts and sequences of tensors and numbers: the same types and values, tensors bit by bit."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert_bitwise(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal_trees(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_equal_trees(a, b)
    else:
        assert actual == expected
