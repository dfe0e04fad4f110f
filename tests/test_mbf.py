"""MBF against the brute-force optimizer, and as a torch.optim.Optimizer."""

import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from brute_force import GRAFTED, PAPER, BruteForce, Layer
from mbf_optim import MBF
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from mbf_kernels.testing import assert_bitwise, assert_relative, randn

# After 20 steps at damping 1e-2: every step adds its rounding, multiplied by the condition number 1 / damping + 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 20 * 101 * torch.finfo(torch.float32).eps}
FORMS = {"grafted": GRAFTED, "paper": PAPER}
over_forms = pytest.mark.parametrize("form", FORMS)

NETWORKS = {
    "conv1d": lambda: [
        nn.Conv1d(2, 4, 5), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 6, 1), nn.Flatten(), nn.Linear(36, 4),
    ],
    "conv2d": lambda: [
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 6, 1, bias=False), nn.Tanh(),
        nn.Conv2d(6, 2, (2, 3)), nn.Flatten(), nn.Linear(12, 4, bias=False),
    ],
    "conv3d": lambda: [
        nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 2, (1, 2, 3)), nn.Flatten(), nn.Linear(12, 4),
    ],
    "mlp": lambda: [
        nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4),
    ],
}  # fmt: skip
INPUTS = {"conv1d": (2, 10), "conv2d": (2, 6, 6), "conv3d": (1, 4, 4, 4), "mlp": (11,)}
PARTITIONS = {
    "auto": dict(),
    "filter": dict(blocks="filter"),
    "segment": dict(blocks="segment", segment=5),
    "segment, own": dict(blocks="segment", segment=5, average=False),
    "row": dict(blocks="row"),
    "row, own": dict(blocks="row", average=False),
    "column": dict(blocks="column"),
    "column, own": dict(blocks="column", average=False),
    "grid": dict(blocks="grid", grid=(1, 2)),
    "grid, own": dict(blocks="grid", grid=(1, 2), average=False),
    "diagonal": dict(blocks="diagonal"),
}


class Run:
    """A network with random data, its optimizer, and how its parameters form layers."""

    def __init__(self, network, dtype, options, named=True, optimizer=None):
        torch.manual_seed(7)
        self.network, self.dtype, self.options = network, dtype, options
        self.model = nn.Sequential(*NETWORKS[network]()).to(dtype)
        for p in self.model.parameters():  # every tensor, norms and biases too, starts away from zero
            p.data += 0.1 * torch.randn_like(p)
        self.named = dict(self.model.named_parameters())
        self.layers = []
        for name, p in self.named.items():
            bias = self.named.get(name.removesuffix("weight") + "bias")
            if named and p.dim() == 2 and bias is not None:
                self.layers.append([p, bias])
            elif not (named and name.endswith("bias") and self.named[name.removesuffix("bias") + "weight"].dim() == 2):
                self.layers.append([p])
        parameters = self.model.named_parameters() if named else self.model.parameters()
        self.optimizer = (optimizer or MBF)(parameters, **options)
        self.steps = 0

    def backward(self, seed=None):
        """Gradients of a random regression batch, a different one each step."""
        seed = self.steps if seed is None else seed
        self.optimizer.zero_grad()
        x = randn(8, *INPUTS[self.network], dtype=self.dtype, seed=1000 + seed)
        target = randn(8, 4, dtype=self.dtype, seed=2000 + seed)
        loss = (self.model(x) - target).square().mean()
        loss.backward()
        return loss

    def step(self):
        loss = self.backward()
        self.optimizer.step()
        self.steps += 1
        return loss

    def gradients(self):
        return [[None if p.grad is None else p.grad.double().cpu().numpy() for p in layer] for layer in self.layers]

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


class Pair:
    """A Run and the brute-force optimizer fed with its gradients."""

    def __init__(self, network, dtype, options, named=True):
        self.run = Run(network, dtype, options, named)
        self.brute = BruteForce([[p.detach().double().cpu() for p in layer] for layer in self.run.layers], options)
        self.start = [layer.w.copy() for layer in self.brute.layers]

    def observe(self, seed):
        self.run.backward(seed)
        self.brute.observe(self.run.gradients())
        self.run.optimizer.observe()

    def step(self, drop=None):
        self.run.backward()
        if drop is not None:
            for p in self.run.layers[drop]:
                p.grad = None
        self.brute.step(self.run.gradients())
        self.run.optimizer.step()
        self.run.steps += 1

    def check(self, tolerance):
        """The way that every tensor went, relative to its length."""
        for layer, truth, start in zip(self.run.layers, self.brute.layers, self.start, strict=True):
            w = Layer.join([p.detach().double().cpu() for p in layer]).ravel()
            moved, expected = (torch.from_numpy(x - start) for x in (w, truth.w))
            assert_relative(moved, expected, tolerance, f"{[tuple(p.shape) for p in layer]}")


