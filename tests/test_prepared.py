"""PreparedStep is the op, call after call: the same bits whatever changes between calls, and the op's errors."""

import collections

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mbf_kernels import (
    PreparedStep,
    SymmetricBlocks,
    mbf_diagonal_step_,
    mbf_shared_step_,
    mbf_step_,
    use_backend,
)
from mbf_kernels.testing import assert_bitwise, randn, spd_blocks

OPS = {"mbf_step_": mbf_step_, "mbf_shared_step_": mbf_shared_step_, "mbf_diagonal_step_": mbf_diagonal_step_}
SHAPES = {
    "mbf_step_": [(5, 7, 3, 3), (4, 9)],
    "mbf_shared_step_": [(6, 2, 9), (7, 1, 9)],
    "mbf_diagonal_step_": [(5, 7), (17,), (2, 3, 4, 5)],
}
OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.1, graft="adam")
over_ops = pytest.mark.parametrize("op", OPS)


class Twins:
    """The same tensors twice: for a prepared step, and for the op."""

    def __init__(self, op, dtype=torch.float32, device="cpu", pairs=False):
        self.op, self.dtype, self.device, self.calls = op, dtype, device, 0
        self.options = (
            OPTIONS
            | {
                "mbf_step_": dict(decay=0.9, damping=0.1),
                "mbf_shared_step_": dict(decay=0.9, damping=0.1, diagonal_decay=0.99),
                "mbf_diagonal_step_": dict(diagonal_decay=0.99),
            }[op]
        )
        self.pairs = pairs
        self.sides = [self._tensors(), self._tensors()]
        self.prepared = self.prepare()

    def _tensors(self):
        side = {}
        for seed, name in enumerate(("params", "momenta", "squares")):
            tensors = [self.draw(shape, 10 * seed + i) for i, shape in enumerate(SHAPES[self.op])]
            if name == "squares":
                tensors = [t.square() for t in tensors]
            side[name] = self._split(tensors)
        counts = {"mbf_step_": (35, 4), "mbf_shared_step_": (2, 1)}.get(self.op)
        if counts:
            side["fishers"] = [
                SymmetricBlocks.from_dense(spd_blocks("well", count, 9, self.dtype, self.device)) for count in counts
            ]
            side["skipped"] = [torch.tensor(0, device=self.device) for _ in counts]
        return side

    def draw(self, shape, seed):
        return randn(*shape, dtype=self.dtype, device=self.device, seed=seed)

    def _split(self, tensors):
        """With pairs, the last tensor as one: its last elements are those of a bias."""
        if not self.pairs:
            return [(t,) for t in tensors]
        *others, last = tensors
        return [*((t,) for t in others), (last[..., :-1].clone(), last[:, 0, -1].clone())]

    def prepare(self):
        mine = self.sides[0]
        matrices = {name: mine[name] for name in ("fishers", "skipped") if name in mine}
        squares = mine["squares"] if self.op != "mbf_step_" else None
        return PreparedStep(self.op, mine["params"], mine["momenta"], squares, **matrices)

    def grads(self, layout=torch.Tensor.contiguous):
        self.calls += 1
        drawn = [self.draw(shape, 100 * self.calls + i) for i, shape in enumerate(SHAPES[self.op])]
        return [layout(part) for entry in self._split(drawn) for part in entry]

    def run_op(self, grads, momentum_weight=1.0, second_weight=1.0, **options):
        side = self.sides[1]
        rest = iter(grads)
        named = {"grads": [tuple(next(rest) for _ in parts) for parts in side["params"]]} | side
        names = ["params", "grads", "momenta", "squares"][: 3 if self.op == "mbf_step_" else 4]
        lists = [[parts if len(parts) > 1 else parts[0] for parts in named[name]] for name in names]
        matrices = {name: side[name] for name in ("fishers", "skipped") if name in side}
        second = "fisher_weight" if self.op == "mbf_step_" else "square_weight"
        weights = {"momentum_weight": momentum_weight, second: second_weight}
        OPS[self.op](**dict(zip(names, lists, strict=True)), **matrices, **weights, **self.options | options)

    def step(self, grads=None, **options):
        grads = self.grads() if grads is None else grads
        self.prepared(grads, **self.options | options)
        self.run_op([g.clone() for g in grads], **options)

    def check(self):
        mine, other = ([*self.vectors(side), *self.matrices(side)] for side in self.sides)
        for a, b in zip(mine, other, strict=True):
            assert_bitwise(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b, rtol=0, atol=0)

    @staticmethod
    def vectors(side):
        return [
            part.contiguous() for name in ("params", "momenta", "squares") for parts in side[name] for part in parts
        ]

    @staticmethod
    def matrices(side):
        return [f.data for f in side.get("fishers", ())] + side.get("skipped", [])


