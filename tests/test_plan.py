"""The plans of MBF: kept from step to step, they never differ from plans made anew, whatever happens in between."""

import collections
import copy
import io
import pickle
import random

import pytest
import torch
from mbf_optim import MBF
from mbf_optim.tasks import Launch
from test_mbf import FORMS, NETWORKS, PARTITIONS, Run
from torch import nn

from mbf_kernels import SymmetricBlocks, use_backend
from mbf_kernels.testing import assert_below, assert_bitwise, randn

SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    "point.weight": (4, 4, 1, 1),
    "linear.weight": (4, 7),
    "linear.bias": (4,),
    "wide.weight": (3, 12),  # no bias column: 12 is a multiple of the segment
    "wide.bias": (3,),
}
OPTIONS = dict(lr=1e-2, damping=1e-2, segment=4)
over_forms = pytest.mark.parametrize("form", FORMS)


class Forgetful(MBF):
    """Makes every plan anew."""

    def step(self, closure=None):
        self._forget()
        return super().step(closure)


class Net:
    """Tensors of every structure, and gradients that depend on the step alone."""

    def __init__(self, optimizer=MBF, groups=1, **options):
        self.tensors = {name: nn.Parameter(randn(*shape, seed=i)) for i, (name, shape) in enumerate(SHAPES.items())}
        named = list(self.tensors.items())
        parts = [named[i::groups] for i in range(groups)] if groups > 1 else [named]
        self.optimizer = optimizer([dict(params=part) for part in parts], **OPTIONS | options)
        self.steps = 0

    def load(self, drop=(), layout=torch.clone):
        self.steps += 1
        for i, (name, p) in enumerate(self.tensors.items()):
            p.grad = None if name in drop else layout(randn(*p.shape, seed=100 * self.steps + i))

    def step(self, drop=()):
        self.load(drop)
        self.optimizer.step()


def assert_twins(a, b):
    """In all that both have: one may have a group more."""
    for p, q in zip(a.tensors.values(), b.tensors.values(), strict=False):
        assert_bitwise(p, q)
    ours, theirs = (net.optimizer.state_dict()["state"] for net in (a, b))
    for mine, other in ((ours[i], theirs[i]) for i in sorted(ours.keys() & theirs.keys())):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert_bitwise(value, other[name])
            else:
                assert value == other[name], name


def copied(tensor, dim):
    """The same values elsewhere, with gaps or without."""
    return torch.stack([tensor, tensor], -1)[..., 0] if dim else tensor.clone()