def drawn(form, partition, seed):
    """Options: the form, the partition, and everything else at random."""
    draw = random.Random(seed)
    t1, t2 = draw.choice([(None, None), (1, 1), (2, 3), (1, 4), (3, 7), (2, 25)])
    return FORMS[form] | PARTITIONS[partition] | dict(
        lr=1e-2 if form == "grafted" else 1e-3,
        damping=1e-2,
        momentum=draw.choice([0.0, 0.9]),
        decay=draw.choice([0.9, 0.95]),
        weight_decay=draw.choice([0.0, 0.5]),
        maximize=draw.random() < 0.3,
        nesterov=draw.random() < 0.5,
        relative_damping=draw.random() < 0.7 if form == "grafted" else draw.random() < 0.3,
        update_interval=t1,
        factor_interval=t2,
    )  # fmt: skip


CASES = [(f, p, n) for f in FORMS for p in PARTITIONS for n in NETWORKS]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_brute_force(dtype, number):
    """20 steps on a random network: every partition, schedule and option against dense blocks."""
    form, partition, network = CASES[number]
    pair = Pair(network, dtype, drawn(form, partition, number), named=number % 3 != 0)
    for _ in range(20):
        pair.step()
    pair.check(TOLERANCE[dtype])


@over_forms
@pytest.mark.parametrize("partition", PARTITIONS)
def test_brute_force_on_every_backend(backend, form, partition):
    """Defaults, with the bias column, observed first, and without a gradient of one layer now and then."""
    for network in ("conv2d", "mlp"):
        options = FORMS[form] | PARTITIONS[partition] | dict(lr=1e-3, damping=1e-2)
        pair = Pair(network, torch.float64, options)
        for seed in (77, 78, 79):
            pair.observe(seed)
        for step in range(6):
            pair.step(drop=1 if step in (0, 3) else None)
        pair.check(1e-9)


@pytest.mark.parametrize("t1, t2", [(2, 5), (3, 4), (2, 25), (10, 100)])
def test_schedule_of_the_paper(t1, t2):
    """Statistics when T1 divides t; inverses when (t <= T2 and T1 divides t) or T2 divides t.

    A constant gradient and no momentum make P change exactly when the inverse does.
    """
    w = nn.Parameter(torch.zeros(1, 1, 3, dtype=torch.float64))
    optimizer = MBF.paper([w], lr=1.0, damping=0.5, momentum=0.0, update_interval=t1, factor_interval=t2)
    changed, previous = [], None
    for t in range(2 * t2 + t1 + 1):
        before = w.detach().clone()
        w.grad = torch.ones_like(w)
        optimizer.step()
        p = before - w.detach()
        if previous is None or (p - previous).abs().max() > 1e-9 * p.abs().max():
            changed.append(t)
        previous = p
    due = [t for t in range(2 * t2 + t1 + 1) if (t <= t2 and t % t1 == 0) or t % t2 == 0]
    news, fresh = [], 0  # an inverse that is due without new statistics is the old one
    for t in due:
        if t // t1 + 1 > fresh:
            news.append(t)
            fresh = t // t1 + 1
    assert changed == news


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_grafted_diagonal_is_adamw(weight_decay, maximize):
    """To 1e-12, over 20 steps."""
    common = dict(lr=1e-2, weight_decay=weight_decay, maximize=maximize)
    ours = Run("mlp", torch.float64, dict(blocks="diagonal", momentum=0.8, diagonal_decay=0.99, eps=1e-6, **common))
    theirs = Run("mlp", torch.float64, dict(betas=(0.8, 0.99), eps=1e-6, **common), optimizer=torch.optim.AdamW)
    for _ in range(20):
        ours.step()
        theirs.step()
    for a, b in zip(ours.weights(), theirs.weights(), strict=True):
        assert_relative(a, b, 1e-12)


