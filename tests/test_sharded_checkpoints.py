"""Checkpoints of sharded training: saved by some processes, resumed by others."""

import math

import pytest
import torch
from mbf_optim import MBF
from processes import run
from test_sharded import CASES, STEPS, alone, assert_same, network, outcome, shard, train
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

from mbf_kernels.testing import assert_bitwise

FORMER = (4,)  # the processes that save
FIRST, REST = range(STEPS), range(STEPS, 2 * STEPS)


def prepared(case, mesh):
    model = network(case) if mesh == (1,) else shard(network(case), mesh)
    return model, MBF(model.named_parameters(), **CASES[case])


def save(folder):
    """Then goes on; what it reaches."""
    outcomes = {}
    for case in CASES:
        model, optimizer = prepared(case, FORMER)
        train(model, optimizer, FIRST)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(parts, checkpoint_id=folder / case)
        train(model, optimizer, REST)
        outcomes[case] = outcome(model, optimizer)
    return outcomes


def resume(folder, mesh):
    outcomes = {}
    for case in CASES:
        model, optimizer = prepared(case, mesh)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(parts, checkpoint_id=folder / case)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        train(model, optimizer, REST)
        outcomes[case] = outcome(model, optimizer)
    return outcomes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run(math.prod(FORMER), save, folder, timeout=300)[0]


@pytest.mark.parametrize("mesh", [(1,), (2,), (3,), (2, 2)], ids=str)
def test_saved_by_four_and_resumed_by_others(saved, mesh):
    """As if one process had never stopped: every form and partition, through torch.distributed.checkpoint."""
    folder, _ = saved
    for outcomes in run(math.prod(mesh), resume, folder, mesh, timeout=300):
        for case, found in outcomes.items():
            assert_same(found, alone(case, range(2 * STEPS)), case)


def test_resumed_by_as_many_is_bitwise(saved):
    folder, undisturbed = saved
    for outcomes in run(math.prod(FORMER), resume, folder, FORMER, timeout=300):
        for case, found in outcomes.items():
            for (_, weight, state), (_, true_weight, true_state) in zip(found, undisturbed[case], strict=True):
                assert_bitwise(weight, true_weight)
                for entry, value in state.items():
                    assert_bitwise(value, true_state[entry])


# ---- what the state is


def placements():
    model, optimizer = prepared("grafted, auto", (2, 2))
    by_name = get_optimizer_state_dict(model, optimizer)["state"]
    for name, param in model.named_parameters():
        for entry, value in by_name[name].items():
            if value.ndim == 0:
                assert not isinstance(value, DTensor), (name, entry)
                continue
            assert isinstance(value, DTensor) and value.device_mesh == param.device_mesh, (name, entry)
            shared = (
                entry.startswith("fisher") and "averaged" in str(optimizer.report()) and param.shape[2:].numel() == 1
            )
            expected = (Replicate(), Replicate()) if shared else param.placements
            assert value.placements == expected, (name, entry)


def test_states_lie_as_their_parameters_do():
    """On their mesh, in their places; matrices that all outputs share on every process."""
    run(4, placements)


def a_whole_state(folder, broadcast):
    """Gathered by the first of four processes, and taken up by all; or the optimizer's part sent by the first."""
    model, optimizer = prepared("grafted, auto", FORMER)
    train(model, optimizer, FIRST)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimizer, options=gathered)
    if distributed.get_rank() == 0:
        assert not any(isinstance(value, DTensor) for state in states["state"].values() for value in state.values())
        torch.save((weights, states), folder / "whole.pt")
    distributed.barrier()
    weights, states = torch.load(folder / "whole.pt", weights_only=True)
    if broadcast and distributed.get_rank() != 0:
        states = {}
    model, optimizer = prepared("grafted, auto", FORMER)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=whole)
    train(model, optimizer, REST)
    return outcome(model, optimizer)


