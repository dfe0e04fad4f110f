"""MBF over several processes: what they step together is what one process steps alone.

Every process computes the gradients of all data, so that those of one process and of many differ by rounding at most:
what differs is where parameters lie.
"""

import math

import pytest
import torch
from mbf_optim import MBF
from processes import run
from test_mbf import FORMS, PARTITIONS
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mbf_kernels.testing import assert_relative, randn

STEPS = 4
# Rounding differs by the order of sums alone: eps = 2e-16, 4 steps, condition numbers up to 1/damping + 1 = 101.
TOLERANCE = 1e-9
PROCESSES = (2,), (3,), (4,), (2, 2)  # the last: HSDP, two replicas of two shards
CASES = {
    f"{form}, {partition}": FORMS[form] | PARTITIONS[partition] | dict(lr=1e-2, damping=1e-2, weight_decay=0.1)
    for form in FORMS
    for partition in PARTITIONS
}
CASES["grafted, grid of rows"] = CASES["grafted, grid"] | dict(grid=(2, 4))
CASES["grafted, auto, old factors"] = CASES["grafted, auto"] | dict(update_interval=2, factor_interval=3)
CASES["paper, auto, old factors"] = CASES["paper, auto"] | dict(update_interval=2, factor_interval=3)


def network(case):
    """Of every structure; 10, 6 and 2 outputs on up to 4 processes: uneven shards, and empty ones."""
    torch.manual_seed(0)
    if "grid of rows" in case:
        layers = nn.Flatten(), nn.Linear(84, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)
        return nn.Sequential(*layers).double()
    layers = [
        nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 10, 1, bias=False), nn.Tanh(),
        nn.Conv2d(10, 4, (2, 3)), nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 2), nn.Tanh(),
        nn.Linear(2, 2, bias=False),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


