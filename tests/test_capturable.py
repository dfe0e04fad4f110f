"""MBF(capturable=True): the figures of the plain optimizer, nothing read on the host, and CUDA graphs."""

import copy
import io
import pickle

import pytest
import torch
from mbf_optim import MBF
from mbf_optim.schedule import DeviceClock
from test_mbf import FORMS, PARTITIONS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mbf_kernels import SymmetricBlocks, backends, reference, use_backend
from mbf_kernels.options import StepOptions
from mbf_kernels.testing import assert_below, assert_bitwise, randn

over_forms = pytest.mark.parametrize("form", FORMS)
over_partitions = pytest.mark.parametrize("partition", PARTITIONS)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    "pointwise.weight": (4, 4, 1, 1),
    "linear.weight": (4, 4),
    "linear.bias": (4,),
    "matrix.weight": (4, 8),  # with n <= 20 in every partition, which Triton serves too
}


class Run:
    """Tensors of every structure, an optimizer, and gradients that depend on the step alone."""

    def __init__(self, dtype=torch.float64, device="cpu", **options):
        self.dtype = dtype
        options = dict(lr=1e-2, damping=1e-2) | options
        if options.get("capturable"):
            for name in ("lr", "damping"):
                options[name] = torch.tensor(options[name], dtype=torch.float64, device=device)
        self.tensors = {name: nn.Parameter(self.draw(name, 0).to(device)) for name in SHAPES}
        with torch.no_grad():
            self.tensors["conv.weight"].data = self.tensors["conv.weight"].to(memory_format=torch.channels_last)
        self.optimizer = MBF(self.tensors.items(), **options)
        self.steps, self.path = 0, dict.fromkeys(SHAPES, 0.0)

    @property
    def group(self):
        return self.optimizer.param_groups[0]

    def draw(self, name, step):
        return randn(*SHAPES[name], dtype=self.dtype, seed=100 * step + list(SHAPES).index(name))

    def load(self, drop=()):
        """The gradients of the next step, in place as a CUDA graph needs them."""
        self.steps += 1
        for name, p in self.tensors.items():
            if name in drop:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.empty_like(p).copy_(self.draw(name, self.steps))
            else:
                p.grad.copy_(self.draw(name, self.steps))

    def step(self, drop=()):
        before = {name: p.detach().clone() for name, p in self.tensors.items()}
        self.load(drop)
        self.optimizer.step()
        for name, p in self.tensors.items():
            self.path[name] += float((p.detach() - before[name]).norm())


def set_number(run, name, value):
    number = run.group[name]
    if isinstance(number, torch.Tensor):
        number.fill_(value)
    else:
        run.group[name] = value


def assert_same_way(run, plain):
    """The gradients are the same, so F, M and P are; lengths differ by the rounding of 1 - beta_2^t, which loses up
    to 1 / (1 - beta_2) = 1000 eps, and every step rounds the weights."""
    assert run.steps == plain.steps
    eps = torch.finfo(run.dtype).eps
    for name, p in plain.tensors.items():
        bound = eps * (1000 * plain.path[name] + 8 * plain.steps * float(p.detach().norm()))
        assert_below((run.tensors[name] - p).norm().cpu(), bound, name)


# ---- the same figures as the plain optimizer


@over_forms
@over_partitions
@over_dtypes
def test_equals_the_plain_optimizer(backend, device, form, partition, dtype):
    """With the bias column, weight decay, and rates that change in place between steps."""
    options = FORMS[form] | PARTITIONS[partition] | dict(weight_decay=0.1)
    plain, run = (Run(dtype, device, **options, capturable=capturable) for capturable in (False, True))
    for step in range(6):
        for r in (plain, run):
            if step == 3:
                set_number(r, "lr", 3e-3)
                set_number(r, "damping", 0.1)
            r.step()
    assert_same_way(run, plain)


