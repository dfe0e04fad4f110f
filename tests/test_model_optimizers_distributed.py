"""The optimizers that look at layers, in several processes: replicas stay alike, and see what one process would see."""

import copy
import io

import processes
import pytest
import torch
from mbf_optim import KBFGS, KFAC
from mbf_optim.triangles import packed, unpacked
from test_model_optimizer import KINDS, QUASI
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mbf_kernels.testing import assert_bitwise, randn

ALL = KINDS | QUASI | {"KFAC, SUA": lambda model, **options: KFAC(model, spatially_uncorrelated=True, **options)}
over_all = pytest.mark.parametrize("kind", ALL)
ONE_OF_EACH = ["KFAC, exact", "KPSVD, lanczos", "two-level", "two-level, additive", "AdaFisher", "KBFGS"]
over_methods = pytest.mark.parametrize("kind", ONE_OF_EACH)
NETWORKS = {
    "linear": (lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)], (4,)),
    "sequences": (lambda: [nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)], (3, 4)),
    "convolutions": (
        lambda: [
            *(nn.Conv2d(2, 4, 2, padding=1), nn.BatchNorm2d(4).eval(), nn.Tanh()),
            *(nn.Conv2d(4, 4, 2, groups=2, stride=2), nn.Flatten(), nn.Linear(16, 3)),
        ],
        (2, 4, 3),
    ),
}
STEPS, SAMPLES = 4, 12


def net(network="linear"):
    torch.manual_seed(0)
    return nn.Sequential(*NETWORKS[network][0]()).double()


def batches(network="linear", sizes=(SAMPLES,), steps=STEPS):
    """Of every step the parts, inputs and targets."""
    for t in range(steps):
        inputs = randn(sum(sizes), *NETWORKS[network][1], dtype=torch.float64, seed=t)
        targets = inputs.flatten(1)[:, :3].sin()
        yield list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def loss_of(outputs, targets):
    return (outputs.flatten(1)[:, :3] - targets).square().sum(1).mean()


def options_of(kind):
    every_other = {} if "KBFGS" in kind else {"update_interval": 2}
    exact = {"tolerance": 1e-12} if "KPSVD" in kind else {}  # starts are random, and of other samples others
    return {"lr": 0.02} | every_other | exact


def train(model, optimizer, steps):
    """Of the parts a process takes its own; one alone takes all, and accumulates."""
    for parts in steps:
        mine = [parts[distributed.get_rank()]] if distributed.is_initialized() else parts

        def closure(mine=mine):
            optimizer.zero_grad()
            for inputs, targets in mine:
                loss = loss_of(model(inputs), targets) / len(mine)
                loss.backward()
            return loss

        optimizer.step(closure)


def replica(model, **options):
    return DistributedDataParallel(model, **options) if distributed.is_initialized() else model


def kept_by(model, optimizer):
    """Eigenvectors are known up to their signs."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = {
        index: {name: copy.deepcopy(value) for name, value in optimizer.state[param].items() if "_vectors" not in name}
        for index, param in enumerate(params)
    }
    return {"weights": model.state_dict(), "state": state}


def trained(kind, network, steps):
    model = net(network)
    optimizer = ALL[kind](model, **options_of(kind))
    train(replica(model), optimizer, steps)
    return kept_by(model, optimizer)


def assert_same(a, b, close=assert_bitwise):
    """Of nested dictionaries."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key], close)
        elif isinstance(value, torch.Tensor):
            close(value, b[key])
        else:
            assert value == b[key], key


def assert_close(a, b):
    """Sums in another order, and what a few steps make of it."""
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def run(world_size, function, *args):
    """What all replicas have alike."""
    first, *others = processes.run(world_size, function, *args)
    for other in others:
        assert_same(first, other)
    return first


# ------------------------------------------------------------------ what is the same as in one process


@over_all
@pytest.mark.parametrize("network", NETWORKS)
def test_processes_with_equal_parts_are_one_with_all(kind, network):
    parts, whole = list(batches(network, (6, 6))), list(batches(network, (12,)))
    assert_same(run(2, trained, kind, network, parts), trained(kind, network, whole), assert_close)


@over_methods
def test_three_processes(kind):
    parts, whole = list(batches(sizes=(4, 4, 4))), list(batches())
    assert_same(run(3, trained, kind, "linear", parts), trained(kind, "linear", whole), assert_close)