class Events:
    """What may happen to an optimizer between steps, at random: the same to both twins of a seed."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def happen(self, net):
        getattr(
            self, self.draw.choice([n for n in vars(Events) if not n.startswith("_") and n not in ("happen", "draw")])
        )(net)

    def _param(self, net):
        return net.tensors[self.draw.choice(list(net.tensors))]

    def nothing(self, net):
        pass

    def freeze(self, net):
        p = self._param(net)
        p.requires_grad_(not p.requires_grad)

    def move(self, net):
        p = self._param(net)
        p.data = copied(p.data, self.draw.randrange(2))

    def replace_a_moment(self, net):
        state = net.optimizer.state.get(self._param(net), {})
        for name in ("momentum", "second_moment"):
            if name in state:
                state[name] = copied(state[name], self.draw.randrange(2))

    def replace_a_matrix(self, net):
        state = net.optimizer.state.get(self._param(net), {})
        if "fisher" in state:
            state["fisher"] = SymmetricBlocks.from_packed(state["fisher"].to_packed())

    def forget_a_tensor(self, net):
        name = self.draw.choice(["conv", "point", "linear", "wide"])
        for tensor, p in net.tensors.items():
            if tensor.startswith(name):
                net.optimizer.state.pop(p, None)

    def change_options(self, net):
        group = self.draw.choice(net.optimizer.param_groups)
        group.update(self.draw.choice([
            dict(lr=3e-3), dict(damping=0.1), dict(nesterov=False), dict(update_interval=2), dict(factor_interval=3),
            dict(update_interval=None, factor_interval=None), dict(lr=torch.tensor(5e-3, dtype=torch.float64)),
            dict(maximize=True), dict(momentum=0.5), dict(weight_decay=0.1), dict(eps=1e-6), dict(decay=0.5),
        ]))  # fmt: skip

    def save_and_load(self, net):
        file = io.BytesIO()
        torch.save(net.optimizer.state_dict(), file)
        file.seek(0)
        net.optimizer.load_state_dict(torch.load(file, weights_only=True))

    def add_a_group(self, net):
        name = f"added {len(net.tensors)}.weight"
        net.tensors[name] = nn.Parameter(randn(3, 5, seed=len(net.tensors)))
        net.optimizer.add_param_group(dict(params=[(name, net.tensors[name])]))


@over_forms
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("groups", [1, 3])
def test_kept_plans_are_new_plans(form, partition, groups):
    """Twenty steps, between which anything happens, and gradients come and go."""
    options = {k: v for k, v in (FORMS[form] | PARTITIONS[partition]).items() if k != "grid" or v} | OPTIONS
    if partition.startswith("grid"):
        options["grid"] = (1, 1)
    for seed in range(2):
        twins = [Net(optimizer, groups, **options) for optimizer in (MBF, Forgetful)]
        events = [Events(seed) for _ in twins]
        for _ in range(20):
            for net, mine in zip(twins, events, strict=True):
                for _ in range(mine.draw.randrange(2)):
                    mine.happen(net)
                frozen = [name for name, p in net.tensors.items() if not p.requires_grad]
                net.step(
                    drop=[*frozen, *mine.draw.choice([(), (), ("conv.weight",), ("linear.bias",), ("wide.weight",)])]
                )
        assert_twins(*twins)


def test_a_backend_may_change_between_steps():
    twins = [Net(optimizer) for optimizer in (MBF, Forgetful)]
    for name in ("cpu", "reference", "reference", "cpu", "cpu"):
        for net in twins:
            with use_backend(name):
                net.step()
    assert_twins(*twins)


# ---- the state is the optimizer's memory


@over_forms
def test_a_replaced_momentum_counts(form):
    """What a user puts into optimizer.state is used from the next step on, and the old tensor is let alone."""
    nets = [Net(**FORMS[form] | OPTIONS) for _ in range(2)]
    for net in nets:
        net.step()
        net.step()
    old = {}
    for name, p in nets[0].tensors.items():
        state = nets[0].optimizer.state[p]
        old[name] = state["momentum"], state["momentum"].clone()
        state["momentum"] = torch.zeros_like(p)
        nets[1].optimizer.state[nets[1].tensors[name]]["momentum"].zero_()
    for net in nets:
        net.step()
    assert_twins(*nets)
    for tensor, before in old.values():
        assert_bitwise(tensor, before)


@pytest.mark.parametrize("how", ["clear", "new", "pop"])
@over_forms
def test_an_emptied_state_is_a_new_start(form, how):
    """optimizer.state.clear(), optimizer.state = defaultdict(dict), or one entry after the other."""
    net, fresh = (Net(**FORMS[form] | OPTIONS) for _ in range(2))
    net.step()
    net.step()
    if how == "clear":
        net.optimizer.state.clear()
    elif how == "new":
        net.optimizer.state = collections.defaultdict(dict)
    else:
        for p in net.tensors.values():
            net.optimizer.state.pop(p, None)
    with torch.no_grad():
        for name, p in net.tensors.items():
            fresh.tensors[name].copy_(p)
    fresh.steps = net.steps
    for _ in range(2):
        net.step()
        fresh.step()
    assert_twins(net, fresh)


def test_parameters_replaced_in_a_group():
    """The new ones step, as new; the old ones stay."""
    net, fresh = Net(), Net()
    net.step()
    old = list(net.tensors.values())
    before = [p.detach().clone() for p in old]
    net.tensors = {name: nn.Parameter(p.detach().clone()) for name, p in fresh.tensors.items()}
    net.optimizer.param_groups[0]["params"][:] = net.tensors.values()
    fresh.steps = net.steps
    for _ in range(2):
        net.step()
        fresh.step()
    for p, b in zip(old, before, strict=True):
        assert_bitwise(p, b)
    for name, p in net.tensors.items():
        assert_bitwise(p, fresh.tensors[name])


def test_flattened_parameters():
    """As DeepSpeed puts them in place of a group's: refused where names tell that they are no tensors of their own;
    otherwise they step without blocks, which the report says."""
    for named in (True, False):
        layer = nn.Linear(6, 4)
        optimizer = MBF(layer.named_parameters() if named else layer.parameters(), lr=1e-2)
        flat = nn.Parameter(torch.linspace(-1, 1, 28))
        flat.grad = randn(28, dtype=torch.float32)
        optimizer.param_groups[0]["params"] = [flat]
        if named:
            with pytest.raises(ValueError, match="^MBF: expected a name for every parameter of a group, got 2 for 1"):
                optimizer.step()
            continue
        optimizer.step()
        assert [(row.shape, row.structure) for row in optimizer.report()] == [((28,), "diagonal")]
        assert (flat != torch.linspace(-1, 1, 28)).all()


@pytest.mark.parametrize("layers", [2, 30])
def test_layers_of_a_kind_are_one_launch(layers, monkeypatch):
    """However many they are: one for filters, one for averaged segments, one for tensors without blocks."""
    shapes = {"conv.weight": (2, 2, 3, 3), "linear.weight": (3, 8), "linear.bias": (3,), "norm.weight": (5,)}
    named = {f"{i}.{name}": nn.Parameter(randn(*shape)) for i in range(layers) for name, shape in shapes.items()}
    optimizer = MBF(named.items(), segment=4)
    launched, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, group: launched.append(self) or call(self, group))
    for _ in range(2):
        for param in named.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert len(launched) == 2 * 3


def test_a_parameter_moved_to_another_group():
    """Its state goes with it; its clock runs on with the new group's steps."""
    net, stays = Net(groups=2), Net(groups=2)
    for n in (net, stays):
        n.step()
    first, second = net.optimizer.param_groups
    for name in ("params", "param_names"):
        second[name].append(first[name].pop())
    net.step()
    stays.step()
    for name, p in net.tensors.items():
        assert_bitwise(p, stays.tensors[name])


