"""Calls of accumulate_, factor, solve and accumulate_factor_solve_, and their truth in float64."""

import numpy as np
import torch

import mbf_kernels
from mbf_kernels.testing import assert_below, assert_bitwise, assert_factors, assert_padding_zero, assert_solves

from . import bad
from .arguments import DTYPES, SIZES, Call, Choices, blocks, flag, matrices, number, tensor

COUNTS = (2, 1, 3, 5, 0, 33)
DECAYS = (0.5, 0.9, 0.0, 1.0, 0.999)
DAMPINGS = (0.5, 1, 1e-2, 1e3)


class Setting:
    """What all ops have: matrices F, in ``dense`` as they were, with one bad block or none."""

    def __init__(self, choices: Choices):
        self.dtype, self.size, self.count = choices.of(DTYPES), choices.of(SIZES), choices.of(COUNTS)
        if self.size > 33:
            self.count = min(self.count, 3)
        self.dense = matrices(choices, self.count, self.size, self.dtype)
        self.fisher = blocks(self.dense)

    def vectors(self, choices, *leading, call):
        return tensor(choices, choices.randn(*leading, self.count, self.size, dtype=self.dtype), call, read_only=True)

    def ridge(self, dense: torch.Tensor, damping, relative) -> torch.Tensor:
        """lambda of each block."""
        means = dense.double().diagonal(dim1=1, dim2=2).mean(-1)
        return float(damping) * (means if relative else torch.ones_like(means))

    def damped(self, dense, damping, relative) -> torch.Tensor:
        identity = torch.eye(self.size, dtype=torch.float64)
        return dense.double() + self.ridge(dense, damping, relative)[:, None, None] * identity

    def damping(self, choices, relative, dense):
        """Relative damping, or an absolute one of the same strength."""
        scales = dense.diagonal(dim1=1, dim2=2).nan_to_num(0, 0, 0)
        scale = scales.double().mean().item() if not relative and scales.any() else 1.0
        return number(choices, [d * scale for d in DAMPINGS], on_device=True)


def accumulated(dense: torch.Tensor, g: torch.Tensor, decay) -> tuple[torch.Tensor, torch.Tensor]:
    """decay F + (1 - decay) mean_s g_s g_s^T, and the bound on its rounding: S + 5 times that of every element."""
    samples, decay = (g if g.ndim == 3 else g[None]).double().numpy(), float(decay)
    terms = [(decay * dense.double().numpy(), samples), (decay * dense.double().abs().numpy(), np.abs(samples))]
    with np.errstate(invalid="ignore"):  # a bad block
        truth, magnitude = (f + (1 - decay) * np.einsum("sbi,sbj->bij", x, x) / len(x) for f, x in terms)
    bound = (len(samples) + 5) * torch.finfo(dense.dtype).eps * magnitude
    return torch.from_numpy(truth), torch.from_numpy(bound)


def accumulate_(choices: Choices):
    setting, samples = Setting(choices), choices.of([(), (1,), (3,)])
    fisher = setting.fisher
    call = Call("accumulate_", mbf_kernels.accumulate_, {"fisher": fisher}, written=[setting.fisher])
    g, decay = setting.vectors(choices, *samples, call=call), number(choices, DECAYS)
    call.arguments |= {"g": g, "decay": decay}
    call.bad = {"fisher": bad.UNLIKE_BLOCKS, "g": bad.ANY_TENSOR, "decay": bad.UNIT}
    truth, bound = accumulated(setting.dense, plain(g), decay)

    def check(result):
        assert result is fisher
        assert_below((fisher.to_dense() - truth).abs(), bound, "F")
        assert_padding_zero(fisher)

    call.check = check
    yield call


