"""What PyTorch's test suite asks of the steps and hooks of every optimizer, asked of MBF with every option."""

import copy
import math

import pytest
import torch
from mbf_optim import MBF
from optimizer_info import INFO, assert_equal_trees, over_devices, over_inputs
from test_param_groups import Problem, assert_same, train
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mbf_kernels.testing import assert_bitwise

over_schedulers = pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=range(len(INFO.scheduler_inputs)))
ERRORS = [error.optimizer_error_input.desc for error in INFO.optim_error_inputs_func("cpu", torch.float32)]


def test_inputs_leave_implementations_to_the_tests():
    for optimizer_input in INFO.optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & set(optimizer_input.kwargs), optimizer_input.desc


@pytest.mark.parametrize("number", range(len(ERRORS)), ids=ERRORS)
def test_errors(number):
    error = INFO.optim_error_inputs_func("cpu", torch.float32)[number]
    bad = error.optimizer_error_input
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expected(error.error_type, match=error.error_regex):
        MBF(bad.params, **bad.kwargs)


# ---- steps


def descend(problem, optimizer, schedulers):
    """Ten steps with schedulers; the loss before and after."""
    schedulers = [scheduler(optimizer) for scheduler in schedulers]
    before = problem.loss().item()
    for step in range(10):
        problem.backward(step)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*[problem.loss(step)] * isinstance(scheduler, ReduceLROnPlateau))
    return before, problem.loss().item()


@over_schedulers
def test_groups_go_in_the_right_direction(schedulers):
    """With rates of their own, numbers and a tensor."""
    problem = Problem()
    named = list(problem.named.items())
    rates = [0.001, 0.01, torch.tensor(0.02)]
    groups = [dict(params=named[2 * i : 2 * i + 2], lr=lr) for i, lr in enumerate(rates)]
    before, after = descend(problem, MBF(groups), schedulers)
    assert after < before


@over_inputs
@over_schedulers
def test_goes_in_the_right_direction(make, schedulers):
    """A tensor lr bit by bit as the number, in float64, in which schedulers count; they write into it, nobody else."""
    lr = float(make.options.get("lr", 0.01))
    tensor = torch.tensor(lr, dtype=torch.float64, device=make.device)
    runs = [make(lr=lr), make(lr=tensor)]
    for run in runs:
        before, after = descend(*run, schedulers)
        assert math.isfinite(after)
        assert after > before if make.options.get("maximize") else after < before
    rates = [optimizer.param_groups[0]["lr"] for _, optimizer in runs]
    assert rates[1] is tensor and tensor.item() == rates[0]
    assert schedulers or rates[0] == lr
    assert_same(*(problem for problem, _ in runs))


@over_inputs
def test_a_step_without_gradients_changes_nothing(make):
    """Neither weights nor state, before the first step and after others."""
    problem, optimizer = make()
    for steps in (0, 2):
        train(problem, optimizer, steps)
        before = copy.deepcopy((problem.named, optimizer.state_dict()))
        optimizer.zero_grad()
        optimizer.step()
        assert_equal_trees((problem.named, optimizer.state_dict()), before)


@over_inputs
def test_gradients_are_not_written_to(make):
    problem, optimizer = make()
    for step in range(3):
        problem.backward(step)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in problem.named.values()]
        optimizer.step()
        for p, (grad, values, version) in zip(problem.named.values(), before, strict=True):
            assert p.grad is grad and grad._version == version
            assert_bitwise(grad, values)


@over_inputs
def test_autograd_sees_that_the_weights_changed(make):
    """A graph that has saved the old values is refused, not silently wrong."""
    problem, optimizer = make()
    problem.backward(0)
    losses = [p.square().sum() for p in problem.named.values()]
    optimizer.step()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@over_inputs