@pytest.mark.parametrize("name", SHAPES)
def test_a_sparse_gradient_later_changes_nothing(name):
    """Refused as in the first step, before any clock has advanced or tensor moved, whichever launch would take it."""
    net = Net()
    net.step()
    net.step()
    before = [p.detach().clone() for p in net.tensors.values()]
    numbers = copy.deepcopy(net.optimizer.state_dict())
    net.load()
    net.tensors[name].grad = net.tensors[name].grad.to_sparse()
    with pytest.raises(TypeError, match="^MBF: expected dense gradients"):
        net.optimizer.step()
    for p, b in zip(net.tensors.values(), before, strict=True):
        assert_bitwise(p, b)
    for old, new in zip(numbers["state"].values(), net.optimizer.state_dict()["state"].values(), strict=True):
        assert old.get("step") == new.get("step")
    net.step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@over_forms
def test_copies_share_nothing(form, duplicate):
    """A copy in the middle of a run goes the same way, and neither moves the other."""
    net, plain = (Net(groups=2, **FORMS[form] | OPTIONS) for _ in range(2))
    for n in (net, plain):
        n.step()
        n.step(drop=("conv.weight",))
    other = duplicate(net)
    other.step()
    net.step()
    plain.step()
    assert_twins(net, plain)
    assert_twins(other, plain)
    other.step()
    assert_twins(net, plain)


def test_groups_do_not_share_clocks():
    """Not even those that have come equally far: each has its own weights and may miss steps of its own."""
    net, forgetful = Net(groups=2), Net(Forgetful, groups=2)
    names = [group["param_names"] for group in net.optimizer.param_groups]
    for drop in ((), names[0], names[1], (), names[0], ()):
        net.step(drop)
        forgetful.step(drop)
    assert_twins(net, forgetful)
    saved = net.optimizer.state_dict()
    steps = [{int(saved["state"][i]["step"]) for i in group["params"] if "step" in saved["state"][i]}
             for group in saved["param_groups"]]  # fmt: skip
    assert steps == [{4}, {5}]