@over_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_changes(backend, device, op, dtype):
    twins = Twins(op, dtype, device)
    for t in range(1, 5):
        twins.step(momentum_weight=1 - 0.9**t, second_weight=1 - 0.99**t)
        twins.check()


def test_pairs(backend, device):
    twins = Twins("mbf_shared_step_", device=device, pairs=True)
    for _ in range(3):
        twins.step()
        twins.check()


@over_ops
def test_the_same_gradients_in_place_and_new_ones(backend, device, op):
    """A gradient that is written again and one that lies elsewhere; freed ones are not read."""
    twins = Twins(op, device=device)
    kept = twins.grads()
    for new in (False, False, True, True, False):
        if new:
            twins.step()
        else:
            for g, value in zip(kept, twins.grads(), strict=True):
                g.copy_(value)
            twins.step(kept)
        twins.check()


@over_ops
def test_gradients_change_their_layout(backend, device, op):
    def spread(t):
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    def reversed_dimensions(t):
        order = range(t.ndim - 1, -1, -1)
        return t.permute(*order).contiguous().permute(*order)

    twins = Twins(op, device=device)
    for layout in (torch.Tensor.contiguous, spread, spread, reversed_dimensions, torch.Tensor.contiguous, spread):
        twins.step(twins.grads(layout))
        twins.check()


@over_ops
def test_a_lazy_minus(backend, device, op):
    """A gradient that is to be negated when it is read, as imaginary parts of conjugates are; the next is not."""

    def negated(t, lazy):
        imaginary = torch.complex(torch.zeros_like(t), t)
        return (imaginary.conj() if lazy else imaginary).imag

    twins = Twins(op, device=device)
    for lazy in (False, True, True, False, True):
        grads = twins.grads(lambda t, lazy=lazy: negated(t, lazy))
        assert all(g.is_neg() == lazy for g in grads)
        twins.step(grads)
        twins.check()


@over_ops
def test_storage_is_replaced(backend, device, op):
    """p.data = ..., momenta and second moments likewise, by copies and by other layouts: the old memory stays as it
    was."""
    for name in ("params", "momenta", "squares")[: 2 if op == "mbf_step_" else 3]:
        for layout in (torch.clone, lambda t: torch.stack([t, t], -1)[..., 0]):
            twins = Twins(op, device=device)
            twins.step()
            twins.step()
            old = []
            for side in twins.sides:
                for (tensor,) in side[name]:
                    old.append((tensor.data, tensor.data.clone()))
                    tensor.data = layout(tensor.data)
            for _ in range(2):
                twins.step()
                twins.check()
            for storage, before in old:
                assert_bitwise(storage, before)