def test_the_diagonal_of_the_paper():
    """Constant g: |P| = 1.0000, 1.2513, 1.3572 in the first three steps, whatever g (printed to 5e-5)."""
    for scale in (1e-3, 1.0, 30.0):
        w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = MBF.paper([w], lr=1.0, damping=0.1)
        lengths = []
        for _ in range(3):
            before = w.detach().clone()
            w.grad = torch.full_like(w, scale)
            optimizer.step()
            lengths.append((before - w.detach())[0].item())
        # eps = 1e-8 stands beside sqrt(v) = (1 - mu) |g|
        assert all(
            abs(a - b) <= 5e-5 + 2 * 1e-8 / (0.1 * scale) for a, b in zip(lengths, (1.0, 1.2513, 1.3572), strict=True)
        )


@over_forms
def test_shared_matrices_beyond_128(form):
    """Through torch.linalg, with 10 and 100 for the intervals left at None."""
    torch.manual_seed(0)
    w = nn.Parameter(randn(5, 140))
    options = FORMS[form] | dict(blocks="row", lr=1e-2, damping=1e-2)
    optimizer, brute = MBF([w], **options), BruteForce([[w.detach()]], options)
    start = brute.layers[0].w.copy()
    for step in range(13):
        w.grad = randn(5, 140, seed=step + 1)
        optimizer.step()
        brute.step([[w.grad]])
    assert_relative(w.detach().flatten() - torch.from_numpy(start), torch.from_numpy(brute.layers[0].w - start), 1e-9)
    (row,) = optimizer.report()
    assert (row.count, row.size) == (1, 140)


@over_forms
def test_own_matrices_beyond_128(form):
    w = nn.Parameter(randn(3, 130))
    options = FORMS[form] | dict(
        blocks="row", average=False, lr=1e-2, damping=1e-2, update_interval=1, factor_interval=2
    )
    optimizer, brute = MBF([w], **options), BruteForce([[w.detach()]], options)
    for step in range(4):
        w.grad = randn(3, 130, seed=step + 1)
        optimizer.step()
        brute.step([[w.grad]])
    assert_relative(w.detach().flatten(), torch.from_numpy(brute.layers[0].w), 1e-9)


@over_forms
def test_channels_last_weights(form):
    """The same figures as contiguous weights, without a change of format."""
    runs = [Run("conv2d", torch.float64, FORMS[form] | dict(lr=1e-2, damping=1e-2)) for _ in range(2)]
    runs[1].model.to(memory_format=torch.channels_last)
    strides = [p.stride() for p in runs[1].model.parameters()]
    for _ in range(5):
        for run in runs:
            run.step()
    for a, b in zip(runs[0].weights(), runs[1].weights(), strict=True):
        assert_relative(a, b, 1e-9)
    assert strides == [p.stride() for p in runs[1].model.parameters()]
    assert strides != [p.stride() for p in runs[0].model.parameters()]


# ---- guards


@over_forms
@pytest.mark.parametrize("partition", PARTITIONS)
def test_zero_gradients_only_decay_the_weights(form, partition):
    run = Run("conv2d", torch.float64, FORMS[form] | PARTITIONS[partition] | dict(lr=0.1, weight_decay=0.2))
    expected = [p * (1 - 0.1 * 0.2) ** 3 for p in run.weights()]
    for _ in range(3):
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
        run.optimizer.step()
    for p, e in zip(run.weights(), expected, strict=True):
        assert_relative(p, e, 1e-14)


@over_forms
@pytest.mark.parametrize("partition", PARTITIONS)
def test_dead_units_stay_and_the_others_move(form, partition):
    """An output whose gradient is always zero: all stays finite, and it does not move in its own blocks."""
    run = Run("conv2d", torch.float64, FORMS[form] | PARTITIONS[partition] | dict(lr=1e-2))
    before = run.weights()
    for _ in range(5):
        run.backward()
        for p in run.model.parameters():
            p.grad[0] = 0
        run.optimizer.step()
    for p, b in zip(run.weights(), before, strict=True):
        assert p.isfinite().all() and (p[1:] != b[1:]).any()
        if p.dim() == 1 or partition in (
            "auto",
            "filter",
            "segment",
            "row",
            "segment, own",
            "row, own",
            "diagonal",
        ):
            assert_bitwise(p[0], b[0])