# ---- options of a group that change


def test_grafting_changes_between_steps():
    """To Adam's lengths and back, where the partition does not depend on it; a second moment appears when needed."""
    net, forgetful = (Net(optimizer, blocks="row", graft=None) for optimizer in (MBF, Forgetful))
    for graft in (None, "adam", "adam", None, "adam"):
        for n in (net, forgetful):
            n.optimizer.param_groups[0]["graft"] = graft
            before = {name: p.detach().clone() for name, p in n.tensors.items()}
            n.step()
            assert all((p != before[name]).all() and p.isfinite().all() for name, p in n.tensors.items())
    assert_twins(net, forgetful)


@pytest.mark.parametrize(
    "blocks",
    [dict(blocks="segment"), dict(blocks="row"), dict(blocks="column"), dict(blocks="grid", grid=(2, 2))],
    ids=str,
)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_second_moment_that_comes_late_starts_from_the_matrices(blocks, capturable):
    """v = (1 - beta_2^t) diag(F) / (1 - beta^t), each mini-block's from the matrix that it shares."""
    weight, bias = (nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate([(6, 7), (6,)]))
    net = MBF(
        [("x.weight", weight), ("x.bias", bias)], average=True, graft=None, capturable=capturable, **OPTIONS | blocks
    )
    grads = []
    for t in range(4):
        if t == 3:
            net.param_groups[0]["graft"] = "adam"
        weight.grad, bias.grad = randn(6, 7, seed=10 + t), randn(6, seed=20 + t)
        grads.append(torch.cat([weight.grad, bias.grad[:, None]], 1).double())
        net.step()
    mean = sum(0.98 ** (2 - t) * 0.02 * shared_mean(grads[t].square(), blocks) for t in range(3)) / (1 - 0.98**3)
    beta = 0.999
    expected = beta * (1 - beta**3) * mean + (1 - beta) * grads[3].square()
    actual = torch.cat([net.state[weight]["second_moment"], net.state[bias]["second_moment"][:, None]], 1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def shared_mean(squares, blocks):
    """Of [6, 8]: each element's mean over the mini-blocks that share its matrix, by brute force."""
    places = {"segment": lambda i, j: j, "row": lambda i, j: j, "column": lambda i, j: i}
    place = places.get(blocks["blocks"], lambda i, j: (i % 3, j % 4))
    groups = collections.defaultdict(list)
    for i in range(6):
        for j in range(8):
            groups[place(i, j)].append((i, j))
    mean = torch.empty_like(squares)
    for members in groups.values():
        rows, columns = zip(*members, strict=True)
        mean[rows, columns] = squares[rows, columns].mean()
    return mean


def added_a_group(net):
    net.optimizer.add_param_group(dict(params=[("new", nn.Parameter(torch.ones(2)))]))
    return net


def loaded(net):
    net.optimizer.load_state_dict(copy.deepcopy(net.optimizer.state_dict()))
    return net


def loaded_elsewhere(net):
    other = Net(graft=net.built_with)
    other.tensors, other.steps = net.tensors, net.steps
    other.optimizer.param_groups[0]["params"][:] = net.tensors.values()
    other.optimizer.load_state_dict(copy.deepcopy(net.optimizer.state_dict()))
    return other


@pytest.mark.parametrize("happens", [copy.deepcopy, added_a_group, loaded, loaded_elsewhere])
@pytest.mark.parametrize("grafts", [("adam", None), (None, "adam")])
@pytest.mark.parametrize("drop", [(), ("wide.weight",), ("wide.bias",), ("linear.weight",)])
def test_state_keeps_its_blocks_when_grafting_changes(happens, grafts, drop):
    """Also where "auto" chooses others now: the steps are those of an optimizer to which nothing happened."""
    net, plain = (Net(graft=grafts[0]) for _ in range(2))
    net.built_with = grafts[0]
    for n in (net, plain):
        n.step(drop)
        n.step(drop)
        n.optimizer.param_groups[0]["graft"] = grafts[1]
    net = happens(net)
    for _ in range(2):
        for n in (net, plain):
            n.step(drop)
        assert_twins(net, plain)
    assert str(net.optimizer.report()).startswith(str(plain.optimizer.report()))


@pytest.mark.parametrize("change", [dict(blocks="column"), dict(segment=3), dict(blocks="diagonal")])
@pytest.mark.parametrize("happens", [lambda net: net, copy.deepcopy])
def test_other_blocks_for_a_state_are_refused(change, happens):
    """Before anything moves, and only as long as the options ask for them."""
    net, plain = Net(), Net()
    for n in (net, plain):
        n.step()
    before = {name: net.optimizer.param_groups[0][name] for name in change}
    net.optimizer.param_groups[0].update(change)
    net = happens(net)
    net.load()
    for call in (net.optimizer.step, net.optimizer.report, lambda: added_a_group(net), net.optimizer.step):
        with pytest.raises(ValueError, match="^MBF: expected blocks, segment, grid and average .*weight"):
            call()
    net.optimizer.param_groups[0].update(before)
    assert_twins(net, plain)
    net.optimizer.step()
    plain.step()
    assert_twins(net, plain)


def test_intervals_change_between_steps():
    """Shorter, longer, none: a factor that is missing is made, one that is there serves until the next is due."""
    net, forgetful = (Net(optimizer) for optimizer in (MBF, Forgetful))
    for intervals in ((None, None), (2, 3), (2, 3), (1, 4), (3, 1), (None, 2), (None, None), (5, 5)):
        for n in (net, forgetful):
            n.optimizer.param_groups[0].update(zip(("update_interval", "factor_interval"), intervals, strict=True))
            n.step()
            n.step()
    assert_twins(net, forgetful)
    assert sum(row.skipped for row in net.optimizer.report()) == 0


def test_capturable_and_numbers_as_tensors_change_between_steps():
    """Within the rounding of weights that are counted on the device; lr as a tensor has the bits of the float."""
    plain, tensor, device = Net(), Net(), Net()
    for step in range(6):
        lr = 1e-2 / (1 + step)
        plain.optimizer.param_groups[0]["lr"] = lr
        tensor.optimizer.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64)
        device.optimizer.param_groups[0].update(lr=torch.tensor(lr, dtype=torch.float64), capturable=step % 3 > 0)
        for net in (plain, tensor, device):
            net.step()
    for name, p in plain.tensors.items():
        assert_bitwise(p, tensor.tensors[name])
        assert_below((p - device.tensors[name]).abs(), 1e-10, name)