@pytest.mark.parametrize("kind", [kind for kind in ALL if "Ada" not in kind and "kfac_corrected" not in kind])
@pytest.mark.parametrize("network", ["linear", "convolutions"])
def test_processes_count_alike(kind, network):
    """Whatever they have: the samples of one with half as many as the other might as well come twice. (The A of KPSVD's
    "kfac_corrected" does not know of that.)"""
    parts = list(batches(network, (2, 4)))
    doubled = [[tuple(torch.cat([x, x, y]) for x, y in zip(*step, strict=True))] for step in parts]
    one = trained(kind, network, doubled)
    assert_same(run(2, trained, kind, network, parts)["weights"], one["weights"], assert_close)


@pytest.mark.parametrize("kind", ["AdaFisher", "AdaFisherW"])
@pytest.mark.parametrize("network", NETWORKS)
def test_adafisher_sees_one_accumulated_gradient(kind, network):
    parts = list(batches(network, (2, 4)))
    assert_same(run(2, trained, kind, network, parts), trained(kind, network, parts), assert_close)


@over_all
def test_sequences_of_different_lengths(kind):
    """Other numbers of locations in every process, and as many samples."""
    steps = list(batches("sequences", (6, 6)))
    parts = [[(a[:, :2], x), (torch.cat([b, b.cos()], 1), y)] for (a, x), (b, y) in steps]
    assert_same(run(2, trained, kind, "sequences", parts), trained(kind, "sequences", parts), assert_close)


def accumulating(kind, steps):
    """Two passes for each step, the first without synchronization."""
    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    parallel = replica(model)
    for parts in steps:

        def closure(parts=parts):
            optimizer.zero_grad()
            first, second = parts[2 * distributed.get_rank() :][:2]
            with parallel.no_sync():
                (loss_of(parallel(first[0]), first[1]) / 2).backward()
            (loss_of(parallel(second[0]), second[1]) / 2).backward()

        optimizer.step(closure)
    return kept_by(model, optimizer)


@over_methods
def test_an_accumulated_gradient(kind):
    parts, whole = list(batches(sizes=(3, 3, 3, 3))), list(batches())
    assert_same(run(2, accumulating, kind, parts), trained(kind, "linear", whole), assert_close)


def residual_of_samples(outputs):
    """As if it had been drawn."""
    return outputs.sin() - 0.5


def with_a_distribution(kind, steps):
    model = net()
    optimizer = ALL[kind](model, distribution=residual_of_samples, **options_of(kind))
    train(replica(model), optimizer, steps)
    return kept_by(model, optimizer)


@pytest.mark.parametrize("kind", ["KFAC", "KPSVD, lanczos", "two-level"])
def test_a_distribution_of_targets(kind):
    parts, whole = list(batches(sizes=(6, 6))), list(batches())
    assert_same(run(2, with_a_distribution, kind, parts), with_a_distribution(kind, whole), assert_close)


def drawing(kind, steps):
    model = net()
    optimizer = ALL[kind](model, distribution="gaussian", **options_of(kind))
    torch.manual_seed(distributed.get_rank())
    train(replica(model), optimizer, steps)
    return kept_by(model, optimizer)


@pytest.mark.parametrize("kind", ["KFAC", "KPSVD, lanczos", "two-level", "two-level, additive"])
def test_replicas_that_draw_targets_stay_alike(kind):
    run(2, drawing, kind, list(batches(sizes=(6, 6))))


