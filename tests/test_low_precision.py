"""MBF on parameters in bfloat16 and float16: its state and its arithmetic are float32's."""

import copy
import io
import math

import pytest
import torch
from mbf_optim import MBF
from mbf_optim.rounding import round_stochastically_
from test_mbf import FORMS, PARTITIONS
from torch import nn

from mbf_kernels.testing import assert_bitwise, randn

SHAPES = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "linear.weight": (4, 7), "linear.bias": (4,)}
STEPS = 5
OPTIONS = dict(lr=1e-2, damping=1e-2, weight_decay=0.1)
over_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
over_forms = pytest.mark.parametrize("form", FORMS)
over_partitions = pytest.mark.parametrize("partition", PARTITIONS)


class Twins:
    """Parameters of low precision, and others in float32 of the same values, with the same gradients."""

    def __init__(self, dtype, options, **low):
        values = [randn(*shape, dtype=torch.float32, seed=i).to(dtype) for i, shape in enumerate(SHAPES.values())]
        self.low, self.full = ([nn.Parameter(v.to(d)) for v in values] for d in (dtype, torch.float32))
        options = OPTIONS | options
        self.optimizer = MBF(zip(SHAPES, self.low, strict=True), **options | low)
        self.reference = MBF(zip(SHAPES, self.full, strict=True), **options)
        self.steps, self.dtype = 0, dtype

    def step(self, drop=()):
        self.steps += 1
        for i, (name, low, full) in enumerate(zip(SHAPES, self.low, self.full, strict=True)):
            grad = randn(*low.shape, dtype=torch.float32, seed=10 * self.steps + i).to(self.dtype)
            low.grad, full.grad = (None, None) if name in drop else (grad, grad.float())
        self.optimizer.step()
        self.reference.step()

    def assert_states_are_the_same(self):
        ours, theirs = (o.state_dict()["state"] for o in (self.optimizer, self.reference))
        for mine, other in zip(ours.values(), theirs.values(), strict=True):
            assert mine.keys() - {"master"} == other.keys()
            for name, value in other.items():
                assert_bitwise(mine[name], value)


@over_dtypes
@over_forms
@over_partitions
def test_master_weights_are_the_weights_of_float32(dtype, form, partition):
    """Bitwise, the state too; the parameters are their nearest neighbours."""
    twins = Twins(dtype, FORMS[form] | PARTITIONS[partition], master_weights=True)
    for drop in ((), (), ("linear.bias",), ("conv.weight",), ()):
        twins.step(drop)
    twins.assert_states_are_the_same()
    for low, full in zip(twins.low, twins.full, strict=True):
        assert_bitwise(twins.optimizer.state[low]["master"], full)
        assert_bitwise(low, full.to(dtype))


@over_dtypes
@over_forms
@over_partitions
def test_without_masters_every_step_is_rounded(dtype, form, partition):
    """A step of float32, and the nearest weights after it, bitwise."""
    twins = Twins(dtype, FORMS[form] | PARTITIONS[partition])
    for _ in range(STEPS):
        twins.step()
        for low, full in zip(twins.low, twins.full, strict=True):
            assert_bitwise(low, full.to(dtype))
            full.data.copy_(low)
    twins.assert_states_are_the_same()