@over_forms
@pytest.mark.parametrize("lr", [1e-2, torch.tensor([1e-2])], ids=["float", "float32 of one element"])
def test_lr_may_be_a_float_or_a_tensor_of_one_element(form, lr):
    plain = Run(**FORMS[form] | dict(lr=float(lr)))
    run = Run(**FORMS[form])
    run.optimizer = MBF(run.tensors.items(), **FORMS[form] | dict(lr=lr, capturable=True))
    for _ in range(4):
        plain.step()
        run.step()
    assert_same_way(run, plain)


@over_forms
@over_partitions
def test_tensors_step_at_their_own_times(form, partition):
    """Layers share a clock while they step together; one that misses a step goes by its own from then on."""
    plain, run = (Run(**FORMS[form] | PARTITIONS[partition], capturable=c) for c in (False, True))
    drops = [(), ("conv.weight",), (), ("linear.weight", "linear.bias"), ("conv.weight", "conv.bias"), ("linear.bias",)]
    for drop in drops:
        plain.step(drop)
        run.step(drop)
    assert_same_way(run, plain)


@over_forms
def test_observed_first(form):
    plain, run = (Run(**FORMS[form], capturable=c) for c in (False, True))
    for r in (plain, run):
        for _ in range(3):
            r.load()
            r.optimizer.observe()
        for _ in range(3):
            r.step()
        with pytest.raises(RuntimeError, match="observe"):
            r.optimizer.observe()
    assert_same_way(run, plain)


def test_decay_one_keeps_a_zero_fisher(backend, device):
    """1 - beta^k is 0 for beta = 1: no mini-block may divide by it."""
    plain, run = (Run(device=device, decay=1.0, capturable=c) for c in (False, True))
    for _ in range(2):
        plain.step()
        run.step()
    assert all(row.skipped == 0 for row in run.optimizer.report())
    assert_same_way(run, plain)


def test_bad_blocks_are_counted(backend, device):
    plain, run = (Run(device=device, capturable=c) for c in (False, True))
    for r in (plain, run):
        for step in range(3):
            r.load()
            if step == 1:
                for name in ("conv.weight", "matrix.weight"):
                    r.tensors[name].grad[1, 2] = torch.nan
            r.optimizer.step()
    assert [row.skipped for row in run.optimizer.report()] == [row.skipped for row in plain.optimizer.report()]
    assert sum(row.skipped for row in run.optimizer.report()) > 0


def test_groups_and_a_group_added_later():
    runs = [Run(), Run(capturable=True)]
    for run in runs:
        tensors = [nn.Parameter(randn(3, 5, seed=s)) for s in (1, 2)]
        run.optimizer = MBF([dict(params=[p]) for p in run.tensors.values()], **run.optimizer.defaults)
        run.step()
        run.optimizer.add_param_group(dict(params=tensors, lr=0.1, momentum=0.5, decay=0.5, diagonal_decay=0.9))
        for step in range(3):
            for p in tensors:
                p.grad = randn(3, 5, seed=10 + step)
            run.step()
        run.added = tensors
    for a, b in zip(*(run.added for run in runs), strict=True):
        assert_below((a - b).norm(), 1e-12, "added group")
    assert_same_way(runs[1], runs[0])


def test_a_large_shared_matrix_with_both_intervals_one():
    w = [nn.Parameter(randn(3, 140)) for _ in range(2)]
    options = dict(blocks="row", update_interval=1, factor_interval=1)
    optimizers = [MBF([p], **options, capturable=c) for p, c in zip(w, (False, True), strict=True)]
    for step in range(3):
        for p, optimizer in zip(w, optimizers, strict=True):
            p.grad = randn(3, 140, seed=step + 1)
            optimizer.step()
    assert_below((w[0] - w[1]).norm(), 3000 * torch.finfo(torch.float64).eps * w[0].norm(), "weights")