@pytest.mark.parametrize("broadcast", [False, True])
def test_whole_states(tmp_path, broadcast):
    for found in run(4, a_whole_state, tmp_path, broadcast):
        assert_same(found, alone("grafted, auto", range(2 * STEPS)), "grafted, auto")


def flattened(folder, frozen):
    """Into an optimizer that is new, and into one that has gone on. Some biases, and a weight, have no gradients."""
    case = "grafted, auto, old factors"
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def prepare():
        model = shard(network(case), (2,))
        for i, param in enumerate(model.parameters() if frozen else ()):
            param.requires_grad_(i % 5 > 0)
        return model, MBF(model.named_parameters(), **CASES[case])

    model, optimizer = prepare()
    train(model, optimizer, FIRST)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    checkpoint.save(parts, checkpoint_id=folder)
    train(model, optimizer, REST)
    outcomes = [outcome(model, optimizer)]
    for steps in ((), range(100, 103)):
        model, optimizer = prepare()
        train(model, optimizer, steps)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
        checkpoint.load(parts, checkpoint_id=folder)
        set_state_dict(
            model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"], options=options
        )
        train(model, optimizer, REST)
        outcomes.append(outcome(model, optimizer))
    return outcomes


@pytest.mark.parametrize("frozen", [False, True])
def test_flattened_states(tmp_path, frozen):
    """As torchtitan saves them: torch takes them apart by the names of the state that is there. Bitwise."""
    for undisturbed, *others in run(2, flattened, tmp_path, frozen):
        for found in others:
            assert_same(found, undisturbed, "flattened", 0.0)


def asked_before_the_first_step():
    outcomes = []
    for asked in (False, True):
        model, optimizer = prepared("grafted, auto", (2,))
        if asked:
            states = get_optimizer_state_dict(model, optimizer)["state"]
            assert all(int(state.get("step", 0)) == 0 for state in states.values())
        train(model, optimizer)
        outcomes.append(outcome(model, optimizer))
    return outcomes


def test_asking_for_the_state_is_no_step():
    """torch steps an optimizer without state, with zero gradients, to see its state: MBF has one from the start."""
    for plain, asked in run(2, asked_before_the_first_step):
        for (_, weight, state), (_, other_weight, other_state) in zip(plain, asked, strict=True):
            assert_bitwise(weight, other_weight)
            for entry, value in state.items():
                assert_bitwise(value, other_state[entry])


def refused():
    model, optimizer = prepared("grafted, auto", (2,))
    train(model, optimizer, FIRST)
    before = outcome(model, optimizer)
    for change in (dict(segment=5), dict(blocks="row"), dict(blocks="diagonal"), dict(average=False, blocks="segment")):
        other = MBF(model.named_parameters(), **CASES["grafted, auto"] | change)
        with pytest.raises(ValueError, match=r"^MBF.load_state_dict: expected .* for .*weight"):
            optimizer.load_state_dict(other.state_dict())
    return before, outcome(model, optimizer)


def test_states_of_other_partitions_are_refused():
    for before, after in run(2, refused):
        assert_same(after, before, "unchanged", 0.0)


def stepped_without_gradients(folder):
    """A state that has been thrown away: torch steps the optimizer with zero gradients, then loads."""
    case = "grafted, auto, old factors"
    model, optimizer = prepared(case, (2,))
    train(model, optimizer, FIRST)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(parts, checkpoint_id=folder)
    optimizer.zero_grad()
    optimizer.state.clear()
    before = [param.to_local().clone() for param in model.parameters()]
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    assert {int(state["step"]) for state in parts["optimizer"]["state"].values() if "step" in state} == {1}
    for param, value in zip(model.parameters(), before, strict=True):
        assert_bitwise(param.to_local(), value)
    checkpoint.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    train(model, optimizer, REST)
    return outcome(model, optimizer)


def test_a_step_without_gradients_does_no_harm(tmp_path):
    for found in run(2, stepped_without_gradients, tmp_path):
        assert_same(found, alone("grafted, auto, old factors", range(2 * STEPS)), "dummy step")
