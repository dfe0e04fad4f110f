"""Calls of the step ops and of PreparedStep, and their truth: the loops of brute_force.py."""

import numpy as np
import torch
from test_diagonal_step import check as check_diagonal
from test_rank_one_step import check as check_rank_one
from test_shared_step import check as check_shared

import mbf_kernels
from mbf_kernels import PreparedStep
from mbf_kernels.testing import assert_bitwise, assert_factors, assert_padding_zero

from . import bad
from .arguments import DTYPES, Call, Choices, blocks, flag, matrices, number, tensor
from .ops import plain

SIZES = (2, 1, 3, 4, 9, 16, 20, 21, 33)
LRS, MOMENTA, DECAYS, WEIGHTS = (0.1, 1, 0.0, 3.0), (0.9, 0.0, 0.5), (0.9, 0.5, 0.0, 1.0), (1.0, 0.5, 0.1)
NUMBERS = {  # what an option may be, and what not
    "lr": (LRS, bad.DEVICE_NUMBERS), "damping": ((0.3, 1, 0.05, 10), bad.DEVICE_NUMBERS),
    "momentum": (MOMENTA, bad.UNIT_OPEN), "decay": (DECAYS, bad.UNIT), "diagonal_decay": (MOMENTA, bad.UNIT_OPEN),
    "weight_decay": ((0.0, 0.3, 1), bad.NUMBERS), "eps": ((1e-8, 1e-3), bad.NUMBERS),
    "momentum_weight": (WEIGHTS, bad.WEIGHTS), "fisher_weight": (WEIGHTS, bad.WEIGHTS),
    "square_weight": (WEIGHTS, bad.WEIGHTS),
}  # fmt: skip
ON_DEVICE = ("lr", "damping", "momentum_weight", "fisher_weight", "square_weight")
FLAGS = ("relative", "nesterov", "maximize", "update")
OPTIONS = {
    "mbf_step_": ("lr", "damping", "momentum", "decay", "weight_decay", "eps", "momentum_weight", "fisher_weight"),
    "mbf_shared_step_": (
        "lr", "damping", "momentum", "decay", "diagonal_decay", "weight_decay", "eps", "momentum_weight",
        "square_weight",
    ),
    "mbf_diagonal_step_": (
        "lr", "momentum", "diagonal_decay", "weight_decay", "eps", "momentum_weight", "square_weight",
    ),
}  # fmt: skip


def options_of(op, choices, tensors):
    """Options, with weights for each of so many tensors now and then."""
    options = {name: number(choices, NUMBERS[name][0], on_device=name in ON_DEVICE) for name in OPTIONS[op]}
    for name in options:
        if tensors and name in ("momentum_weight", "fisher_weight", "square_weight") and choices.one_in(3):
            options[name] = choices.of([list, tuple])(number(choices, WEIGHTS) for _ in range(tensors))
    options["graft"] = choices.of([None, "adam"])
    for name in FLAGS if op != "mbf_diagonal_step_" else ("maximize",):
        options[name] = flag(choices)
    return options


def as_floats(options, i):
    """Those of tensor ``i``, for the truth."""
    mine = {name: value[i] if isinstance(value, (list, tuple)) else value for name, value in options.items()}
    return {
        name: value if name == "graft" else bool(value) if name in (*FLAGS, "refactor") else float(value)
        for name, value in mine.items()
    }