@over_forms
@pytest.mark.parametrize("partition", [p for p in PARTITIONS if p != "diagonal"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_a_bad_gradient_is_skipped_and_counted(form, partition, poison):
    """It reaches no other tensor, does not stay, and shows in report()."""
    runs = [Run("mlp", torch.float64, FORMS[form] | PARTITIONS[partition] | dict(lr=1e-2)) for _ in range(2)]
    if partition == "filter":
        runs = [Run("conv2d", torch.float64, FORMS[form] | PARTITIONS[partition] | dict(lr=1e-2)) for _ in range(2)]
    bad, good = runs
    victim = next(i for i, p in enumerate(bad.model.parameters()) if p.dim() >= 2)
    for step in range(4):
        for run in runs:
            run.backward(seed=step)
        if step == 1:
            list(bad.model.parameters())[victim].grad.view(-1)[3] = poison
        for mine, other in zip(bad.model.parameters(), good.model.parameters(), strict=True):
            mine.grad = other.grad.clone() if step != 1 or mine.grad.isfinite().all() else mine.grad
        for run in runs:
            run.optimizer.step()
    for row, clean in zip(bad.optimizer.report(), good.optimizer.report(), strict=True):
        hit = row.name == bad.optimizer.report()[0].name
        assert clean.skipped == 0 and (row.skipped > 0) == hit, row
    joined = bad.named[list(bad.named)[victim].removesuffix("weight") + "bias"]
    for i, (a, b) in enumerate(zip(bad.model.parameters(), good.model.parameters(), strict=True)):
        assert a.isfinite().all()
        if i != victim and a is not joined:
            assert_bitwise(a, b)
    moved = list(bad.model.parameters())[victim]
    before = moved.detach().clone()
    bad.step()
    assert (moved != before).all()


# ---- observe()


def test_observe_moves_no_weight_and_only_before_the_first_step():
    run = Run("conv2d", torch.float64, {})
    before = run.weights()
    for seed in range(3):
        run.backward(seed)
        run.optimizer.observe()
    for a, b in zip(run.weights(), before, strict=True):
        assert_bitwise(a, b)
    run.step()
    with pytest.raises(RuntimeError, match="observe"):
        run.optimizer.observe()


@over_forms
@pytest.mark.parametrize("partition", PARTITIONS)
def test_observe_averages(form, partition):
    """j-th call: F <- (j-1)/j F + 1/j statistic; then the steps of the brute-force optimizer."""
    pair = Pair(
        "mlp",
        torch.float64,
        FORMS[form] | PARTITIONS[partition] | dict(lr=1e-2, damping=1e-2, update_interval=2),
    )
    for seed in range(5):
        pair.observe(100 + seed)
    for _ in range(5):
        pair.step()
    pair.check(1e-9)


# ---- torch.optim


@over_forms
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("intervals", [(None, None), (2, 3)])
def test_resume_is_bitwise(form, partition, intervals):
    """state_dict through torch.save and torch.load(weights_only=True), in the middle of cached factors."""
    options = FORMS[form] | PARTITIONS[partition] | dict(update_interval=intervals[0], factor_interval=intervals[1])
    straight, resumed = (Run("conv2d", torch.float32, options) for _ in range(2))
    for _ in range(8):
        straight.step()
    for _ in range(4):
        resumed.step()
    file = io.BytesIO()
    torch.save({"model": resumed.model.state_dict(), "optimizer": resumed.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Run("conv2d", torch.float32, options | dict(lr=123.0))
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert resumed.optimizer.param_groups[0]["lr"] == options["lr"]
    for resumed.steps in range(4, 8):
        resumed.backward()
        resumed.optimizer.step()
    for a, b in zip(straight.weights(), resumed.weights(), strict=True):
        assert_bitwise(a, b)
    rows = zip(straight.optimizer.report(), resumed.optimizer.report(), strict=True)
    assert all(str(a) == str(b) for a, b in rows)


def test_state_dict_holds_canonical_matrices():
    """F as packed triangles [O, I, T], whatever the storage; tensors only."""
    w = nn.Parameter(randn(5, 7, 3, 3))
    optimizer = MBF([w], decay=0.9)
    w.grad = randn(5, 7, 3, 3, seed=1)
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    leaves = torch.utils._pytree.tree_leaves(state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    (packed,) = (leaf for leaf in leaves if leaf.shape == (5, 7, 45))
    g = w.grad.view(5, 7, 9)
    row, column = torch.tril_indices(9, 9)
    assert_relative(packed, (1 - 0.9) * g[..., row] * g[..., column], 1e-14)


@over_forms
def test_state_dict_before_the_first_step_and_after_observe(form):
    for observed in (0, 2):
        runs = [Run("mlp", torch.float64, FORMS[form]) for _ in range(2)]
        for seed in range(observed):
            runs[0].backward(seed)
            runs[0].optimizer.observe()
        runs[1].optimizer.load_state_dict(copy.deepcopy(runs[0].optimizer.state_dict()))
        for _ in range(3):
            for run in runs:
                run.step()
        for a, b in zip(*(run.weights() for run in runs), strict=True):
            assert_bitwise(a, b)


def test_changing_a_group_changes_the_next_step():
    """lr, damping, momentum and weight_decay may be scheduled, as in torch."""
    options = GRAFTED | dict(lr=1e-2, damping=1e-2)
    pair = Pair("mlp", torch.float64, options)
    for step in range(6):
        changes = dict(lr=1e-2 / (step + 1), damping=1e-2 * (step + 1), weight_decay=0.1 * step)
        pair.run.optimizer.param_groups[0].update(changes)
        for layer in pair.brute.layers:
            layer.o.update(changes)
        pair.step()
    pair.check(1e-9)


def test_a_factor_of_before_is_not_taken_up_again():
    """Kept, then made anew at every step, then kept again: from the matrix that there is. To the rounding of 6 steps
    with condition numbers of at most 9 / 0.3."""
    runs = [(nn.Parameter(randn(5, 3, 3, 3)), kept_at_first) for kept_at_first in (True, False)]
    for w, kept_at_first in runs:
        optimizer = MBF([w], lr=1e-2)
        for step in range(6):
            optimizer.param_groups[0]["factor_interval"] = 2 if step == 5 or (kept_at_first and not step) else 1
            w.grad = (1 + step) * randn(*w.shape, seed=step)
            optimizer.step()
    assert_relative(runs[0][0].detach(), runs[1][0].detach(), 6 * 30 * torch.finfo(torch.float64).eps)


def test_closure():
    """Called once, with gradients enabled; its loss is returned."""
    run, plain = (Run("mlp", torch.float64, {}) for _ in range(2))
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(run.backward(seed=0))
        return calls[-1]

    loss = run.optimizer.step(closure)
    plain.step()
    assert len(calls) == 1 and loss is calls[0]
    for a, b in zip(run.weights(), plain.weights(), strict=True):
        assert_bitwise(a, b)
    with torch.no_grad():
        assert run.optimizer.step() is None


@pytest.mark.parametrize("named", [True, False])
def test_tensors_without_a_gradient_keep_still_and_their_time(named):
    """t counts the steps of each tensor: a late one starts at its own t = 0."""
    options = GRAFTED | dict(lr=1e-2, damping=1e-2, update_interval=2, factor_interval=3)
    pair = Pair("mlp", torch.float64, options, named)
    for step in range(9):
        pair.step(drop=step % 4 if step % 4 < len(pair.run.layers) else None)
    pair.check(1e-9)
    before = pair.run.weights()
    pair.run.optimizer.zero_grad()
    pair.run.optimizer.step()
    for a, b in zip(pair.run.weights(), before, strict=True):
        assert_bitwise(a, b)


@over_forms
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_frozen_half_of_a_layer_does_not_stop_the_other(form, frozen, partition):
    """Every tensor with a gradient is stepped, also when its partner in W|b has none."""
    layer = nn.Linear(6, 4)
    getattr(layer, frozen).requires_grad_(False)
    optimizer = MBF(layer.named_parameters("x"), **(FORMS[form] | PARTITIONS[partition]))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for seed in range(3):
        optimizer.zero_grad()
        layer(randn(8, 6, dtype=torch.float32, seed=seed)).square().sum().backward()
        optimizer.step()
    for name, p in layer.named_parameters():
        assert ((p != before[name]).all() if name != frozen else (p == before[name]).all()) and p.isfinite().all()


@over_forms
def test_a_half_without_gradient_in_some_steps(form):
    """The bias of a layer gets no gradient now and then: what has one moves, what has none stays."""
    layer = nn.Linear(6, 4)
    optimizer = MBF(layer.named_parameters("x"), **FORMS[form])
    for step in range(6):
        optimizer.zero_grad()
        layer(randn(8, 6, dtype=torch.float32, seed=step)).square().sum().backward()
        missing = [None, "bias", "weight"][step % 3]
        if missing:
            getattr(layer, missing).grad = None
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        optimizer.step()
        for name, p in layer.named_parameters():
            assert (p == before[name]).all() if name == missing else (p != before[name]).all()


def test_float32_and_float64_together():
    tensors = [nn.Parameter(randn(4, 3, 3, dtype=dtype)) for dtype in TOLERANCE]
    optimizer = MBF(tensors, lr=0.1)
    for p in tensors:
        p.grad = randn(4, 3, 3, dtype=p.dtype, seed=1)
    optimizer.step()
    assert_relative(tensors[1], tensors[0], 1e-4)


def test_report_lists_everything():
    for named in (True, False):
        run = Run("conv2d", torch.float32, {}, named)
        for _ in range(2):
            run.step()
        report = run.optimizer.report()
        assert sum(math.prod(row.shape) for row in report) == sum(p.numel() for p in run.model.parameters())
        assert len({row.name for row in report}) == len(report)
        table = str(report)
        for row in report:
            assert row.name in table and row.bytes > 0 and row.skipped == 0 and row.structure
        if named:
            names = " ".join(row.name for row in report)
            assert all(name in names for name, p in run.named.items() if p.dim() > 1)
        filters = [row for row in report if "filter" in row.structure]
        assert [(row.count, row.size) for row in filters] == [(8, 9), (12, 6)]
        assert all(row.bytes >= row.count * 4 * (row.size * (row.size + 1) // 2 + row.size) for row in filters)


def test_the_same_bits_run_to_run():
    runs = [Run("conv2d", torch.float32, {}) for _ in range(2)]
    for run in runs:
        for _ in range(5):
            run.step()
    for a, b in zip(*(run.weights() for run in runs), strict=True):
        assert_bitwise(a, b)


BAD_VALUES = {
    "lr": [-1.0, math.nan, "0.5", 10**400],
    "momentum": [1.0, -0.1, None],
    "decay": [1.5, -0.1],
    "damping": [-1.0, math.inf],
    "weight_decay": [-0.1],
    "diagonal_decay": [1.0, -0.1],
    "eps": [-1.0],
    "graft": ["sgd", np.array(["adam"])],
    "blocks": ["rows", None, np.array(["row"] * 2)],
    "average": ["much", None],
    "capturable": [torch.ones(2)],
    "segment": [0, -3],
    "update_interval": [0, -1],
    "factor_interval": [0],
}
BAD_OPTIONS = [{name: value} for name, values in BAD_VALUES.items() for value in values]
BAD_OPTIONS += [dict(blocks="grid", grid=grid) for grid in (None, (2,), (0, 1))]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(options):
    """Refused in the constructor, in a group, and in a group added later; the message names the option."""
    w, v = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    name = list(options)[-1]
    for build in (
        lambda: MBF([w], **options),
        lambda: MBF([dict(params=[w], **options)]),
        lambda: MBF([v]).add_param_group(dict(params=[w], **options)),
    ):
        with pytest.raises((ValueError, TypeError), match=f"(?i){name}"):
            build()


@pytest.mark.parametrize(
    "bad", [torch.ones(3, 3, dtype=torch.complex64), torch.ones(3, 3, dtype=torch.float8_e5m2)], ids=str
)
def test_bad_parameters(bad):
    w = nn.Parameter(bad)
    with pytest.raises((ValueError, TypeError)):
        optimizer = MBF([w])
        w.grad = torch.ones_like(w)
        optimizer.step()


def test_parameters_that_stand_for_others_are_refused():
    """They have no memory of their own; of those torch has, DTensors are known."""
    with pytest.raises(TypeError, match="^MBF: expected plain tensors or DTensors of them, got TwoTensor for param 0"):
        MBF([nn.Parameter(TwoTensor(torch.ones(3, 3), torch.ones(3, 3)))])


def test_no_parameters_and_repeated_parameters():
    w = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError):
        MBF([])
    with pytest.raises(ValueError):
        MBF([dict(params=[w]), dict(params=[w])])
    with pytest.raises(TypeError):
        MBF(w)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = MBF(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises((ValueError, TypeError, RuntimeError), match="(?i)sparse"):
        optimizer.step()
    assert_bitwise(embedding.weight, before)


def test_the_brute_force_solves_its_own_fixture():
    """The truth is tested too: R averaged of the method's fixture."""
    g, m = np.array([[1.0, 2, 3], [4, 5, 6]]), np.array([[1.0, 0, -1], [2, 1, 0]])
    brute = BruteForce([[np.zeros((2, 3))]], PAPER | dict(lr=1.0, damping=0.5, momentum=0.5, decay=0.0, blocks="row"))
    brute.step([[2 * (m - g)]])
    before = brute.layers[0].w.copy()
    brute.step([[g]])
    expected = [[1.397260, 0.191781, -1.013699], [1.753425, 0.260274, -1.232877]]
    assert np.abs((before - brute.layers[0].w).reshape(2, 3) - expected).max() <= 5e-7