@over_ops
def test_memory_stays_but_not_its_order(backend, device, op):
    """p.data = p.data.t() of a square matrix: the address and the shape are what they were."""
    shape = {"mbf_step_": (9, 9), "mbf_shared_step_": (9, 1, 9), "mbf_diagonal_step_": (9, 9)}[op]
    twins = Twins.__new__(Twins)
    shapes, SHAPES[op] = SHAPES[op], [shape]
    try:
        Twins.__init__(twins, op, device=device)
        for side in twins.sides:
            for name in ("fishers", "skipped"):
                if name in side:
                    side[name] = side[name][:1]
            if op == "mbf_step_":
                side["fishers"] = [SymmetricBlocks.zeros(9, 9, torch.float32, device)]
            if op == "mbf_shared_step_":
                side["fishers"] = [SymmetricBlocks.zeros(1, 9, torch.float32, device)]
        twins.prepared = twins.prepare()
        twins.step()
        for side in twins.sides:
            for (tensor,) in side["params"]:
                tensor.data = tensor.data.transpose(0, -1)
        for _ in range(2):
            twins.step()
            twins.check()
    finally:
        SHAPES[op] = shapes


@over_ops
def test_the_backend_changes(op):
    twins = Twins(op)
    for name in ("cpu", "reference", "emulated", "emulated", "cpu", "cpu"):
        try:
            chosen = use_backend(name)
            with chosen:
                twins.step()
        except RuntimeError as error:
            assert "not available" in str(error)
            continue
        twins.check()


@over_ops
def test_options_and_weights_change(backend, device, op):
    """Each is that of its call; numbers on the device change in place."""
    twins = Twins(op, device=device)
    number = torch.tensor(0.25, device=device)
    changes = [dict(), dict(lr=0.01), dict(graft=None), dict(momentum=0.5), dict(maximize=True), dict(weight_decay=0.0)]
    changes += [dict(lr=number), dict(lr=number), dict(momentum_weight=0.5, second_weight=0.25), dict(eps=1e-3)]
    changes += [dict(momentum_weight=number, second_weight=number)] * 2
    if op != "mbf_diagonal_step_":
        changes += [dict(damping=3.0), dict(relative=True), dict(nesterov=True), dict(decay=0.5), dict(update=False)]
    else:
        changes += [dict(diagonal_decay=0.5)]
    for change in [*changes, dict()]:
        number.mul_(0.5)
        twins.step(**change)
        twins.check()


@over_ops
def test_the_number_of_threads_changes(op):
    before, twins = torch.get_num_threads(), Twins(op)
    try:
        for threads in (1, 3, 2, 1):
            torch.set_num_threads(threads)
            twins.step()
            twins.check()
    finally:
        torch.set_num_threads(before)


def test_cached_factors(backend, device):
    """Factored in some calls, used in others."""
    for op in ("mbf_step_", "mbf_shared_step_"):
        twins = Twins(op, device=device)
        factors = [
            [SymmetricBlocks.zeros(f.count, 9, f.dtype, device) for f in side["fishers"]] for side in twins.sides
        ]
        mine = twins.sides[0]
        squares = mine["squares"] if op != "mbf_step_" else None
        twins.prepared = PreparedStep(
            op, mine["params"], mine["momenta"], squares, mine["fishers"], factors[0], mine["skipped"]
        )
        plain = twins.run_op
        twins.run_op = lambda grads, plain=plain, factors=factors, **o: plain(grads, factors=factors[1], **o)
        for refactor in (True, False, False, True, False):
            twins.step(refactor=refactor)
            twins.check()
            for a, b in zip(*factors, strict=True):
                assert_bitwise(a.data, b.data)


def test_views(backend, device):
    """A view of each tensor, with an offset: the gradients of the whole are given."""
    w, m, v = (randn(6, 20, dtype=torch.float32, device=device, seed=s) for s in range(3))
    v = v.square()
    expected = [t.clone() for t in (w, m, v)]
    fishers = [SymmetricBlocks.zeros(1, 9, torch.float32, device) for _ in range(2)]

    def view(t):
        return t[:, 11:].unsqueeze(1)

    prepared = PreparedStep("mbf_shared_step_", [(w,)], [(m,)], [(v,)], fishers[:1], views=[(view,)])
    options = OPTIONS | dict(decay=0.9, damping=0.1, diagonal_decay=0.99)
    for step in range(3):
        grad = randn(6, 20, dtype=torch.float32, device=device, seed=10 + step)
        prepared([grad], **options)
        lists = [[view(t)] for t in (expected[0], grad, *expected[1:])]
        mbf_shared_step_(*lists, fishers[1:], **options)
    for a, b in zip((w, m, v), expected, strict=True):
        assert_bitwise(a, b)