def test_lr_scheduler():
    runs = [Run(), Run(capturable=True)]
    for run in runs:
        lr = run.group["lr"]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, gamma=0.5)
        for _ in range(3):
            run.step()
            scheduler.step()
        assert float(run.group["lr"]) == 1e-2 / 8
    assert run.group["lr"] is lr
    assert_same_way(runs[1], runs[0])


# ---- options


@pytest.mark.parametrize("name", ["update_interval", "factor_interval"])
def test_intervals_above_one_are_refused(name):
    w = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match=f"{name}.*capturable"):
        MBF([w], capturable=True, **{name: 2})
    MBF([w], capturable=True, **{name: 1})
    optimizer = MBF([w], capturable=True)
    optimizer.param_groups[0][name] = 2
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match="interval.*capturable"):
        optimizer.step()


def test_lazy_intervals_are_refused_by_name():
    tensors = {"small": nn.Parameter(torch.ones(3, 4)), "wide": nn.Parameter(torch.ones(3, 140))}
    with pytest.raises(ValueError, match="interval.*capturable.*10 and 100.*wide"):
        MBF(tensors.items(), blocks="row", capturable=True)
    MBF(tensors.items(), capturable=True)  # segments of 64 are fresh at every step


@pytest.mark.parametrize("name", ["lr", "damping"])
def test_bad_tensors(name):
    w = nn.Parameter(torch.ones(3, 4))
    for bad, error in (
        (torch.ones(2), ValueError),
        (torch.tensor(1), TypeError),
        (torch.tensor(1.0, dtype=torch.float16), TypeError),
        (torch.tensor(-1.0), ValueError),
        (torch.tensor(torch.nan), ValueError),
    ):
        with pytest.raises(error, match=name):
            MBF([w], capturable=True, **{name: bad})
    with pytest.raises(ValueError, match=f"{name}.*on meta.*on cpu"):
        MBF([nn.Parameter(torch.ones(3, 4, device="meta"))], capturable=True, **{name: torch.tensor(1.0)})


def test_without_capturable_tensors_are_read_as_floats():
    plain = Run()
    run = Run()
    run.group.update(lr=torch.tensor(1e-2, dtype=torch.float64), damping=torch.tensor(1e-2, dtype=torch.float64))
    for _ in range(3):
        plain.step()
        run.step()
    for a, b in zip(plain.tensors.values(), run.tensors.values(), strict=True):
        assert_bitwise(a, b)


# ---- checkpoints and copies


@over_forms
@over_partitions
@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_resume(form, partition, before, after):
    """A checkpoint holds numbers and no clocks: it serves either mode, and loading keeps the optimizer's own."""
    options = FORMS[form] | PARTITIONS[partition]
    straight, first = Run(**options), Run(**options, capturable=before)
    for _ in range(3):
        straight.step()
        first.step()
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    resumed = Run(**options | dict(lr=123.0, damping=4.0), capturable=after)
    lr = resumed.group["lr"]
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.group["capturable"] is after
    assert all(float(resumed.group[name]) == straight.group[name] for name in ("lr", "damping"))
    assert resumed.group["lr"] is lr if after else isinstance(resumed.group["lr"], float)
    with torch.no_grad():
        for name, p in first.tensors.items():
            resumed.tensors[name].copy_(p)
    resumed.steps, resumed.path = first.steps, first.path
    for _ in range(3):
        straight.step()
        resumed.step()
    assert_same_way(resumed, straight)


def test_checkpoints_of_both_modes_are_alike():
    plain, run = Run(), Run(capturable=True)
    for r in (plain, run):
        for _ in range(3):
            r.step()
    ours, theirs = (r.optimizer.state_dict()["state"] for r in (run, plain))
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        assert {name: type(value) for name, value in other.items()}.items() <= {
            name: type(value) for name, value in mine.items()
        }.items()
        assert mine.get("step") == other.get("step") and "clock" not in mine


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_copies_go_their_own_way(duplicate):
    run, plain = Run(capturable=True), Run()
    for r in (run, plain):
        r.step()
    other = duplicate(run)
    for r in (run, other, other, plain):
        r.step()
    assert_same_way(run, plain)
    plain.step()
    assert_same_way(other, plain)
    assert len({id(state["clock"]) for state in other.optimizer.state.values() if "clock" in state}) == 1