def factor(choices: Choices):
    setting, relative = Setting(choices), flag(choices)
    damping = setting.damping(choices, relative, setting.dense)
    call = Call("factor", mbf_kernels.factor, {"fisher": setting.fisher, "damping": damping, "relative": relative})
    call.bad = {"fisher": bad.NO_BLOCKS, "damping": bad.DEVICE_NUMBERS, "relative": bad.FLAGS}
    a = setting.damped(setting.dense, damping, relative)

    def check(result):
        lower, info = result
        check_info(info, expected_info(a))
        assert (lower.count, lower.size, lower.dtype) == (setting.count, setting.size, setting.dtype)
        good = info == 0
        assert_factors(a[good], lower.to_dense()[good], setting.dtype)
        assert not lower.to_dense()[~good].any()
        assert_padding_zero(lower)

    call.check = check
    yield call


def solve(choices: Choices):
    setting, sides = Setting(choices), choices.of([(), (1,), (4,), (0,)])
    a = setting.damped(setting.dense, setting.damping(choices, False, setting.dense), False)
    factor = blocks(torch.linalg.cholesky(a).to(setting.dtype))
    a = factor.to_dense().double().tril()
    a = a @ a.mT
    call = Call("solve", mbf_kernels.solve, {"factor": factor})
    values = choices.randn(setting.count, setting.size, *sides, dtype=setting.dtype)
    rhs = tensor(choices, values, call, read_only=True)
    call.arguments["rhs"] = rhs
    call.bad = {"factor": bad.UNLIKE_BLOCKS, "rhs": bad.ANY_TENSOR}
    expected = plain(rhs).clone()

    def check(x):
        assert (x.shape, x.dtype) == (rhs.shape, rhs.dtype)
        assert_solves(a, plain(x), expected, setting.dtype)

    call.check = check
    yield call


def accumulate_factor_solve_(choices: Choices):
    setting, relative = Setting(choices), flag(choices)
    fisher, decay = setting.fisher, number(choices, DECAYS)
    arguments = {"fisher": fisher, "decay": decay, "relative": relative}
    call = Call("accumulate_factor_solve_", mbf_kernels.accumulate_factor_solve_, arguments, written=[setting.fisher])
    g, rhs = setting.vectors(choices, call=call), setting.vectors(choices, call=call)
    poison = choices.of([None, None, None, torch.nan, torch.inf])
    if setting.count and poison is not None:
        g = plain(g).clone()
        g[-1, setting.size // 2] = poison
    truth, bound = accumulated(setting.dense, plain(g), decay)
    damping = setting.damping(choices, relative, truth)
    call.arguments |= {"g": g, "rhs": rhs, "damping": damping}
    call.bad = {
        "fisher": bad.UNLIKE_BLOCKS, "g": bad.ANY_TENSOR, "rhs": bad.ANY_TENSOR, "decay": bad.UNIT,
        "damping": bad.DEVICE_NUMBERS, "relative": bad.FLAGS,
    }  # fmt: skip
    a = setting.damped(truth, damping, relative)

    def check(result):
        x, info = result
        expected = expected_info(a)
        if setting.count and poison is not None:
            assert 0 < info[-1] <= setting.size
            expected[-1] = info[-1]
        check_info(info, expected)
        good = info == 0
        assert_below((fisher.to_dense() - truth).abs()[good], bound[good], "F")
        assert_bitwise(fisher.to_dense()[~good], setting.dense[~good])
        assert_solves(a[good], plain(x)[good], plain(rhs)[good], setting.dtype)
        assert not plain(x)[~good].any()
        assert_padding_zero(fisher)

    call.check = check
    yield call


def plain(t: torch.Tensor) -> torch.Tensor:
    """The values alone, without what makes it special."""
    return t.detach().as_subclass(torch.Tensor).resolve_neg()


def expected_info(a: torch.Tensor) -> torch.Tensor:
    """Of matrices that are positive definite, or zero: relative damping of zero is zero."""
    return (a == 0).all(-1).all(-1).to(torch.int32)


def check_info(info: torch.Tensor, expected: torch.Tensor) -> None:
    assert info.dtype == torch.int32 and torch.equal(info, expected), f"info {info.tolist()}"


FUNCTIONS = (accumulate_, factor, solve, accumulate_factor_solve_)