@over_ops
def test_autograd_sees_the_change(backend, device, op):
    """The version of each parameter rises at every call; a graph that saved it refuses to go backward."""
    twins = Twins(op, device=device)
    params = [part for parts in twins.sides[0]["params"] for part in parts]
    for _ in range(3):
        before = [p._version for p in params]
        grads = twins.grads()
        read = [g._version for g in grads]
        leaf = torch.ones_like(params[0]).requires_grad_()
        loss = (leaf * params[0]).sum()
        twins.step(grads)
        assert all(p._version > b for p, b in zip(params, before, strict=True))
        assert read == [g._version for g in grads]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


BAD = {
    "sparse": (lambda g: [g[0].to_sparse(), *g[1:]], TypeError, "dense"),
    "standing for others": (lambda g: [TwoTensor(g[0], g[0].clone()), *g[1:]], TypeError, "TwoTensor"),
    "dtype": (lambda g: [g[0].double(), *g[1:]], TypeError, "dtype|float32"),
    "device": (lambda g: [g[0].to("meta"), *g[1:]], ValueError, "meta"),
    "longer": (lambda g: [torch.cat([g[0]] * 2), *g[1:]], ValueError, "shape"),
    "shorter": (lambda g: [g[0][:1], *g[1:]], ValueError, "shape"),
}


@over_ops
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("calls", [0, 2])
def test_a_bad_gradient_is_refused(backend, device, op, bad, calls):
    """As the op does, in the first call and later, before anything changes; the next good one is taken."""
    if device != "cpu":
        pytest.skip("the cases lie on the CPU")
    twins = Twins(op)
    for _ in range(calls):
        twins.step()
    spoil, error, message = BAD[bad]
    with pytest.raises(error, match=f"{op}: .*({message})"):
        twins.prepared(spoil(twins.grads()), **twins.options)
    twins.check()
    twins.step()
    twins.check()


@over_ops
def test_a_launch_is_not_aimed_at_no_memory(backend, device, op):
    """Those who aim without the checks of a call: the address of a tensor that stands for others is 0."""
    twins = Twins(op)
    for _ in range(2):
        twins.step()
    first, *others = twins.grads()
    assert not twins.prepared.aim([TwoTensor(first, first.clone()), *others])


CALLS = {
    "an option missing": (lambda o: {k: v for k, v in o.items() if k != "lr"}, TypeError, "lr"),
    "another option missing": (lambda o: {k: v for k, v in o.items() if k != "momentum"}, TypeError, "momentum"),
    "an unknown option": (lambda o: o | dict(rate=1.0), TypeError, "rate"),
    "lr": (lambda o: o | dict(lr=-1.0), ValueError, "lr"),
    "lr infinite": (lambda o: o | dict(lr=float("inf")), ValueError, "lr"),
    "lr of integers": (lambda o: o | dict(lr=torch.tensor(1)), TypeError, "lr"),
    "lr of one dimension": (lambda o: o | dict(lr=torch.tensor([1.0])), ValueError, "lr"),
    "graft": (lambda o: o | dict(graft="sgd"), ValueError, "graft"),
    "momentum": (lambda o: o | dict(momentum=1.0), ValueError, "momentum"),
    "eps": (lambda o: o | dict(eps=float("nan")), ValueError, "eps"),
    "momentum_weight": (lambda o: o | dict(momentum_weight=0.0), ValueError, "momentum_weight"),
    "momentum_weight of integers": (lambda o: o | dict(momentum_weight=torch.tensor(1)), TypeError, "momentum_weight"),
    "second_weight": (lambda o: o | dict(second_weight=float("nan")), ValueError, "_weight"),
    "second_weight, a word": (lambda o: o | dict(second_weight="one"), TypeError, "_weight"),
}