def backward(model, step):
    """Gradients of a regression batch that depends on the step alone."""
    y = model(randn(8, 2, 6, 7, seed=step))
    (y - randn(*y.shape, seed=100 + step)).square().mean().backward()


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def shard(model, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outcome(model, optimizer):
    """Weights and states, whole, by name."""
    states = optimizer.state_dict()["state"]
    named = enumerate(model.named_parameters())
    return [
        (name, whole(p), {entry: whole(value) for entry, value in states.get(i, {}).items()}) for i, (name, p) in named
    ]


def alone(case, steps=range(STEPS)):
    model = network(case)
    optimizer = MBF(model.named_parameters(), **CASES[case])
    train(model, optimizer, steps)
    return outcome(model, optimizer)


def assert_same(found, expected, case, tolerance=TOLERANCE):
    for (name, weight, state), (_, true_weight, true_state) in zip(found, expected, strict=True):
        assert_relative(weight, true_weight, tolerance, f"{case}: {name}")
        assert state.keys() == true_state.keys(), f"{case}: {name}"
        for entry, value in state.items():
            assert value.dtype == true_state[entry].dtype
            assert_relative(value.double(), true_state[entry].double(), tolerance, f"{case}: {name}, {entry}")


def together(mesh_shape):
    outcomes = {}
    for case, options in CASES.items():
        model = shard(network(case), mesh_shape)
        optimizer = MBF(model.named_parameters(), **options)
        for param in model.parameters():
            assert isinstance(param, DTensor)
        train(model, optimizer)
        outcomes[case] = outcome(model, optimizer)
    return outcomes


@pytest.mark.parametrize("mesh", PROCESSES, ids=str)
def test_fully_shard_equals_one_process(mesh):
    """Every form and partition, weights and states."""
    for outcomes in run(math.prod(mesh), together, mesh, timeout=300):
        for case, found in outcomes.items():
            assert_same(found, alone(case), case)


# ---- any placements

LINEAR = {"x.weight": (6, 7), "x.bias": (6,)}
CONVOLUTION = {"x.weight": (6, 4, 3), "x.bias": (6,)}
SHAPES = {case: CONVOLUTION if "filter" in case else LINEAR for case in CASES if "rows" not in case}
PLACES = [
    [[Shard(1)], [Replicate()]],
    [[Shard(0)], [Replicate()]],
    [[Shard(0), Shard(1)], [Shard(0), Replicate()]],
    [[Shard(0), Shard(0)], [Shard(0), Shard(0)]],
    [[Replicate(), Replicate()], [Replicate(), Shard(0)]],
]


def step_with_given_gradients(case, place):
    params = [
        (name, nn.Parameter(place(randn(*shape, seed=i), i))) for i, (name, shape) in enumerate(SHAPES[case].items())
    ]
    optimizer = MBF(params, **CASES[case])
    for step in range(STEPS):
        for i, (_, p) in enumerate(params):
            p.grad = place(randn(*p.shape, seed=10 * step + 50 + i), i)
        optimizer.step()
    return [whole(p) for _, p in params]


def placed(places):
    mesh = init_device_mesh("cpu", (2, 2)[: len(places[0])])
    return {
        case: step_with_given_gradients(case, lambda x, i: distribute_tensor(x, mesh, places[i])) for case in SHAPES
    }


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_other_placements_equal_one_process(places):
    """Tensor parallelism's: mini-blocks may straddle shards, and a bias may lie elsewhere than its weight."""
    for outcomes in run(2 ** len(places[0]), placed, places, timeout=300):
        for case, found in outcomes.items():
            for weight, expected in zip(found, step_with_given_gradients(case, lambda x, i: x), strict=True):
                assert_relative(weight, expected, TOLERANCE, case)


def summed(x, mesh):
    """As parts that add up to it, one on each process."""
    share = distributed.get_rank() + 1
    return DTensor.from_local(share / sum(range(1, mesh.size() + 1)) * x, mesh, [Partial()])


def elsewhere(case, gradient_as):
    """Gradients that do not lie as their parameters do, as those of sequence parallelism; many layers of one size."""
    params = [nn.Parameter(randn(6, 7, seed=i)) for i in range(4)] + [nn.Parameter(randn(6, seed=9)) for i in range(4)]
    if distributed.is_initialized():
        mesh = init_device_mesh("cpu", (2,))
        lies = Replicate() if gradient_as == "sums" else Shard(0)
        params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [lies])) for p in params]
    optimizer = MBF([dict(params=[p]) for p in params], **CASES[case])
    for step in range(STEPS):
        for i, p in enumerate(params):
            grad = randn(*p.shape, seed=100 * step + i)
            if not distributed.is_initialized():
                p.grad = grad
            elif gradient_as == "sums":
                p.grad = summed(grad, mesh)
            else:
                p.grad = distribute_tensor(grad, mesh, [Replicate()])
        optimizer.step()
    return [whole(p) for p in params]


@pytest.mark.parametrize("gradient_as", ["sums", "whole"])
@pytest.mark.parametrize("case", ["grafted, auto", "grafted, segment, own", "grafted, column", "paper, auto"])
def test_gradients_that_lie_elsewhere(case, gradient_as):
    for found in run(2, elsewhere, case, gradient_as):
        for weight, expected in zip(found, elsewhere(case, gradient_as), strict=True):
            assert_relative(weight, expected, TOLERANCE, case)


# ---- the rest of a step's life


def bad_gradient(case, bad):
    """One element on one process."""
    model = network(case) if not distributed.is_initialized() else shard(network(case), (2,))
    optimizer = MBF(model.named_parameters(), **CASES[case])
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        if step == 1:
            for grad in (
                p.grad for p in model.parameters() if p.ndim == 2
            ):  # which have mini-blocks in all these cases
                if not isinstance(grad, DTensor):
                    grad.view(-1)[0] = bad
                elif distributed.get_rank() == 0:
                    grad.to_local().view(-1)[0] = bad
        optimizer.step()
    return outcome(model, optimizer)


@pytest.mark.parametrize("case", ["grafted, auto", "grafted, column, own", "paper, auto", "grafted, segment, own"])
def test_a_bad_gradient_is_skipped_and_counted_as_in_one_process(case):
    expected = bad_gradient(case, math.nan)
    for found in run(2, bad_gradient, case, math.nan):
        assert_same(found, expected, case)
        assert all(int(state["skipped"].sum()) > 0 for _, weight, state in found if weight.ndim == 2)


def observed(case):
    model = network(case) if not distributed.is_initialized() else shard(network(case), (2,))
    optimizer = MBF(model.named_parameters(), **CASES[case])
    for step in range(50, 53):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.observe()
    train(model, optimizer)
    return outcome(model, optimizer)