@over_dtypes
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("options", [{}, dict(master_weights=True), dict(stochastic_rounding=True)], ids=str)
def test_resume_is_bitwise(dtype, capturable, options):
    """And the state stays float32: torch's own load_state_dict would round it to the parameters' dtype."""
    if capturable and "stochastic_rounding" in options:
        return
    options = options | dict(capturable=capturable, update_interval=1, factor_interval=1)
    straight, resumed = Twins(dtype, {}, **options), Twins(dtype, {}, **options)
    for twins in (straight, resumed):
        for _ in range(2):
            twins.step()
    file = io.BytesIO()
    torch.save(resumed.optimizer.state_dict(), file)
    file.seek(0)
    fresh = Twins(dtype, {}, **options)
    for mine, other in zip(fresh.low, resumed.low, strict=True):
        mine.data.copy_(other)
    fresh.optimizer.load_state_dict(torch.load(file, weights_only=True))
    fresh.steps = resumed.steps
    for state in fresh.optimizer.state_dict()["state"].values():
        assert all(v.dtype != dtype for v in state.values()) and state["momentum"].dtype == torch.float32
    for twins in (straight, fresh):
        for _ in range(3):
            twins.step()
    for a, b in zip(straight.low, fresh.low, strict=True):
        assert_bitwise(a, b)


@over_dtypes
def test_masters_give_way_to_weights_that_are_set(dtype):
    """As when a model's checkpoint is loaded after the optimizer has been made: it is not overwritten."""
    twins = Twins(dtype, {}, master_weights=True)
    twins.step()
    with torch.no_grad():
        twins.low[0].fill_(2)
        twins.full[0].fill_(2)
        twins.low[2][1] = 0.5  # a row alone: the others keep what their masters know
        twins.full[2][1] = 0.5
    twins.step()
    for low, full in zip(twins.low, twins.full, strict=True):
        assert_bitwise(twins.optimizer.state[low]["master"], full)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_may_be_cast_before_the_first_step(dtype):
    """Though the state is made with the optimizer: it is made anew."""
    torch.manual_seed(0)
    late = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    early = copy.deepcopy(late).to(dtype)
    optimizers = [MBF(model.named_parameters(), **OPTIONS) for model in (late, early)]
    late.to(dtype)
    for step in range(3):
        for model, optimizer in zip((late, early), optimizers, strict=True):
            for i, param in enumerate(model.parameters()):
                param.grad = randn(*param.shape, seed=10 * step + i).to(dtype)
            optimizer.step()
    for ours, expected in zip(late.parameters(), early.parameters(), strict=True):
        assert_bitwise(ours, expected)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for ours, expected in zip(*(state.values() for state in states), strict=True):
        for name, value in expected.items():
            assert_bitwise(ours[name], value)


@over_dtypes
def test_small_decays_reach_the_weights(dtype):
    """A decay below half a unit in the last place is lost in rounding, unless there are masters, or it is rounded up
    and down at random: the mean of n weights then errs by a unit / sqrt(n) per root of a step."""
    eps, steps, n = torch.finfo(dtype).eps, 100, 10_000
    means = {}
    for name, options in {
        "nearest": {},
        "master": dict(master_weights=True),
        "random": dict(stochastic_rounding=True),
    }.items():
        w = nn.Parameter(torch.ones(n, dtype=dtype))
        optimizer = MBF([w], lr=eps / 8, weight_decay=1.0, **options)
        for _ in range(steps):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        means[name] = w.double().mean().item()
    expected = (1 - eps / 8) ** steps
    assert means["nearest"] == 1
    assert abs(means["master"] - expected) <= eps / 2
    assert abs(means["random"] - expected) <= 6 * eps * math.sqrt(steps / n)


@over_dtypes
def test_stochastic_rounding_is_right_on_average(dtype):
    """Values of all sizes, subnormal ones too: a neighbour each, and the mean of many within six standard errors."""
    info, n = torch.finfo(dtype), 20_001
    values = [1.0, 1 + info.eps / 3, -3.3e-5, 0.7 * info.tiny, -0.3 * info.smallest_normal, 0.99 * info.max, 0.0]
    for i, value in enumerate(values):
        x = torch.full((n,), value, dtype=torch.float32)
        exact = x[0].double()
        unit = max(2.0 ** (math.frexp(exact)[1] - 1) * info.eps, info.smallest_normal * info.eps, 2.0**-126)
        below = math.floor(exact / unit) * unit
        round_stochastically_(x, dtype, torch.Generator().manual_seed(i))
        rounded = x.double()
        assert_bitwise(rounded, x.to(dtype).double())
        assert set(rounded.tolist()) <= {below, below + unit}
        assert (rounded == exact).all() or len(rounded.unique()) == 2 or exact == below
        assert abs(rounded.mean() - exact) <= 6 * unit / 2 / math.sqrt(n)