def test_the_flag_may_change_between_steps():
    plain, run = Run(), Run()
    for capturable in (False, True, True, False, True):
        run.group["capturable"] = capturable
        plain.step()
        run.step()
    assert_same_way(run, plain)


# ---- nothing on the host: meta tensors have no values, so reading one raises


class OneDevice(TorchDispatchMode):
    """Refuses operations that take or give a tensor elsewhere: copies to the device, and from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        elsewhere = {t.device.type for t in leaves if isinstance(t, torch.Tensor)} - {"meta"}
        if func.namespace != "profiler":
            assert not elsewhere, f"{func} on {elsewhere}"
        return result


def python_numbers(optimizer):
    on_device = torch.Tensor | SymmetricBlocks | DeviceClock
    return [
        {name: copy.copy(value) for name, value in state.items() if not isinstance(value, on_device)}
        for state in optimizer.state.values()
    ]


@over_forms
@over_partitions
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_reads_nothing_on_the_host(monkeypatch, form, partition, capturable):
    """In both modes; capturable, no number of Python changes either. The first step may allocate and copy."""
    tensors = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in SHAPES.items()}
    options = FORMS[form] | PARTITIONS[partition] | dict(weight_decay=0.1, capturable=capturable)
    optimizer = MBF(tensors.items(), **options)
    if capturable:
        numbers = {name: torch.empty((), device="meta") for name in ("lr", "damping")}
        optimizer.param_groups[0].update(numbers)
    for p in tensors.values():
        p.grad = torch.empty_like(p)
    optimizer.step()
    before = python_numbers(optimizer)
    clocks = [id(state.get("clock")) for state in optimizer.state.values()]
    for name in ("tensor", "as_tensor", "from_numpy"):  # a copy from the host that the dispatcher does not show
        monkeypatch.setattr(torch, name, None)
    with OneDevice():
        optimizer.step()
    monkeypatch.undo()
    assert (python_numbers(optimizer) == before) == capturable
    assert not capturable or [id(state.get("clock")) for state in optimizer.state.values()] == clocks


@pytest.mark.parametrize("options", [dict(), dict(graft=True, relative=True, nesterov=True)], ids=str)
@pytest.mark.parametrize("size", [9, 25])
def test_the_reference_reads_nothing_on_the_host(options, size):
    def blocks():
        return SymmetricBlocks.zeros(5, size, device="meta")

    g, number = torch.empty(5, size, device="meta"), torch.empty((), device="meta")
    flags = dict(relative=False, graft=False, nesterov=False, maximize=False, update=True, refactor=True) | options
    step = StepOptions(lr=number, momentum=0.9, decay=0.9, damping=number, weight_decay=0.1, eps=1e-8, **flags)
    reference.factor(blocks(), number, True)  # fills caches
    with OneDevice():
        reference.accumulate_(blocks(), g[None], 0.9)
        lower, _ = reference.factor(blocks(), number, step.relative)
        reference.solve(lower, g[..., None])
        reference.accumulate_factor_solve_(blocks(), g, g, 0.9, number, step.relative)
        skipped = torch.empty((), dtype=torch.int64, device="meta")
        reference.mbf_step_([g], [g], [g], [blocks()], [blocks()], [skipped], [number], [number], step)


# ---- capture


def test_capture_is_refused_where_it_would_go_wrong(monkeypatch):
    """Without capturable; where state would be allocated inside; where a clock would be split inside."""
    plain, fresh, loaded, run = Run(), *(Run(capturable=True) for _ in range(3))
    plain.step()
    run.step()
    loaded.optimizer.load_state_dict(run.optimizer.state_dict())
    before = [p.detach().clone() for p in run.tensors.values()]
    for r in (plain, fresh, loaded, run):
        r.load(drop=("conv.weight",) if r is run else ())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for r, expected in ((plain, "capturable=True"), (fresh, "first step"), (loaded, "first step"), (run, "together")):
        with pytest.raises(RuntimeError, match=f"^MBF.step: .*{expected}.*capture"):
            r.optimizer.step()
    for p, b in zip(run.tensors.values(), before, strict=True):
        assert_bitwise(p, b)
    run.load()
    run.optimizer.step()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
KERNELS = [name for name in ("cuda", "triton") if torch.cuda.is_available() and backends()[name] == "available"]
over_kernels = pytest.mark.parametrize("kernels", KERNELS or ["cuda"])


def warm_up(steps):
    """Runs on a side stream what a capture needs to have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)