class Problem:
    """One tensor of a step, in whatever form: W, g, M, v as [S, R, n] and F."""

    def __init__(self, op, choices, dtype, size, call):
        self.op, self.size, self.dtype = op, size, dtype
        self.samples = 1 if op == "mbf_step_" else choices.of([2, 1, 3, 5])
        self.count = choices.of([2, 1, 3]) if op != "mbf_diagonal_step_" else 1
        self.joined = op == "mbf_shared_step_" and size > 1 and choices.one_in(3)
        if self.joined:
            self.count = 1
        self.shape = self._shape(choices)
        self.param, self.momentum = (self.draw(choices, call) for _ in range(2))
        self.square = self.draw(choices, call, square=True)
        self.dense = matrices(choices, self.count, size, dtype, scales=(1.0, 1e-3))
        self.fisher = blocks(self.dense)
        self.skipped = torch.tensor(7)

    def _shape(self, choices):
        if self.op == "mbf_shared_step_":
            return (self.samples, self.count, self.size)
        if self.op == "mbf_diagonal_step_":
            return choices.of([(self.samples, self.size), (self.samples * self.size,), (self.size, 1, self.samples)])
        side = int(self.size**0.5)
        shapes = [(self.count, self.size), (self.count, 1, self.size), (1, self.count, self.size, 1)]
        return choices.of([*shapes, (self.count, side, side)] if side**2 == self.size else shapes)

    def draw(self, choices, call, square=False, read_only=False):
        values = choices.randn(self.samples * self.count * self.size, dtype=self.dtype)
        values = (values.square() if square else values).view(self.shape)
        if not self.joined:
            return tensor(choices, values, call, read_only)
        return tuple(tensor(choices, part.clone(), call, read_only) for part in (values[..., :-1], values[:, 0, -1]))

    def rows(self, entry):
        """A copy as [S, R, n]."""
        if isinstance(entry, tuple):
            main, last = (plain(part) for part in entry)
            return torch.cat([main.reshape(self.samples, 1, -1), last.reshape(-1, 1, 1)], 2)
        return plain(entry).clone(memory_format=torch.contiguous_format).view(self.samples, self.count, self.size)

    def before(self, grad):
        """Float64 arrays for the truth."""
        rows = [self.rows(entry).double().numpy() for entry in (self.param, grad, self.momentum, self.square)]
        return [*rows, plain(self.fisher.to_dense()).double().numpy()]

    def written(self):
        return [self.rows(entry) for entry in (self.param, self.momentum, self.square)] + [self.fisher.to_dense()]

    def poison(self, grad, value, choices):
        """A gradient with one element that is not finite, and its place."""
        at = (choices.byte() % self.samples, choices.byte() % self.count, choices.byte() % self.size)
        rows = self.rows(grad)
        rows[at] = value
        if self.joined:
            return (rows[..., :-1].clone(), rows[:, 0, -1].clone()), at
        return rows.view(self.shape), at

    def check(self, before, options, at=None, damped=None):
        """What is written against the truth; ``at``: a mini-block that must be as it was."""
        if self.op == "mbf_diagonal_step_":
            flat = [torch.from_numpy(array).flatten() for array in before[:4]]
            results = [rows.flatten() for rows in self.written()[:3]]
            keep = torch.stack(flat).isfinite().all(0)  # what is not finite stays with its own element
            return check_diagonal([r[keep] for r in results], [t[keep] for t in flat], self.dtype, **options)
        assert_padding_zero(self.fisher)
        known = before
        if self.op == "mbf_step_":
            known, options = self._as_shared(before, options)
        whole = options | ({} if damped is None else {"damped": damped})
        if at is None:
            return self._check_part(known, slice(None), slice(None), whole)
        s, r, _ = at
        after = self.written()
        for old, new in zip((before[0], before[2], before[3]), after[:3], strict=True):
            assert_bitwise(new[s, r], torch.from_numpy(old[s, r]).to(self.dtype))
        assert_bitwise(after[3][r], torch.from_numpy(before[4][r]).to(self.dtype))
        others = [i for i in range(self.count) if i != r]
        if others:
            self._check_part(known, slice(None), others, whole)
        neighbours = [i for i in range(self.samples) if i != s]
        if neighbours:
            self._check_part(known, neighbours, [r], whole | {"update": False})

    def _as_shared(self, before, options):
        """mbf_step_ is the shared step of one mini-block for each matrix whose v is the diagonal of F."""
        diagonal = np.diagonal(before[4], axis1=1, axis2=2)[None]
        beta = options["decay"] if options["update"] else 1.0
        options = options | {"diagonal_decay": beta, "square_weight": options["fisher_weight"]}
        return [*before[:3], diagonal.copy(), before[4]], options

    def _check_part(self, before, samples, matrices, options):
        w, m, v, f = self.written()
        if self.op == "mbf_step_":
            diagonal = f.diagonal(dim1=1, dim2=2)[None]
            v = diagonal if options["graft"] else torch.from_numpy(before[3]).to(self.dtype)
        results = [t[samples][:, matrices] for t in (w, m, v)] + [f[matrices]]
        arrays = [a[samples][:, matrices] for a in before[:4]] + [before[4][matrices]]
        if "damped" in options:
            options = options | {"damped": options["damped"][matrices]}
        names = {*OPTIONS["mbf_shared_step_"], *FLAGS, "graft", "damped"}
        check_shared(results, arrays, self.dtype, **{k: o for k, o in options.items() if k in names})


class CachedFactor:
    """A cached factor, of another matrix than F."""

    def __init__(self, problem: Problem, choices: Choices):
        self.problem = problem
        g = choices.randn(problem.count, problem.size, problem.size + 2)
        lower = torch.linalg.cholesky(g @ g.mT + torch.eye(problem.size, dtype=g.dtype)).to(problem.dtype)
        self.factor = blocks(lower)
        lower = lower.double()
        self.matrix = (lower @ lower.mT).numpy()
        self.before = self.factor.data.clone()

    def check(self, options, at):
        assert_padding_zero(self.factor)
        if not options["refactor"]:
            return assert_bitwise(self.factor.data, self.before)
        f = self.problem.fisher.to_dense().double()
        means = f.diagonal(dim1=1, dim2=2).mean(-1)
        ridge = options["damping"] * (means if options["relative"] else torch.ones_like(means))
        ridge[means == 0] = 1.0 if options["relative"] else options["damping"]
        a = f + ridge[:, None, None] * torch.eye(self.problem.size, dtype=torch.float64)
        good = [r for r in range(self.problem.count) if at is None or r != at[1]]
        assert_factors(a[good], self.factor.to_dense()[good], self.problem.dtype)
        self.before, lower = self.factor.data.clone(), self.factor.to_dense().double().tril()
        self.matrix = (lower @ lower.mT).numpy()