@over_ops
@pytest.mark.parametrize("bad", CALLS)
@pytest.mark.parametrize("calls", [0, 2])
def test_a_bad_call_is_refused(backend, device, op, bad, calls):
    if device != "cpu":
        pytest.skip("the cases lie on the CPU")
    twins = Twins(op)
    for _ in range(calls):
        twins.step()
    spoil, error, message = CALLS[bad]
    with pytest.raises(error, match=f"{op}.*{message}"):
        twins.prepared(twins.grads(), **spoil(twins.options))
    twins.check()


@over_ops
@pytest.mark.parametrize("calls", [0, 2])
def test_another_number_of_gradients_is_refused(op, calls):
    twins = Twins(op)
    for _ in range(calls):
        twins.step()
    for grads in (twins.grads()[:-1], [*twins.grads(), *twins.grads()], [], None, [None] * len(twins.grads())):
        with pytest.raises((TypeError, ValueError), match=f"^{op}: expected .*grads.*got "):
            twins.prepared(grads, **twins.options)
    twins.check()


BAD_STEPS = {
    "op": (dict(op="step"), "PreparedStep: expected op"),
    "no name": (dict(op=["mbf_step_"]), "PreparedStep: expected op"),
    "params": (dict(params=None), "mbf_step_: expected params"),
    "numbers": (dict(momenta=[1]), r"mbf_step_: expected momenta\[0\]\[0\]"),
    "three": (dict(params=[(torch.ones(5, 9),) * 3]), r"mbf_step_: expected params\[0\]"),
    "fishers": (dict(fishers=[1]), r"mbf_step_: expected fishers\[0\]"),
    "skipped": (dict(skipped=[1]), r"mbf_step_: expected skipped\[0\]"),
    "too many": (dict(momenta=[torch.ones(5, 9)] * 2), "mbf_step_: expected lists of one length"),
    "none of squares": (dict(squares=[]), "mbf_step_: expected lists of one length"),
    "views": (dict(views=[(None,)] * 2), "mbf_step_: expected lists of one length"),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
def test_a_bad_step_is_refused(bad):
    arguments, message = BAD_STEPS[bad]
    good = dict(
        op="mbf_step_", params=[torch.ones(5, 9)], momenta=[torch.ones(5, 9)], fishers=[SymmetricBlocks.zeros(5, 9)]
    )
    PreparedStep(**good)([torch.ones(5, 9)], lr=0.1, momentum=0.9, decay=0.9, damping=0.1)
    with pytest.raises((TypeError, ValueError), match=f"^{message}.*got "):
        PreparedStep(**good | arguments)


@over_ops
def test_no_silent_cut_of_a_graph(op):
    """In grad mode a parameter that requires grad is refused, also where a launch is kept."""
    twins = Twins(op)
    twins.sides[0]["params"][0][0].requires_grad_()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{op}: "):
            twins.prepared(twins.grads(), **twins.options)
        with torch.no_grad():
            twins.step()
            twins.check()


def test_empty_tensors_beside_others(backend, device):
    for op, shapes in {"mbf_step_": (35, 0), "mbf_shared_step_": (2, 0), "mbf_diagonal_step_": None}.items():
        twins = Twins(op, device=device)
        for side in twins.sides:
            for name in ("params", "momenta", "squares"):
                side[name] = [side[name][0], (torch.empty(0, 0, 9, device=device),)]
            if shapes:
                side["fishers"][1] = SymmetricBlocks.zeros(0, 9, torch.float32, device)
        twins.prepared = twins.prepare()
        for _ in range(3):
            twins.step([twins.grads()[0], torch.empty(0, 0, 9, device=device)])
            twins.check()


def test_an_empty_pair_before_others(backend, device):
    """As where one process has no rows of a tensor: its bias takes an address, too, though it has none."""
    twins = Twins("mbf_shared_step_", device=device, pairs=True)
    for side in twins.sides:
        for name in ("params", "momenta", "squares"):
            side[name] = [(torch.empty(0, 1, 8, device=device), torch.empty(0, device=device)), side[name][1]]
        side["fishers"][0] = SymmetricBlocks.zeros(1, 9, torch.float32, device)
    twins.prepared = twins.prepare()
    for _ in range(3):
        empty = [torch.empty_like(part) for part in twins.sides[0]["params"][0]]
        twins.step([*empty, *twins.grads()[-2:]])
        twins.check()


@over_ops
def test_no_tensors_and_only_empty_ones(backend, device, op):
    """Nothing to do, as for the op; what the op refuses is refused."""
    shape, options = (0, 1, 9), Twins(op).options
    for count in (0, 2):
        tensors = [[torch.empty(shape, device=device) for _ in range(count)] for _ in range(4)]
        params, momenta, squares = ([(t,) for t in group] for group in tensors[:3])
        blocks = 0 if op == "mbf_step_" else 1
        matrices = {"squares": squares} if op != "mbf_step_" else {}
        if op != "mbf_diagonal_step_":
            matrices["fishers"] = [SymmetricBlocks.zeros(blocks, 9, device=device) for _ in range(count)]
        prepared = PreparedStep(op, params, momenta, **matrices)
        for _ in range(3):
            prepared(tensors[3], **options)
        with pytest.raises(ValueError, match="graft"):
            prepared(tensors[3], **options | dict(graft="sgd"))


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.namespace] += 1
        return func(*args, **(kwargs or {}))