@needs_cuda
@over_kernels
@over_forms
@over_partitions
@over_dtypes
def test_replays_equal_eager_steps(kernels, form, partition, dtype):
    """k replays of a captured step and k eager steps of the plain optimizer, lr and damping changed on the way."""
    options = FORMS[form] | PARTITIONS[partition] | dict(weight_decay=0.1)
    plain, run = (Run(dtype, "cuda", **options, capturable=capturable) for capturable in (False, True))
    with use_backend(kernels):
        warm_up([run.step] * 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.optimizer.step()
        for _ in range(3):
            plain.step()
        for step in range(5):
            for r in (plain, run):
                if step == 2:
                    set_number(r, "lr", 3e-3)
                    set_number(r, "damping", 0.1)
            plain.step()
            run.load()
            graph.replay()
    torch.cuda.synchronize()
    assert_same_way(run, plain)
    steps = {state["step"] for state in run.optimizer.state_dict()["state"].values() if "step" in state}
    assert steps == {8}
    assert all(row.skipped == 0 for row in run.optimizer.report())


@needs_cuda
@over_kernels
def test_a_captured_training_iteration(kernels):
    """Gradients zeroed in place, forward, backward and step in one graph: the losses of eager training."""

    def build(capturable):
        torch.manual_seed(3)
        layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4)]
        model = nn.Sequential(*layers).to("cuda", torch.float64)
        lr = torch.tensor(1e-2, dtype=torch.float64, device="cuda") if capturable else 1e-2
        return model, MBF(model.named_parameters(), lr=lr, segment=16, capturable=capturable)

    x, target = torch.empty(8, 2, 6, 6, dtype=torch.float64).cuda(), torch.empty(8, 4, dtype=torch.float64).cuda()

    def load(step):
        x.copy_(randn(*x.shape, seed=2 * step))
        target.copy_(randn(*target.shape, seed=2 * step + 1))

    def iterate(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    def eager_step(model, optimizer, step):
        load(step)
        return iterate(model, optimizer)

    with use_backend(kernels):
        plain, captured = build(False), build(True)
        warm_up([lambda step=step: eager_step(*captured, step) for step in range(3)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = iterate(*captured)
        expected = [float(eager_step(*plain, step)) for step in range(8)][3:]
        actual = []
        for step in range(3, 8):
            load(step)
            graph.replay()
            actual.append(float(loss))
    assert_below((torch.tensor(actual) - torch.tensor(expected)).abs(), 1e-9 * max(expected), "loss")
    for a, b in zip(captured[0].parameters(), plain[0].parameters(), strict=True):
        assert_below((a - b).norm().cpu(), 1e-9 * float(b.norm()) + 1e-9, "weights")


@needs_cuda
@over_kernels
@over_forms
@over_partitions
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_does_not_wait_for_the_device(kernels, form, partition, capturable):
    run = Run(torch.float32, "cuda", **FORMS[form] | PARTITIONS[partition], capturable=capturable)
    with use_backend(kernels):
        for _ in range(2):
            run.step()
        run.load()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