@pytest.mark.parametrize("case", ["grafted, auto", "grafted, column", "paper, row"])
def test_observed_first(case):
    for found in run(2, observed, case):
        assert_same(found, observed(case), case)


def half_with_masters():
    model = network("grafted, auto").bfloat16()
    if distributed.is_initialized():
        mesh = init_device_mesh("cpu", (2,))
        for name, p in list(model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    optimizer = MBF(model.named_parameters(), lr=1e-2, damping=1e-2, master_weights=True)
    for step in range(STEPS):
        for i, p in enumerate(model.parameters()):
            grad = randn(*p.shape, seed=10 * step + i).bfloat16()
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
    return outcome(model, optimizer)


def test_low_precision_sharded():
    """Sums of 6 outputs' squares in another order: float32's rounding, times the condition number of 101, 4 steps."""
    expected = half_with_masters()
    tolerance = 4 * 101 * 6 * torch.finfo(torch.float32).eps
    for found in run(2, half_with_masters):
        for (name, _, state), (_, _, true_state) in zip(found, expected, strict=True):
            assert state["master"].dtype == torch.float32
            assert_relative(state["master"].double(), true_state["master"].double(), tolerance, name)


def bfloat16_step(mesh_shape, option):
    """The weights after one, or their masters."""
    shapes = {"conv.weight": (6, 4, 3), "linear.weight": (10, 8), "linear.bias": (10,)}
    values = {name: randn(*shape, seed=i).bfloat16() for i, (name, shape) in enumerate(shapes.items())}
    grads = {name: randn(*shape, seed=10 + i).bfloat16() for i, (name, shape) in enumerate(shapes.items())}
    place = torch.clone
    if mesh_shape:
        mesh = init_device_mesh("cpu", mesh_shape)
        place = lambda x: distribute_tensor(x, mesh, [Replicate(), Shard(0)])  # noqa: E731
    params = {name: nn.Parameter(place(value)) for name, value in values.items()}
    for name, param in params.items():
        param.grad = place(grads[name])
    optimizer = MBF(params.items(), lr=1e-3, damping=0.1, **{option: True})
    optimizer.step()
    return {name: whole(optimizer.state[param].get("master", param)) for name, param in params.items()}


def test_stochastic_rounding_sharded():
    """Copies of the model stay alike; each weight goes to a neighbour of the exact value, not always the nearest."""
    exact = bfloat16_step((), "master_weights")
    first, *others = run(4, bfloat16_step, (2, 2), "stochastic_rounding")
    assert len(others) == 3
    elsewhere = 0
    for name, value in exact.items():
        for other in others:
            assert torch.equal(first[name], other[name])
        unit = torch.finfo(torch.bfloat16).eps * 2.0 ** value.abs().log2().floor()
        assert ((first[name].float() - value).abs() < unit * (1 + 1e-3)).all()  # float32's sums in another order
        elsewhere += (first[name] != value.bfloat16()).sum().item()
    assert elsewhere > 10  # of 162


def sharded_and_plain():
    """A model of which a part is left out of the sharding."""
    model = network("grafted, auto")
    if distributed.is_initialized():
        for layer in list(model)[-3:]:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = MBF(model.named_parameters(), lr=1e-2, damping=1e-2)
    train(model, optimizer)
    assert len({isinstance(p, DTensor) for p in model.parameters()}) == 1 + distributed.is_initialized()
    return outcome(model, optimizer)


def test_sharded_parameters_beside_plain_ones():
    for found in run(2, sharded_and_plain):
        assert_same(found, sharded_and_plain(), "mixed")


def refusals():
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(
        TypeError, match=r"^MBF: expected sharded or replicated parameters, got .*Partial.* for param 0"
    ):
        MBF([nn.Parameter(DTensor.from_local(torch.ones(3, 3), mesh, [Partial()]))])
    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(nn.Linear(6, 6), use_orig_params=use_orig_params, device_id="cpu")
        with pytest.raises(TypeError, match="^MBF: expected parameters in their own shapes, got .* use .*fully_shard"):
            MBF(model.parameters())


def test_refusals():
    run(2, refusals)
