"""Models in bfloat16 and float16: statistics and directions in float32, rounded once to what the parameters are in."""

import io

import pytest
import torch
from mbf_optim import KBFGS, KBFGSL, KFAC, KPSVD, AdaFisher, AdaFisherW, TwoLevelKFAC
from torch import nn

from mbf_kernels.testing import assert_bitwise, randn

MOMENTA = ("momentum_buffer", "average")
LAYERWISE = dict(lr=1.0, momentum=0.0, kl_clip=1e-2, update_interval=1, factor_interval=1)
METHODS = {
    "KFAC": (KFAC, LAYERWISE),
    "KFAC, exact": (KFAC, LAYERWISE | dict(damping_form="exact")),
    "KFAC, SUA": (KFAC, LAYERWISE | dict(spatially_uncorrelated=True)),
    **{f"KPSVD, {m}": (KPSVD, LAYERWISE | dict(method=m)) for m in ("kpsvd", "deflation", "lanczos", "kfac_corrected")},
    "TwoLevelKFAC": (TwoLevelKFAC, LAYERWISE),
    "TwoLevelKFAC, additive": (TwoLevelKFAC, LAYERWISE | dict(form="additive")),
    "TwoLevelKFAC, spectral": (TwoLevelKFAC, LAYERWISE | dict(coarse="spectral")),
    "KBFGS": (KBFGS, dict(lr=1.0, momentum=0.0)),
    "KBFGSL": (KBFGSL, dict(lr=1.0, momentum=0.0)),
    "AdaFisher": (AdaFisher, dict(beta=0.0, damping=0.1)),
    "AdaFisherW": (AdaFisherW, dict(beta=0.0, relative_damping=0.1)),
}
over_methods = pytest.mark.parametrize("method", METHODS)
over_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def rounded(*shape, dtype, seed):
    return randn(*shape, dtype=torch.float32, seed=seed).to(dtype)


@over_methods
@over_dtypes
def test_a_direction_is_the_one_of_float32(method, dtype):
    """The output's gradients are given, and inputs and gradients have the same values for both. From zero the weights
    move by the direction, rounded, times a rate, rounded: twice eps / 2."""
    make, options = METHODS[method]
    inputs, gradients = rounded(6, 4, 5, 4, dtype=dtype, seed=0), rounded(6, 4, 4, 3, dtype=dtype, seed=1)
    moved = []
    for working in (dtype, torch.float32):
        model = nn.Conv2d(4, 4, 2, groups=2).to(working)
        grads = [rounded(*param.shape, dtype=dtype, seed=2).to(working) for param in model.parameters()]
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        torch.manual_seed(0)  # of the power iterations
        optimizer = make(model, **options)

        def closure(model=model, grads=grads, working=working):
            loss = (model(inputs.to(working)) * gradients.to(working)).float().sum()
            loss.backward()
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.grad = grad.clone()
            return loss

        optimizer.step(closure)
        moved.append([param.detach().float() for param in model.parameters()])
        assert sum(row.skipped for row in optimizer.report()) == (2 if "BFGS" in method else 0)  # y = 0 in both groups
    for half, full in zip(*moved, strict=True):
        assert full.abs().max() > 1e-4
        torch.testing.assert_close(half, full, rtol=torch.finfo(dtype).eps, atol=1e-7)  # float16's steps below 6e-5


def network(dtype):
    torch.manual_seed(0)
    modules = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    return nn.Sequential(*modules).to(dtype)


def train(model, optimizer, steps, dtype):
    """The losses, on a batch whose first pixels decide its labels."""
    inputs, losses = rounded(32, 2, 4, 4, dtype=dtype, seed=3), []
    labels = inputs[:, 0, 0, :3].argmax(1)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
    return losses


def gentle(method):
    make, options = METHODS[method]
    if issubclass(make, AdaFisher):
        return make, dict(lr=0.03, damping=0.1, update_interval=2)
    if make in (KBFGS, KBFGSL):
        return make, dict(lr=0.3)
    return make, options | dict(lr=0.05, momentum=0.9, damping=0.1, update_interval=2, factor_interval=2)


@over_methods
@over_dtypes
def test_training_goes_as_in_float32(method, dtype):
    """To some roundings of bfloat16, which the differences of K-BFGS enlarge. What a state holds is in float32, but for
    momenta."""
    make, options = gentle(method)
    model, full = network(dtype), network(dtype).float()
    optimizer = make(model, **options)
    torch.manual_seed(0)
    losses = train(model, optimizer, 8, dtype)
    torch.manual_seed(0)
    expected = train(full, make(full, **options), 8, torch.float32)
    assert losses[-1] < 0.97 * losses[0]
    torch.testing.assert_close(losses, expected, rtol=0.03, atol=0)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == (dtype if name in MOMENTA else torch.float32), name


@over_methods
@over_dtypes
def test_a_resumed_run_has_the_same_bits(method, dtype):
    """A state keeps its dtypes, whatever the parameters are in."""
    make, options = gentle(method)
    model, other = network(dtype), network(dtype)
    optimizer, resumed = make(model, **options), make(other, **options)
    train(model, optimizer, 3, dtype)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for net, opt in ((model, optimizer), (other, resumed)):
        torch.manual_seed(1)
        train(net, opt, 3, dtype)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(a, b)


def test_squares_that_overflow_float16_do_not():
    model = nn.Linear(3, 2).half()
    optimizer = KFAC(model)
    model(torch.full((8, 3), 300.0).half()).float().mean().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model.weight]["A"][0, :3, :3], torch.full((3, 3), 9e4))
    assert [row.skipped for row in optimizer.report()] == [0]


def test_a_direction_is_clipped_before_it_is_rounded():
    """That of a small gradient is large, here 1e-5 / (1e-6 1e-4) = 1e5, beyond float16; clipped it is 100."""
    model = nn.Linear(1, 1, bias=False).half()
    nn.init.zeros_(model.weight)
    optimizer = KFAC(model, lr=0.01, damping=0.0, momentum=0.0, kl_clip=1e-10)
    (model(torch.full((4, 1), 1e-3).half()) * 0.01).float().mean().backward()
    optimizer.step()
    assert abs(model.weight.item() + 1) <= 0.02  # float16's steps at 1e-5 are of half a percent


def test_targets_are_drawn_in_float32():
    """And their gradients go back in the output's dtype."""
    seen = []

    def residual(outputs):
        seen.append(outputs.dtype)
        return torch.full_like(outputs, 0.3)

    model = nn.Linear(3, 2).bfloat16()
    optimizer = KFAC(model, distribution=residual)
    model(rounded(4, 3, dtype=torch.bfloat16, seed=0)).float().sum().backward()
    optimizer.step()
    assert seen == [torch.float32]
    square = torch.tensor(0.3).bfloat16().float().square()
    torch.testing.assert_close(optimizer.state[model.weight]["G"][0], square.expand(2, 2))