def test_the_second_call_is_a_launch_alone():
    """What makes it cheap: no op is called."""
    for op in OPS:
        twins = Twins(op)
        with use_backend("cpu"):
            twins.prepared(twins.grads(), **twins.options)
            grads = twins.grads()
            with CountOps() as count:
                twins.prepared(grads, **twins.options)
        assert not count.calls


@over_ops
@pytest.mark.parametrize("pairs", [False, True])
def test_params_that_move_are_aimed_at(op, pairs):
    """Parts of memory that is given back and taken anew between steps: the launch follows, and no op is called."""
    twins = Twins(op, pairs=pairs and op == "mbf_shared_step_")
    mine = twins.sides[0]
    parts = [part for parts in mine["params"] for part in parts]
    values = [part.clone() for part in parts]
    memory = torch.empty(sum(part.numel() for part in parts) + 64)
    rest = iter(memory.split([64, *(part.numel() for part in parts)])[1:])
    mine["params"] = [tuple(next(rest).view(part.shape) for part in of_one) for of_one in mine["params"]]
    squares = mine["squares"] if op != "mbf_step_" else None
    matrices = {name: mine[name] for name in ("fishers", "skipped") if name in mine}
    twins.prepared = PreparedStep(op, mine["params"], mine["momenta"], squares, **matrices, params_move=True)
    parts = [part for parts in mine["params"] for part in parts]
    size, places, others = memory.untyped_storage().nbytes(), set(), []
    with use_backend("cpu"):
        for t in range(4):
            memory.untyped_storage().resize_(0)
            others.append(torch.empty(size, dtype=torch.uint8))  # takes the place
            memory.untyped_storage().resize_(size)
            places.add(memory.data_ptr())
            torch._foreach_copy_(parts, values)
            grads = twins.grads()
            with CountOps() as count:
                twins.prepared(grads, **twins.options)
            assert bool(count.calls) == (t == 0)
            twins.run_op([g.clone() for g in grads])
            twins.check()
            values = [part.clone() for part in parts]
    assert len(places) > 1
