"""Calls of MBF, one after the other, beside the brute-force optimizer."""

import io

import torch
from brute_force import GRAFTED, PAPER, BruteForce, Layer
from mbf_optim import MBF

from mbf_kernels.testing import assert_relative

from . import bad
from .arguments import Call, Choices, tensor
from .ops import plain

SHAPES = [  # of a layer's tensors
    [(3, 4), (3,)], [(2, 3, 3, 3), (2,)], [(4,)], [(4, 6)], [(3, 2, 1, 1)], [(2, 2, 3)], [(2, 3, 1, 2, 2)], [(1, 1)],
    [()], [(2, 7), (2,)],
]  # fmt: skip
PARTITIONS = [
    {}, {"blocks": "segment", "segment": 4}, {"blocks": "segment", "segment": 3, "average": False}, {"blocks": "row"},
    {"blocks": "row", "average": False}, {"blocks": "column"}, {"blocks": "column", "average": False},
    {"blocks": "grid", "grid": (1, 1)}, {"blocks": "filter"}, {"blocks": "diagonal"},
]  # fmt: skip
CHOICES = {
    "lr": (1e-2, 0.1, 1, 0.0), "momentum": (0.9, 0.0, 0.5), "decay": (0.9, 0.98, 0.5), "damping": (0.3, 1, 0.01),
    "weight_decay": (0.0, 0.1), "diagonal_decay": (0.999, 0.9), "eps": (1e-8, 1e-3), "maximize": (False, True),
    "nesterov": (True, False), "relative_damping": (True, False), "update_interval": (None, 1, 2),
    "factor_interval": (None, 1, 3),
}  # fmt: skip
BAD = {
    "lr": bad.constants([None, "much", -1.0, bad.NAN, bad.INF, 1j, torch.ones(2)]),
    "damping": bad.constants([None, "much", -1.0, bad.NAN, bad.INF, [0.1]]),
    "momentum": bad.constants([None, 1.0, -0.1, bad.NAN, "much"]),
    "decay": bad.constants([None, 1.1, -0.1, bad.NAN]),
    "weight_decay": bad.constants([None, -0.1, bad.INF]),
    "diagonal_decay": bad.constants([None, 1.0, -0.1]),
    "eps": bad.constants([None, -1.0, bad.NAN]),
    "graft": bad.constants(["sgd", True, 0]),
    "blocks": bad.constants([None, "rows", 3]),
    "segment": bad.constants([None, 0, -1, 2.0, True, "4"]),
    "update_interval": bad.constants([0, -1, 1.5, True, "2"]),
    "factor_interval": bad.constants([0, -1, 1.5, True, "2"]),
    "grid": bad.constants([3, (1,), (0, 1), (1, 2, 3), (1.0, 1), "11"]),
}
# After a dozen steps at damping 1e-2, each of which adds its rounding times the condition, at most 40 / damping.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 12 * 4000 * torch.finfo(torch.float32).eps}