# ---- checkpoints


@over_forms
def test_what_a_checkpoint_holds(form):
    """Tensors: "step" and the moments of every layer, F and its weight, and no clock."""
    net = Net(**FORMS[form] | OPTIONS)
    net.step()
    net.step(drop=("conv.weight",))
    saved = net.optimizer.state_dict()
    names = dict(zip(saved["param_groups"][0]["params"], saved["param_groups"][0]["param_names"], strict=True))
    for index, state in saved["state"].items():
        name = names[index]
        assert "clock" not in state and "momentum" in state
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        if name == "linear.bias" or (form == "paper" and name == "wide.bias"):  # joined
            assert "step" not in state
            continue
        assert state["step"] == (1 if name == "conv.weight" else 2)
        if name.endswith("weight"):
            assert {"observed", "fisher_weight"} <= state.keys()
            assert state["skipped"].dtype == torch.int64 and len(state["skipped"]) == SHAPES[name][0]
            assert any(key.startswith("fisher") and isinstance(state[key], torch.Tensor) for key in state)
            decay = net.optimizer.param_groups[0]["decay"]
            assert abs(state["fisher_weight"] - (1 - decay ** int(state["step"]))) <= 1e-15


@over_forms
@pytest.mark.parametrize("partition", ["auto", "row", "column, own", "diagonal"])
def test_loading_in_the_middle_of_a_run(form, partition):
    """Back to an earlier state: the steps that follow are those that followed then, whatever plans were kept."""
    net = Net(**FORMS[form] | PARTITIONS[partition] | OPTIONS)
    for _ in range(3):
        net.step()
    saved = copy.deepcopy(net.optimizer.state_dict())
    weights = {name: p.detach().clone() for name, p in net.tensors.items()}
    ways = []
    for _ in range(2):
        net.steps = 3
        net.optimizer.load_state_dict(copy.deepcopy(saved))
        with torch.no_grad():
            for name, p in net.tensors.items():
                p.copy_(weights[name])
        for drop in ((), ("linear.weight",), ()):
            net.step(drop)
        ways.append([p.detach().clone() for p in net.tensors.values()])
    for a, b in zip(*ways, strict=True):
        assert_bitwise(a, b)