@over_dtypes
def test_stochastic_rounding_draws_anew_for_every_number(dtype):
    """Neighbours, and numbers 2 to 8 apart, go up independently: products of signs average to zero."""
    n = 40_000
    x = torch.full((n,), 1 + torch.finfo(dtype).eps / 2)
    round_stochastically_(x, dtype, torch.Generator().manual_seed(0))
    up = torch.where(x > 1, 1.0, -1.0).double()
    for apart in range(1, 9):
        assert abs((up[apart:] * up[:-apart]).mean()) <= 6 / math.sqrt(n - apart)


@over_dtypes
def test_stochastic_rounding_at_the_end_of_the_range(dtype):
    """The largest number is not passed from below; what is beyond, infinite or no number stays so."""
    info, n = torch.finfo(dtype), 1000
    unit = info.max * info.eps / (2 - info.eps)
    for value, expected in (
        (info.max - unit / 4, info.max), (info.max, info.max), (info.max + unit / 4, info.max),
        (math.inf, math.inf), (3.4e38 if dtype == torch.float16 else math.inf, math.inf),
    ):  # fmt: skip
        for sign in (1, -1):
            x = torch.full((n,), sign * value)
            round_stochastically_(x, dtype, torch.Generator().manual_seed(0))
            found = x.to(dtype).double().abs()
            assert found.max() == expected and found.min() >= min(expected, info.max - unit)
            assert (x.sign() == sign).all()
    for bits in (0x7FFFFFFF, 0x7FC00000, -0x400000):  # of a GPU, of a CPU, negative
        x = torch.full((n,), bits, dtype=torch.int32).view(torch.float32)
        round_stochastically_(x, dtype, torch.Generator().manual_seed(0))
        assert x.to(dtype).isnan().all()


def test_stochastic_rounding_where_subnormal_numbers_are_zero():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    try:
        for value in (0.0, 1e-37, 3e-39, 1.0):
            x = torch.full((1000,), value)
            round_stochastically_(x, torch.bfloat16, torch.Generator().manual_seed(0))
            assert x.isfinite().all() and abs(x.double().mean() - value) <= max(1e-38, 1e-3 * value)
    finally:
        torch.set_flush_denormal(False)


def test_float16_gradients_are_unscaled_in_float32():
    """By GradScaler's protocol: 1e-6 scaled by 1024 has all its digits in float16, 1e-6 itself but four bits."""
    w, v = (nn.Parameter(torch.ones(3, 3, dtype=dtype)) for dtype in (torch.float16, torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    ours, theirs = MBF([w], master_weights=True, eps=1e-7), MBF([v], eps=1e-7)
    gradient = (1e-6 * 1024 * randn(3, 3, dtype=torch.float32)).half()
    w.grad, v.grad = gradient.clone(), gradient.float() / 1024
    scaler.step(ours)
    theirs.step()
    assert_bitwise(ours.state[w]["master"], v)
    before = copy.deepcopy(ours.state_dict()["state"])
    w.grad = torch.full_like(w, math.inf)
    scaler.update()
    scaler.step(ours)
    after = ours.state_dict()["state"]
    for name, value in before[0].items():
        assert_bitwise(after[0][name], value)


@pytest.mark.parametrize(
    "options", [dict(master_weights=True, stochastic_rounding=True), dict(capturable=True, stochastic_rounding=True)]
)
def test_rounding_at_random_is_refused_where_it_makes_no_sense(options):
    with pytest.raises(ValueError, match="stochastic_rounding"):
        MBF([nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))], **options)