class Step:
    """A step over one or two tensors, with cached factors and counters or without."""

    def __init__(self, op: str, choices: Choices, first_call: Call):
        self.op, self.first_call = op, first_call
        dtype, size = choices.of(DTYPES), choices.of(SIZES)
        self.problems = [Problem(op, choices, dtype, size, first_call) for _ in range(choices.of([1, 2]))]
        self.has_squares = op == "mbf_diagonal_step_" or (op == "mbf_shared_step_" and not choices.one_in(5))
        self.counted = op != "mbf_diagonal_step_" and choices.one_in(2)
        self.cached = None
        if op != "mbf_diagonal_step_" and choices.one_in(2):
            self.cached = [CachedFactor(p, choices) for p in self.problems]

    def tensors(self) -> dict:
        """All that the op takes, but for gradients and options."""
        lists = {"params": [p.param for p in self.problems], "momenta": [p.momentum for p in self.problems]}
        if self.op != "mbf_step_":
            lists["squares"] = [p.square for p in self.problems] if self.has_squares else None
        if self.op != "mbf_diagonal_step_":
            lists["fishers"] = [p.fisher for p in self.problems]
        if self.counted:
            lists["skipped"] = [p.skipped for p in self.problems]
        if self.cached:
            lists["factors"] = [c.factor for c in self.cached]
        return lists

    def aim(self, choices: Choices, call: Call, weights_for: int | None) -> tuple[list, dict]:
        """Gradients and options for a call, whose check is made."""
        call.written = list(self.tensors().values())
        call.with_grad = self.first_call.with_grad
        grads = [p.draw(choices, call, read_only=True) for p in self.problems]
        at, poison = None, choices.of([None, None, None, torch.nan, torch.inf])
        if poison is not None:
            grads[0], at = self.problems[0].poison(grads[0], poison, choices)
        options = options_of(self.op, choices, weights_for)
        if not self.has_squares and self.op == "mbf_shared_step_":
            options["graft"] = None
        if self.cached:
            options["refactor"] = flag(choices)
        before = [p.before(grad) for p, grad in zip(self.problems, grads, strict=True)]
        counted = [int(p.skipped) for p in self.problems]
        call.check = lambda infos: self.check(infos, before, options, at, counted)
        return grads, options

    def check(self, infos, before, options, at, counted):
        for i, problem in enumerate(self.problems):
            here, mine = at if i == 0 else None, as_floats(options, i)
            cached = self.cached[i] if self.cached else None
            damped = cached.matrix if cached and not options["refactor"] else None
            problem.check(before[i], mine, here, damped)
            if self.counted:
                assert int(problem.skipped) == counted[i] + (here is not None)
            if infos is not None:
                bad_ones = [here[1]] if here and self.op == "mbf_step_" else []
                assert infos[i].dtype == torch.int32 and infos[i].nonzero().flatten().tolist() == bad_ones
            if cached:
                cached.check(mine, here)

    def bad(self, options: dict) -> dict:
        """What makes its arguments ones to be refused."""
        wrong = {"params": bad.WRITTEN_TENSORS, "momenta": bad.WRITTEN_TENSORS, "grads": bad.TENSORS}
        if self.op == "mbf_diagonal_step_" or (self.has_squares and options["graft"]):
            wrong["squares"] = bad.WRITTEN_TENSORS
        if self.op != "mbf_diagonal_step_":
            wrong |= {"fishers": bad.BLOCK_LISTS, "refactor": [lambda old: False]}
        if self.counted:
            wrong["skipped"] = bad.OPTIONAL_COUNTERS
        if self.cached:
            wrong |= {"factors": bad.OPTIONAL_BLOCK_LISTS, "refactor": bad.FLAGS}
        return wrong | bad_options(options)

    def overlaps(self) -> list:
        first = self.problems[0]
        found = [
            ("momenta", lambda old: [first.param, *old[1:]]),
            ("grads", lambda old: [first.param, *old[1:]]),
            ("grads", lambda old: [first.momentum, *old[1:]]),
        ]
        if len(self.problems) == 2:  # of tensors that are not alike, one twice does not fit either
            found.append(("params", lambda old: [old[1], old[1]]))
        if len(self.problems) == 2 and self.op != "mbf_diagonal_step_":
            found.append(("fishers", lambda old: [old[1], old[1]]))
        return found