# ---- what a layer is


@pytest.mark.parametrize(
    "inputs, segment, joins", [(7, 4, True), (8, 4, False), (4, 4, False), (3, 4, True), (5, 4, True)]
)
@pytest.mark.parametrize("average", [True, False])
def test_a_bias_joins_where_it_is_no_run_of_its_own(inputs, segment, joins, average):
    """By the rows of report() and the matrices; alone, it takes the diagonal step."""
    layer = nn.Linear(inputs, 3).double()
    optimizer = MBF(layer.named_parameters("x"), blocks="segment", segment=segment, average=average)
    for p in layer.parameters():
        p.grad = randn(*p.shape)
    optimizer.step()
    rows = optimizer.report()
    assert len(rows) == (1 if joins else 2)
    assert rows[0].name == "x.weight" + (" + bias" if joins else "")
    matrices = -(-inputs // segment) if joins or inputs % segment == 0 else None
    assert rows[0].count == matrices * (1 if average else 3)
    alone = MBF([nn.Parameter(layer.bias.detach().clone())])
    alone.param_groups[0]["params"][0].grad = layer.bias.grad
    alone.step()
    if not joins:
        assert rows[1].structure == "diagonal"


def bytes_of(value):
    if isinstance(value, SymmetricBlocks):
        value = value.data
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


@over_forms
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("partition", ["auto", "row", "segment", "segment, own", "diagonal"])
@pytest.mark.parametrize("intervals", [(None, None), (2, 3)])
def test_reported_bytes_are_those_of_the_state(form, network, partition, intervals):
    """Within 1 %, counters aside."""
    options = FORMS[form] | PARTITIONS[partition]
    options |= dict(update_interval=intervals[0], factor_interval=intervals[1])
    run = Run(network, torch.float32, options)
    run.step()
    held = sum(
        bytes_of(value)
        for state in run.optimizer.state.values()
        for name, value in state.items()
        if name not in ("skipped", "clock")
    )
    reported = sum(row.bytes for row in run.optimizer.report())
    assert abs(reported - held) <= 0.01 * held


def test_no_gradients_at_all():
    """Nothing moves, no state changes; then the first step is a first step."""
    net, fresh = Net(), Net()
    net.optimizer.step()
    assert_twins(net, fresh)
    for n in (net, fresh):
        n.step()
    assert_twins(net, fresh)
    net.optimizer.zero_grad()
    before = copy.deepcopy(net.optimizer.state_dict())
    net.optimizer.step()
    assert str(net.optimizer.state_dict()) == str(before)


def test_a_factor_that_a_step_could_not_write_is_missing_still():
    """The interval grows at a step that raises: the next one has no factor from before."""
    weight = torch.nn.Parameter(randn(4, 3, 3, 3))
    optimizer = MBF([weight], factor_interval=1)
    weight.grad = randn(4, 3, 3, 3, seed=1)
    for _ in range(12):
        optimizer.step()
    group = optimizer.param_groups[0]
    group |= {"factor_interval": 10, "lr": -1.0}
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    group["lr"] = 1e-3
    before = weight.detach().clone()
    optimizer.step()
    assert optimizer.report()[0].skipped == 0
    assert bool((weight != before).any())
