"""Loss scaling: torch.amp.GradScaler around MBF with every option."""

import math

import pytest
import torch
from optimizer_info import assert_equal_trees, over_inputs
from test_param_groups import assert_same

over_clips = pytest.mark.parametrize("clip", [None, 0.1], ids=["no clipping", "clipped"])


def clip_gradients(problem, clip):
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(problem.named.values(), clip)


def scaled_step(problem, optimizer, scaler, step, clip, bad=None):
    """One step of a loop with loss scaling, the gradient of ``bad`` spoilt in one element."""
    optimizer.zero_grad()
    scaler.scale(problem.loss(step)).backward()
    if bad is not None:
        grad = problem.named[bad].grad
        grad[(-1,) * grad.ndim] = math.inf
    if clip is not None:
        scaler.unscale_(optimizer)
        clip_gradients(problem, clip)
    scaler.step(optimizer)
    scaler.update()


def plain_step(problem, optimizer, step, clip):
    problem.backward(step)
    clip_gradients(problem, clip)
    optimizer.step()


@over_inputs
@over_clips
def test_a_scaled_loss_makes_no_difference(make, clip):
    """Bit by bit, for a power of two moves exponents only; with ``unscale_`` and clipping before the step, too."""
    (ours, optimizer), (expected, plain) = make(), make()
    scaler = torch.amp.GradScaler(make.device, init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        scaled_step(ours, optimizer, scaler, step, clip)
        plain_step(expected, plain, step, clip)
    assert scaler.get_scale() == 2.0**12
    assert_same(ours, expected)
    assert_equal_trees(optimizer.state_dict(), plain.state_dict())


@over_inputs
@over_clips
@pytest.mark.parametrize("bad", ["conv.weight", "linear.bias"])
def test_a_step_with_an_overflow_is_none(make, clip, bad):
    """No weight, no state and no counter of any tensor moves, in the first step and in a later one."""
    (ours, optimizer), (expected, plain) = make(), make()
    scaler = torch.amp.GradScaler(make.device, init_scale=2.0**10)
    for step in range(4):
        overflow = step % 2 == 0
        scaled_step(ours, optimizer, scaler, step, clip, bad if overflow else None)
        if not overflow:
            plain_step(expected, plain, step, clip)
    assert scaler.get_scale() == 2.0**8
    assert_same(ours, expected)
    assert_equal_trees(optimizer.state_dict(), plain.state_dict())


@over_inputs
def test_the_scale_reaches_no_later_step(make):
    """A step without the scaler after one with it: nothing of it is left on the optimizer."""
    (ours, optimizer), (expected, plain) = make(), make()
    scaler = torch.amp.GradScaler(make.device, init_scale=2.0**10)
    scaled_step(ours, optimizer, scaler, 0, None, bad="norm.weight")
    scaled_step(ours, optimizer, scaler, 1, None)
    plain_step(expected, plain, 1, None)
    for problem, each in ((ours, optimizer), (expected, plain)):
        plain_step(problem, each, 2, None)
    assert_same(ours, expected)