def test_the_default_dtype_makes_no_difference(make):
    runs = [make() for _ in range(2)]
    train(*runs[0], 3)
    torch.set_default_dtype(torch.float64)
    try:
        train(*runs[1], 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(*(problem for problem, _ in runs))
    assert_equal_trees(*(optimizer.state_dict() for _, optimizer in runs))


@over_devices
def test_the_profiler_names_the_step(make):
    problem, optimizer = make()
    problem.backward(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    assert {"Optimizer.step#MBF.step", "Optimizer.zero_grad#MBF.zero_grad"} <= {e.name for e in profile.events()}


@over_inputs
def test_the_representation_shows_every_option(make):
    _, optimizer = make()
    lines = repr(optimizer).splitlines()
    assert lines[0] == "MBF ("
    assert {f"    {name}: {value}" for name, value in (optimizer.defaults | make.options).items()} <= set(lines)


# ---- hooks of steps


@over_devices
def test_step_hooks(make):
    """Global ones outside, each kind in the order of registration; a handle removes them."""
    problem, optimizer = make()
    problem.backward(0)
    calls = []

    def note(name):
        return lambda opt, args, kwargs: calls.append((name, opt is optimizer))

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre 2")),
        optimizer.register_step_post_hook(note("post 2")),
    ]
    try:
        optimizer.step(lambda: calls.append(("closure", True)))
    finally:
        for handle in handles:
            handle.remove()
    names = ["global pre", "pre", "pre 2", "closure", "post", "post 2", "global post"]
    assert calls == [(name, True) for name in names]
    optimizer.step()
    assert len(calls) == len(names)


@over_devices
def test_a_step_pre_hook_may_change_the_arguments(make):
    _, optimizer = make()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 2 * args[1]()), kwargs))
    assert optimizer.step(lambda: 21.0) == 42.0


@over_inputs
def test_step_hooks_may_change_gradients_and_weights(make):
    """Clipping before, a constraint after: as when they are written out in the loop."""
    ours, optimizer = make()
    expected, plain = make()

    def clip(problem):
        torch.nn.utils.clip_grad_norm_(problem.named.values(), 0.1)

    def constrain(problem):
        with torch.no_grad():
            for p in problem.named.values():
                p.clamp_(-1, 1)

    optimizer.register_step_pre_hook(lambda *_: clip(ours))
    optimizer.register_step_post_hook(lambda *_: constrain(ours))
    train(ours, optimizer, 3)
    for step in range(3):
        expected.backward(step)
        clip(expected)
        plain.step()
        constrain(expected)
    assert_same(ours, expected)


# ---- hooks of checkpoints


@over_inputs
def test_state_dict_hooks(make):
    """Pre-hooks come before anything is read; post-hooks see what the caller will, and what they return it gets."""
    problem, optimizer = make()
    train(problem, optimizer, 2)
    expected = copy.deepcopy(optimizer.state_dict())
    expected["param_groups"][0]["weight_decay"] = 0.25
    calls, seen = [], []

    def before(opt):
        calls.append("pre")
        opt.param_groups[0]["weight_decay"] = 0.25

    def after(opt, state_dict):
        calls.append("post")
        seen.append(copy.deepcopy(state_dict))
        state_dict["note"] = "in place"

    optimizer.register_state_dict_pre_hook(before)
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre, prepended"), prepend=True)
    optimizer.register_state_dict_post_hook(after)
    optimizer.register_state_dict_post_hook(lambda opt, _: calls.append("post, prepended"), prepend=True)
    result = optimizer.state_dict()
    assert calls == ["pre, prepended", "pre", "post, prepended", "post"]
    assert_equal_trees(seen, [expected])
    assert_equal_trees(result, expected | {"note": "in place"})
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"other": state_dict["note"]})
    assert optimizer.state_dict() == {"other": "in place"}


@over_inputs
def test_load_state_dict_hooks(make):
    """What pre-hooks return or change is checked and loaded, not what came; post-hooks find it all in place."""
    trained, source = make()
    train(trained, source, 2)
    saved = copy.deepcopy(source.state_dict())
    given = {"wrapped": copy.deepcopy(saved)}
    expected = saved | {"param_groups": [group | {"weight_decay": 0.25} for group in saved["param_groups"]]}
    _, optimizer = make()
    calls, seen = [], []

    def unwrap(opt, state_dict):
        calls.append("pre, prepended")
        return dict(state_dict["wrapped"])

    def change(opt, state_dict):
        calls.append("pre")
        state_dict["param_groups"] = [group | {"weight_decay": 0.25} for group in state_dict["param_groups"]]

    def after(opt):
        calls.append("post")
        seen.append(copy.deepcopy(opt.state_dict()))

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_pre_hook(unwrap, prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("post, prepended"), prepend=True)
    optimizer.load_state_dict(given)
    assert calls == ["pre, prepended", "pre", "post, prepended", "post"]
    assert_equal_trees(given, {"wrapped": saved})
    assert_equal_trees(seen, [expected])
    assert_equal_trees(optimizer.state_dict(), expected)


@over_inputs
def test_a_load_post_hook_may_change_the_state(make):
    trained, source = make()
    train(trained, source, 2)
    _, optimizer = make()

    def forget_momentum(opt):
        for state in opt.state.values():
            state["momentum"].zero_()

    optimizer.register_load_state_dict_post_hook(forget_momentum)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    momenta = [state["momentum"] for state in optimizer.state_dict()["state"].values()]
    assert len(momenta) == len(trained.named) and not any(momentum.any() for momentum in momenta)
