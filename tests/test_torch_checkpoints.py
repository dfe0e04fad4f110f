"""What PyTorch's test suite asks of checkpoints and copies of every optimizer, asked of MBF with every option."""

import copy
import io
import pickle

import pytest
import torch
from mbf_optim import MBF
from optimizer_info import DEVICES, INFO, Maker, assert_equal_trees, over_inputs
from test_mbf import PARTITIONS
from test_param_groups import OVERRIDES, Problem, assert_same, train


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_a_file(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def put(weights, into):
    with torch.no_grad():
        for name, p in weights.named.items():
            into.named[name].copy_(p)


def trained(make):
    problem, optimizer = make()
    train(problem, optimizer, 3)
    return problem, optimizer


def resumed(run, make, checkpoint):
    """A run of its own where another one is, from the checkpoint."""
    problem, optimizer = make()
    put(run[0], into=problem)
    optimizer.load_state_dict(checkpoint)
    return problem, optimizer


def assert_go_on_alike(*runs):
    for problem, optimizer in runs:
        train(problem, optimizer, 4, first=3)
    assert_same(*(problem for problem, _ in runs))
    assert_equal_trees(*(optimizer.state_dict()["state"] for _, optimizer in runs))


def layout(optimizer):
    """Name, shape, dtype and device of every tensor of the state."""
    return {
        index: {name: (value.shape, value.dtype, value.device) for name, value in state.items()}
        for index, state in optimizer.state_dict()["state"].items()
    }


# ---- what there is to save


@over_inputs
def test_every_parameter_has_tensors_for_state(make):
    """And nothing but tensors, under each parameter, of its shape among them."""
    problem, optimizer = trained(make)
    saved = optimizer.state_dict()["state"]
    assert list(saved) == list(range(len(problem.named)))
    for p, state in zip(problem.named.values(), saved.values(), strict=True):
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        assert state["momentum"].shape == p.shape and state["momentum"].any()


@over_inputs
def test_there_is_a_state_to_load_into_before_the_first_step(make):
    """The one of later: a distributed checkpoint fills the tensors it finds."""
    problem, optimizer = make()
    before = layout(optimizer)
    train(problem, optimizer, 3)
    assert before == layout(optimizer)


@over_inputs
def test_a_default_device_is_for_others(make):
    """The state lies where the parameters are, and counters on the CPU, whatever device is asked for elsewhere."""
    run, other = trained(make), trained(make)
    saved = copy.deepcopy(run[1].state_dict())
    with torch.device("meta"):
        optimizer = other[1]
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        str(optimizer.report())
        found = optimizer.state_dict()
    run[1].load_state_dict(saved)
    run[1].step()
    assert_same(run[0], other[0])
    assert_equal_trees(found, run[1].state_dict())


# ---- loading


@over_inputs
@pytest.mark.parametrize("travel", [through_a_file, through_pickle])
def test_what_is_loaded_is_what_was_saved(make, travel):
    """To the last bit; and the steps after it leave the checkpoint as it is."""
    run = trained(make)
    saved = copy.deepcopy(run[1].state_dict())
    loaded = travel(run[1].state_dict())
    assert_equal_trees(loaded, saved)
    other = resumed(run, make, loaded)
    assert_equal_trees(other[1].state_dict(), saved)
    assert_go_on_alike(run, other)
    assert_equal_trees(loaded, saved)


@over_inputs
def test_the_latest_checkpoint_counts(make):
    """Loaded into an optimizer that has gone on, and into one that is the saved one itself."""
    run = trained(make)
    saved = copy.deepcopy(run[1].state_dict())
    other = make()
    put(run[0], into=other[0])
    weights = copy.deepcopy(run[0])
    for problem, optimizer in (run, other):
        train(problem, optimizer, 2)
        optimizer.load_state_dict(copy.deepcopy(saved))
        put(weights, into=problem)
    assert_go_on_alike(run, other)


@over_inputs
def test_steps_that_are_no_tensors_load(make):
    run = trained(make)
    saved = copy.deepcopy(run[1].state_dict())
    counted = [state for state in saved["state"].values() if "step" in state]
    assert counted
    for state in counted:
        state["step"] = float(state["step"])
    assert_go_on_alike(run, resumed(run, make, saved))


@over_inputs
def test_checkpoints_from_before_options_were_added_load(make):
    """They have the optimizer's defaults then."""
    run = trained(make)
    saved = copy.deepcopy(run[1].state_dict())
    for group in saved["param_groups"]:
        for name in set(INFO.not_og_supported_flags) - set(make.options):
            del group[name]
    assert_go_on_alike(run, resumed(run, make, saved))


@over_inputs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_state_goes_where_the_weights_are(make, device, dtype):
    """Of another dtype or device: every number is loaded, into tensors as the optimizer makes them."""
    _, optimizer = trained(make)
    problem = Problem(dtype=dtype, device=device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in make.options.items()}
    other = MBF(problem.named.items(), **options)
    expected = layout(other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert layout(other) == expected
    states = (o.state_dict()["state"].values() for o in (other, optimizer))
    for ours, saved in zip(*states, strict=True):
        assert_equal_trees(
            {name: value.double().cpu() for name, value in ours.items()},
            {name: value.double().cpu() for name, value in saved.items()},
        )
    train(problem, other, 1)
    assert all(p.isfinite().all() for p in problem.named.values())


@pytest.mark.parametrize("partition", ["filter", "diagonal"])
@pytest.mark.parametrize("saved_named", [False, True])
@pytest.mark.parametrize("loads_named", [False, True])
def test_names_do_not_decide_what_loads(partition, saved_named, loads_named):
    """Where no bias joins a weight, that is: it goes by position, and saved names replace others."""

    def make(names, named):
        problem = Problem()
        renamed = dict(zip(names, problem.named.values(), strict=True))
        return problem, MBF(renamed.items() if named else renamed.values(), **PARTITIONS[partition])

    names = list(Problem().named)
    others = [f"module.{name}" for name in names]
    run, other = make(names, saved_named), make(others, loads_named)
    train(*run, 3)
    put(run[0], into=other[0])
    other[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    expected = names if saved_named else others if loads_named else None
    assert other[1].param_groups[0].get("param_names") == expected
    assert_go_on_alike(run, other)


BAD = {
    "another number of groups": lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
    "another number of parameters": lambda saved: saved["param_groups"][0]["params"].pop(),
    "momentum of another shape": lambda saved: saved["state"][0].update(momentum=torch.zeros(3, 4, 3, 3)),
    "no momentum": lambda saved: saved["state"][2].pop("momentum"),
    "no matrices": lambda saved: saved["state"][0].pop("fisher"),
    "matrices of another size": lambda saved: saved["state"][0].update(fisher=torch.zeros(4, 3, 10)),
    "no step": lambda saved: saved["state"][5].pop("step"),
    "no weight of F": lambda saved: saved["state"][0].pop("fisher_weight"),
    "no count of observations": lambda saved: saved["state"][0].pop("observed"),
    "no count of skipped blocks": lambda saved: saved["state"][0].pop("skipped"),
    "skipped blocks of other outputs": lambda saved: saved["state"][0].update(skipped=torch.zeros(7)),
    "options that its own state does not fit": lambda saved: saved["param_groups"][0].update(blocks="row"),
    "intervals of a group that is not capturable": lambda saved: saved["param_groups"][0].update(factor_interval=9),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_refused_checkpoint_changes_nothing(bad):
    run, other = (trained(lambda: Maker("cpu", 0)(capturable=True, lr=torch.tensor(0.01))) for _ in range(2))
    saved = copy.deepcopy(run[1].state_dict())
    saved["param_groups"][0]["lr"] += 1
    BAD[bad](saved)
    with pytest.raises(ValueError, match="expected|loaded state dict"):
        other[1].load_state_dict(saved)
    assert_equal_trees(other[1].state_dict(), run[1].state_dict())
    assert_go_on_alike(run, other)


def test_the_state_of_another_optimizer_is_refused():
    problem, optimizer = trained(Maker("cpu", 0))
    adam = torch.optim.Adam(problem.named.values())
    train(problem, adam, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="as momentum for conv.weight, got none: .* by another optimizer"):
        optimizer.load_state_dict(adam.state_dict())
    assert_equal_trees(optimizer.state_dict(), before)


# ---- copies


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": lambda run: through_a_file(run, weights_only=False),
}


def public(optimizer):
    return {name for name in dir(optimizer) if not name.startswith("_")}


@over_inputs
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_go_on_alike_and_apart(make, duplicate):
    run = trained(make)
    other = DUPLICATES[duplicate](run)
    assert public(other[1]) == public(run[1])
    before = copy.deepcopy((run[0].named, run[1].state_dict()))
    train(*other, 4, first=3)
    assert_equal_trees((run[0].named, run[1].state_dict()), before)
    train(*run, 4, first=3)
    assert_same(run[0], other[0])
    assert_equal_trees(run[1].state_dict(), other[1].state_dict())


@pytest.mark.parametrize("missing", OVERRIDES)
def test_pickles_from_before_an_option_was_added_load(missing):
    """Whole optimizers, whose defaults lack the option as well."""
    run = trained(Maker("cpu", 0))
    problem, state = copy.deepcopy((run[0], run[1].__getstate__()))
    for options in (state["defaults"], *state["param_groups"]):
        del options[missing]
    old = MBF.__new__(MBF)
    old.__setstate__(state)
    assert_go_on_alike(run, (problem, old))