def bad_options(options: dict) -> dict:
    kinds = dict.fromkeys(options, bad.FLAGS) | {name: NUMBERS[name][1] for name in NUMBERS} | {"graft": bad.GRAFTS}
    return {name: kinds[name] for name in options}


def step(op: str, choices: Choices):
    call = Call(op, getattr(mbf_kernels, op), {})
    now = Step(op, choices, call)
    grads, options = now.aim(choices, call, weights_for=len(now.problems))
    lists = now.tensors()
    call.arguments = {"params": lists.pop("params"), "grads": grads} | lists | options
    call.bad, call.overlaps = now.bad(options), now.overlaps()
    yield call


def mbf_step_(choices: Choices):
    yield from step("mbf_step_", choices)


def mbf_shared_step_(choices: Choices):
    yield from step("mbf_shared_step_", choices)


def mbf_diagonal_step_(choices: Choices):
    yield from step("mbf_diagonal_step_", choices)


def prepared_step(choices: Choices):
    """A PreparedStep and some calls of it, each with gradients and options of its own."""
    op, made = choices.of(["mbf_step_", "mbf_shared_step_", "mbf_diagonal_step_"]), []
    make = Call("PreparedStep", lambda **arguments: made.append(PreparedStep(**arguments)), {})
    now = Step(op, choices, make)
    make.arguments = {"op": op} | now.tensors()
    no_lists = bad.lists(bad.constants([None, 3, "text", {}]))
    make.bad = {name: no_lists for name in ("params", "momenta", "squares") if make.arguments.get(name)}
    make.bad |= {name: bad.constants([5, "ab", {}, [None], [3]]) for name in ("fishers", "factors", "skipped")}
    make.bad["op"] = bad.constants(["step", None, 3, ["mbf_step_"]])
    yield make
    if not made:  # the call was spoilt
        return
    for _ in range(choices.of([3, 1, 2])):
        call = Call(op, made[0], {})
        grads, options = now.aim(choices, call, weights_for=None)
        call.bad = {"grads": bad.lists(bad.ANY_TENSOR)} | bad_options(options)
        flat = [part for entry in grads for part in (entry if isinstance(entry, tuple) else (entry,))]
        call.arguments = {"grads": flat}
        second = {"fisher_weight": "second_weight", "square_weight": "second_weight"}
        call.arguments |= {second.get(name, name): value for name, value in options.items()}
        call.bad = {second.get(name, name): wrong for name, wrong in call.bad.items()}
        yield call


def rank_one_step_(choices: Choices):
    call = Call("rank_one_step_", mbf_kernels.rank_one_step_, {})
    dtype, names = choices.of(DTYPES), ("params", "grads", "momenta", "rows", "columns")
    lists = {name: [] for name in names}
    for _ in range(choices.of([1, 2])):
        m, n = choices.of([2, 1, 3, 17]), choices.of([3, 1, 4, 9, 33])
        shape = choices.of([(m, n), (m, 1, n), (1, m, n, 1), (m * n,)] if m == 1 else [(m, n), (m, 1, n), (1, m, n, 1)])
        for name in names[:3]:
            lists[name].append(tensor(choices, choices.randn(*shape, dtype=dtype), call, read_only=name == "grads"))
        curved = not choices.one_in(4)
        for name, extent in (("rows", m), ("columns", n)):
            vector = tensor(choices, choices.randn(extent, dtype=dtype).abs(), call, read_only=True)
            lists[name].append(vector if curved else None)
    options = {
        name: number(choices, NUMBERS[name][0], on_device=name in ON_DEVICE)
        for name in ("lr", "momentum", "damping", "weight_decay", "momentum_weight")
    } | {"decoupled": flag(choices)}
    call.arguments, call.written = lists | options, [lists["params"], lists["momenta"]]
    call.bad = bad_options(options) | {
        "graft": bad.constants([None]),
        "params": bad.WRITTEN_TENSORS,
        "momenta": bad.WRITTEN_TENSORS,
    }
    call.bad["grads"] = bad.TENSORS
    call.overlaps = [("grads", lambda old: [lists["params"][0], *old[1:]])]
    call.bad |= {name: bad.TENSORS for name in ("rows", "columns") if lists[name][0] is not None}
    before = [[None if t is None else plain(t).clone() for t in group] for group in zip(*lists.values(), strict=True)]

    def check(result):
        assert result is None
        for i, tensors in enumerate(before):
            mine = {n: bool(o) if n == "decoupled" else float(o) for n, o in options.items()}
            check_rank_one(plain(lists["params"][i]), plain(lists["momenta"][i]), tensors, dtype, **mine)

    call.check = check
    yield call


FUNCTIONS = (mbf_step_, mbf_shared_step_, mbf_diagonal_step_, prepared_step, rank_one_step_)