def scaled(kind, steps, overflow=None):
    """Under a GradScaler; the gradient of one process overflows in one step."""
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = ALL[kind](model, grad_scaler=scaler, **options_of(kind))
    parallel = replica(model)
    for t, parts in enumerate(steps):
        inputs, targets = parts[distributed.get_rank() if distributed.is_initialized() else 0]
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(parallel(inputs), targets))
        (loss * float("inf") if (t, parts[-1][0] is inputs) == (overflow, True) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return kept_by(model, optimizer) | {"scale": scaler.get_scale()}


@pytest.mark.parametrize("kind", ["KFAC", "KPSVD, lanczos", "two-level", "AdaFisher"])
@pytest.mark.parametrize("overflow", [None, 0, 2])
def test_a_gradient_that_overflows_in_one_process(kind, overflow):
    parts, whole = list(batches(sizes=(6, 6))), list(batches())
    found = run(2, scaled, kind, parts, overflow)
    assert_same(found, scaled(kind, whole, overflow), assert_close)
    assert found["scale"] == 2.0 ** (10 if overflow is None else 9)


# ------------------------------------------------------------------ what processes have that others have not


class Branching(nn.Module):
    """The second layer sees the samples of some processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, x, branch):
        x = self.first(x).tanh()
        return self.last(self.second(x).tanh() if branch else x)


def branching(kind, processes_with_a_branch, steps):
    model = Branching()
    optimizer = ALL[kind](model, **options_of(kind))
    parallel = replica(model, find_unused_parameters=True)
    for parts in steps:

        def closure(parts=parts):
            optimizer.zero_grad()
            rank = distributed.get_rank() if distributed.is_initialized() else 0
            inputs, targets = parts[rank]
            loss = loss_of(parallel(inputs, rank in processes_with_a_branch), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    return kept_by(model, optimizer)


@over_methods
@pytest.mark.parametrize("where", [(1,), (0,), (), (0, 2)])
def test_a_layer_that_some_processes_do_not_use(kind, where):
    found = run(3, branching, kind, where, list(batches(sizes=(4, 4, 4))))["state"]
    assert ("updates" in found[2]) == bool(where)  # of the second layer's weight


def test_statistics_of_a_layer_are_those_of_the_processes_that_use_it():
    (parts,) = batches(sizes=(4, 4, 4), steps=1)
    both = tuple(torch.cat([x, y]) for x, y in zip(parts[0], parts[2], strict=True))
    three, one = run(3, branching, "KFAC", (0, 2), [parts]), branching("KFAC", (0,), [[both]])
    for name in ("A", "G"):
        assert_close(three["state"][2][name], one["state"][2][name])


def evaluating(kind, blind, steps):
    """Layers in evaluation mode are not looked at; their gradients count."""
    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    parallel = replica(model)
    if distributed.get_rank() in blind:
        parallel.eval()
    train(parallel, optimizer, steps)
    return kept_by(model, optimizer)


@over_methods
@pytest.mark.parametrize("blind", [(0,), (1,), (0, 1)])
def test_processes_that_see_nothing(kind, blind):
    found = run(2, evaluating, kind, blind, list(batches(sizes=(6, 6))))["state"]
    assert ("updates" in found[0]) == (len(blind) < 2)


def spoiled(kind, spoil, steps):
    """One process's statistics cannot be used, though its gradients can."""
    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    parallel = replica(model)
    for t, parts in enumerate(steps):

        def closure(t=t, parts=parts):
            optimizer.zero_grad()
            inputs, targets = parts[distributed.get_rank()]
            loss = loss_of(parallel(inputs), targets)
            loss.backward()
            if t == 0 and distributed.get_rank() == 1:
                spoil(inputs)
            return loss

        optimizer.step(closure)
    return kept_by(model, optimizer)


def overwrite(inputs):
    inputs.add_(1)


def make_infinite(inputs):
    with torch.no_grad():
        inputs.data.fill_(float("inf"))  # which no version tells


@over_methods
@pytest.mark.parametrize("spoil", [overwrite, make_infinite])
def test_what_one_process_leaves_out_all_count(kind, spoil):
    found = run(2, spoiled, kind, spoil, list(batches(sizes=(6, 6))))["state"]
    assert found[0]["skipped"] >= 1 and found[0]["updates"] >= 1


# ------------------------------------------------------------------ which processes


def of_a_wrapper(kind, steps):
    model = net()
    parallel = replica(model)
    optimizer = ALL[kind](parallel, **options_of(kind))
    assert [row.name for row in optimizer.report()] == ["0.weight + bias", "2.weight + bias"]
    train(parallel, optimizer, steps)
    return kept_by(model, optimizer)


@over_methods
def test_what_data_parallel_makes_of_a_model_stands_for_it(kind):
    parts = list(batches(sizes=(6, 6)))
    assert_same(run(2, of_a_wrapper, kind, parts), run(2, trained, kind, "linear", parts))


def in_pairs(kind, steps, wrapped):
    """Two models, each of two processes; of the second pair other batches, twice as large."""
    rank = distributed.get_rank()
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    model = net()
    parallel = DistributedDataParallel(model, process_group=pairs[rank // 2])
    if wrapped:
        optimizer = ALL[kind](parallel, **options_of(kind))
    else:
        optimizer = ALL[kind](model, process_group=pairs[rank // 2], **options_of(kind))
    train(parallel, optimizer, steps)
    return kept_by(model, optimizer)


@over_methods
@pytest.mark.parametrize("wrapped", [False, True])
def test_groups_of_processes(kind, wrapped):
    found = processes.run(4, in_pairs, kind, list(batches(sizes=(3, 3, 6, 6), steps=2)), wrapped)
    for pair, sizes in ((found[:2], (3, 3)), (found[2:], (6, 6))):
        assert_same(*pair)
        steps = [parts[:2] if sizes == (3, 3) else parts[2:] for parts in batches(sizes=(3, 3, 6, 6), steps=2)]
        whole = [[tuple(torch.cat([x, y]) for x, y in zip(*parts, strict=True))] for parts in steps]
        assert_same(pair[0], trained(kind, "linear", whole), assert_close)


def alone(kind, steps):
    model = net()
    group, _ = distributed.new_subgroups(1)
    optimizer = ALL[kind](model, process_group=group, **options_of(kind))
    train(model, optimizer, steps)
    return kept_by(model, optimizer)


@over_methods
def test_processes_with_models_of_their_own(kind):
    steps = list(batches(sizes=(6, 6)))
    for rank, found in enumerate(processes.run(2, alone, kind, steps)):
        assert_same(found, trained(kind, "linear", [[parts[rank]] for parts in steps]))


def of_different_models(kind):
    model = nn.Linear(4, 3 + distributed.get_rank()).double()
    optimizer = ALL[kind](model, **options_of(kind))
    before = copy.deepcopy(model.state_dict())

    def closure():
        loss = model(torch.ones(2, 4).double()).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="expected the 2 processes of the group to train the same layers"):
        optimizer.step(closure)
    assert_same(dict(model.state_dict()), dict(before))


@over_methods
def test_processes_of_different_models_are_refused(kind):
    processes.run(2, of_different_models, kind)


@over_all
def test_a_group_that_is_none_is_refused(kind):
    with pytest.raises(TypeError, match="expected process_group to be a torch.distributed.ProcessGroup"):
        ALL[kind](net(), process_group="all")


# ------------------------------------------------------------------ what is sent


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 130])
def test_triangles(size):
    matrix = randn(2, size, size, dtype=torch.float64)
    matrix = matrix + matrix.mT
    assert packed(matrix).numel() == size * (size + 1)  # of two
    assert_bitwise(unpacked(packed(matrix)), matrix)


def messages(kind, steps):
    """What a step reduces, in numbers."""
    sent = []
    all_reduce = distributed.all_reduce

    def counting(tensor, **options):
        sent[-1].append(tensor.numel())
        all_reduce(tensor, **options)

    distributed.all_reduce = counting
    model = net("linear")
    optimizer = ALL[kind](model, **options_of(kind))
    parallel = replica(model)
    for parts in steps:
        sent.append([])
        train(parallel, optimizer, [parts])
    return {"sent": sent}


def test_triangles_of_all_layers_are_one_message():
    found = run(2, messages, "KFAC", list(batches(sizes=(6, 6))))["sent"]
    assert found == [[15 + 15 + 21 + 6], [], [15 + 15 + 21 + 6], []]  # A and G of either layer: 5, 5, 6 and 3 wide


# ------------------------------------------------------------------ states


def resumed(kind, steps, how):
    """Stopped after half the steps: what one process saved all load."""
    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    train(replica(model), optimizer, steps[: len(steps) // 2])
    file = io.BytesIO()
    saved = get_optimizer_state_dict(model, optimizer) if how == "by name" else optimizer.state_dict()
    torch.save((model.state_dict(), saved), file)
    contents = [file.getvalue()]
    distributed.broadcast_object_list(contents, src=1)
    weights, saved = torch.load(io.BytesIO(contents[0]), weights_only=True)

    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    model.load_state_dict(weights)
    if how == "by name":
        set_optimizer_state_dict(model, optimizer, saved)
    else:
        optimizer.load_state_dict(saved)
    train(replica(model), optimizer, steps[len(steps) // 2 :])
    return kept_by(model, optimizer)


@over_methods
@pytest.mark.parametrize("how", ["by number", "by name"])
def test_processes_that_resume_go_on_as_if_they_had_not_stopped(kind, how):
    parts = list(batches(sizes=(6, 6), steps=7))
    assert_same(run(2, resumed, kind, parts, how), run(2, trained, kind, "linear", parts))


def from_a_checkpoint(kind, steps, folder, new):
    """Of torch.distributed.checkpoint, which fills in what an optimizer has: a new one, or after a first step."""
    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    train(replica(model), optimizer, steps[: len(steps) // 2])
    checkpoint.save(
        {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )
    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    if not new:
        train(replica(model), optimizer, steps[:1])
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(replica(model), optimizer, steps[len(steps) // 2 :])
    return kept_by(model, optimizer)


@over_all
def test_statistics_lie_row_by_row(kind):
    """Columns of LAPACK's, or gaps, would be lost in a checkpoint: other bits of products, or what is broadcast."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(24, 140), nn.Tanh(), nn.Linear(140, 3)
    ).double()
    optimizer = ALL[kind](model, lr=1e-3, **({"memory": 2} if kind == "KBFGSL" else {}))
    for t in range(3):

        def closure(t=t):
            optimizer.zero_grad()
            loss = loss_of(model(randn(6, 2, 4, 3, dtype=torch.float64, seed=t)), torch.ones(6, 3).double())
            loss.backward()
            return loss

        optimizer.step(closure)
    found = {name: value for state in optimizer.state.values() for name, value in state.items()}
    assert all(value.is_contiguous() for value in found.values() if isinstance(value, torch.Tensor))


ALL_BUT_TWO_LEVEL = [kind for kind in ALL if not kind.startswith("two-level")]


@pytest.mark.parametrize("kind", ALL_BUT_TWO_LEVEL)
def test_a_checkpoint_is_filled_in_by_a_new_optimizer(kind, tmp_path):
    parts = list(batches(sizes=(6, 6), steps=7))
    found = run(2, from_a_checkpoint, kind, parts, str(tmp_path), True)
    assert_same(found, run(2, trained, kind, "linear", parts))


@pytest.mark.parametrize("kind", ["two-level", "two-level, additive"])
def test_samples_in_a_checkpoint_are_filled_in_after_a_first_step(kind, tmp_path):
    """How many there are no new optimizer knows."""
    parts = list(batches(sizes=(6, 6), steps=7))
    with pytest.raises(ValueError, match="expected a state of .* tensors in a group, got .* take a step before"):
        run(2, from_a_checkpoint, kind, parts, str(tmp_path), True)
    found = run(2, from_a_checkpoint, kind, parts, str(tmp_path), False)
    assert_same(found, run(2, trained, kind, "linear", parts))


def from_one_file(kind, steps, broadcast):
    """The whole state, from all processes or from the first one, into a new optimizer."""
    model = net()
    optimizer = ALL[kind](model, **options_of(kind))
    train(replica(model), optimizer, steps[: len(steps) // 2])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    twin = copy.deepcopy(model)
    optimizer = ALL[kind](twin, **options_of(kind))
    here = {} if broadcast and distributed.get_rank() else saved
    set_optimizer_state_dict(twin, optimizer, here, options=options)
    train(replica(twin), optimizer, steps[len(steps) // 2 :])
    return kept_by(twin, optimizer)


@pytest.mark.parametrize("kind", ALL_BUT_TWO_LEVEL)
@pytest.mark.parametrize("broadcast", [False, True])
def test_a_whole_state_in_a_new_optimizer(kind, broadcast):
    parts = list(batches(sizes=(6, 6), steps=7))
    assert_same(run(2, from_one_file, kind, parts, broadcast), run(2, trained, kind, "linear", parts))


# ------------------------------------------------------------------ what is not supported


def sharded(way):
    for kind in ONE_OF_EACH:
        for first in (True, False):
            check_sharding(kind, way, first)


def check_sharding(kind, way, first):
    """Before the optimizer is made, or after."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    shard = {
        "fully_shard": lambda model: fully_shard(model, mesh=mesh),
        "tensor parallel": lambda model: parallelize_module(
            model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
        ),
        "flat": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        "flat, original": lambda model: FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True
        ),
    }[way]
    kinds = "flattened by FullyShardedDataParallel" if "flat" in way else "a DTensor"
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = None if first else ALL[kind](model, **options_of(kind))
    model = shard(model)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(TypeError, match=f"expected parameters that are whole .* got one that is {kinds}"):
        if first:
            ALL[kind](model, **options_of(kind))
        else:
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step(lambda: 0.0)
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, value)


@pytest.mark.parametrize("way", ["fully_shard", "tensor parallel", "flat", "flat, original"])
def test_sharded_parameters_are_refused(way):
    processes.run(2, sharded, way)


def gradients_in_buckets(steps):
    """Those after a step, and those at the weights before."""
    model = net()
    optimizer = KBFGS(model, lr=0.5)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    kept = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(parallel(inputs), targets)
        loss.backward()
        kept.append([param.grad.clone() for param in model.parameters()])
        return loss

    for parts in steps:
        inputs, targets = parts[distributed.get_rank()]
        kept.clear()
        optimizer.step(closure)
        for param, gradient, other in zip(model.parameters(), *kept, strict=True):
            assert torch.equal(param.grad, gradient) and not torch.equal(param.grad, other)


def test_gradients_in_buckets_are_those_of_the_first_pass():
    processes.run(2, gradients_in_buckets, list(batches(sizes=(6, 6))))