class Training:
    """An optimizer, the brute-force one, and the layers of both."""

    def __init__(self, choices: Choices):
        self.choices, self.optimizer, self.brute, self.starts = choices, None, None, []
        self.dtype = choices.of([torch.float64, torch.float64, torch.float32])
        self.layers = [self.layer() for _ in range(choices.of([1, 2, 3]))]
        form = choices.of([GRAFTED, PAPER])
        self.options = form | {name: choices.of(values) for name, values in CHOICES.items()} | choices.of(PARTITIONS)
        self.named = choices.of([True, False])
        self.observed = self.stepped = False

    def layer(self) -> list[torch.nn.Parameter]:
        shapes = self.choices.of(SHAPES)
        values = [self.choices.randn(*shape, dtype=self.dtype) for shape in shapes]
        return [torch.nn.Parameter(plain(tensor(self.choices, value))) for value in values]

    def given(self, layers, first=0):
        named = [
            (f"layer{i}.{('weight', 'bias')[j]}", p)
            for i, layer in enumerate(layers, first)
            for j, p in enumerate(layer)
        ]
        return named if self.named else [p for _, p in named]

    def truth(self, layers) -> list[Layer]:
        """A bias joins its matrix where names tell that it may."""
        groups = []
        for layer in layers:
            joins = self.named and len(layer) == 2 and self._joins(layer[0].shape)
            groups += [layer] if joins else [[param] for param in layer]
        return groups

    def _joins(self, shape):
        o = self.options
        in_segments = o["blocks"] == "segment" or (o["blocks"] == "auto" and o["graft"] is not None)
        if len(shape) != 2 or o["blocks"] in ("filter", "diagonal"):
            return False
        return not in_segments or shape[1] % o["segment"] > 0

    def tensors(self) -> list:
        """All that the optimizer may change."""
        params = [param for layer in self.layers for param in layer]
        return [params, [list(state.values()) for state in self.optimizer.state.values()]]

    def make(self):
        call = Call("MBF", self._make, {"params": self.given(self.layers)} | self.options, bad=BAD)
        call.bad = BAD | {"params": bad.constants([None, 3, [], [None], [1.0], "text", torch.ones(2)])}
        call.optional = True
        call.names = ("optimizer", "parameters", "iterable")  # torch's own words
        yield call

    def _make(self, **arguments):
        self.optimizer = MBF(**arguments)
        self.groups = self.truth(self.layers)
        self.brute = BruteForce([[p.detach().double() for p in group] for group in self.groups], self.options)
        self.starts = [layer.w.copy() for layer in self.brute.layers]

    def set_gradients(self, may_miss: bool) -> list:
        """New ones, without those of a layer now and then; and as arrays for the truth."""
        arrays = []
        for group in self.groups:
            missing = may_miss and self.choices.one_in(4)
            grads = [self._gradient(p) for p in group]
            for p, grad in zip(group, grads, strict=True):
                p.grad = None if missing else grad
            arrays.append([None if missing else plain(g).double().numpy() for g in grads])
        return arrays

    def _gradient(self, p):
        return tensor(self.choices, self.choices.randn(*p.shape, dtype=self.dtype), read_only=True)

    def step(self):
        arrays = self.set_gradients(may_miss=True)
        call = Call("MBF.step", self.optimizer.step, {}, written=self.tensors(), optional=True)
        if self.choices.one_in(3):
            call.arguments["closure"] = lambda: 1.5

        def check(loss):
            assert loss == (1.5 if "closure" in call.arguments else None)
            self.brute.step(arrays)
            self.stepped = True
            self.compare()

        call.check = check
        yield call

    def observe(self):
        if self.stepped:
            call = Call("MBF.observe", self.optimizer.observe, {}, names=("MBF.observe",), touched=self.tensors())
            pairs = zip(self.brute.layers, self.groups, strict=True)
            call.refused = any(truth.blocks and truth.t and group[0].grad is not None for truth, group in pairs)
            if not call.refused:
                return
        else:
            arrays = self.set_gradients(may_miss=False)
            call = Call("MBF.observe", self.optimizer.observe, {}, written=self.tensors())
            call.check = lambda result: self.brute.observe(arrays)
        yield call

    def report(self):
        def check(report):
            params = sum(p.numel() for layer in self.layers for p in layer)
            assert sum(torch.Size(row.shape).numel() for row in report) <= params
            assert len(report) == len(self.groups) and not any(row.skipped for row in report) and str(report)

        yield Call("MBF.report", self.optimizer.report, {}, check=check, touched=self.tensors())

    def resume(self):
        """Saves, and goes on with what another optimizer loads."""
        saved = []
        call = Call("MBF.state_dict", self.optimizer.state_dict, {}, check=saved.append, touched=self.tensors())
        yield call
        if not saved:
            return
        file = io.BytesIO()
        torch.save(saved[0], file)
        file.seek(0)
        state_dict = torch.load(file, weights_only=True)
        self.optimizer = MBF(self.given(self.layers), **(self.options | {"lr": 123.0}))
        call = Call("MBF.load_state_dict", self.optimizer.load_state_dict, {"state_dict": state_dict})
        call.written = [[p for layer in self.layers for p in layer]]
        yield call
        if call.refused:
            self.optimizer.load_state_dict(state_dict)

    def change(self):
        """Options that may change from step to step."""
        group = self.optimizer.param_groups[0]
        changes = {name: self.choices.of(CHOICES[name]) for name in ("lr", "damping", "weight_decay", "momentum")}
        group.update(changes)
        for layer in self.brute.layers:
            layer.o.update(changes)
        yield from self.step()

    def compare(self):
        for group, truth, start in zip(self.groups, self.brute.layers, self.starts, strict=True):
            w = Layer.join([p.detach().double() for p in group]).ravel()
            moved, expected = (torch.from_numpy(x - start) for x in (w, truth.w))
            assert_relative(moved, expected, TOLERANCE[self.dtype], f"{[tuple(p.shape) for p in group]}")


def train(choices: Choices):
    training = Training(choices)
    yield from training.make()
    if training.optimizer is None:
        return
    for _ in range(choices.of([4, 1, 2, 8])):
        yield from choices.of([training.step, training.step, training.observe, training.report, training.resume,
                               training.change])()  # fmt: skip


FUNCTIONS = (train,)
