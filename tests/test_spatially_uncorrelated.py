"""SUA against its dense definition: patches by indices, A by torch.kron over kernel offsets, and a dense solve."""

import copy
import io
import itertools

import pytest
import torch
from mbf_optim import KFAC, TwoLevelKFAC
from mbf_optim.affine import affine_layers
from test_capture import own_gradients
from test_kfac import PLAIN, dense_direction, dense_factors, loss_of
from test_two_level import flat
from torch import nn
from torch.nn import functional

from mbf_kernels.testing import assert_bitwise, randn

SUA = PLAIN | dict(spatially_uncorrelated=True)
NETWORKS = {
    "plain": (lambda: [nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, (2, 3), bias=False)], (5, 2, 4, 4)),
    "strides and groups": (
        lambda: [nn.Conv2d(4, 6, (2, 3), stride=2, groups=2, padding=(1, 0)), nn.Tanh(), nn.Conv2d(6, 6, 2, groups=6)],
        (5, 4, 5, 6),
    ),
    "dilations and padding modes": (
        lambda: [
            nn.Conv2d(2, 3, 2, dilation=(2, 1), padding=(1, 2), padding_mode="reflect"),
            nn.Tanh(),
            nn.Conv2d(3, 2, 2, padding=1, padding_mode="replicate"),
        ],
        (5, 2, 4, 5),
    ),
    "one dimension": (
        lambda: [
            nn.Conv1d(2, 3, 3, dilation=2, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv1d(3, 2, 1),
            nn.Flatten(),
            nn.Linear(10, 2),
        ],
        (5, 2, 7),
    ),
}
over_networks = pytest.mark.parametrize("network", NETWORKS)


def network_of(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    return nn.Sequential(*make()).double(), randn(*shape, dtype=torch.float64) + 0.5


def stepped(model, inputs, make=KFAC, **options):
    """The direction of one step, by layer."""
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = make(model, **SUA | options)
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    old = iter(before)
    directions = [
        layer.joined(*[(next(old) - p.detach()) / 0.1 for p in layer.params]) for layer in affine_layers(model)
    ]
    return directions, optimizer


def patches(conv, inputs):
    """[samples x locations x offsets, channels], and the number of locations."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pads = [pad for size in reversed(conv.padding) for pad in (size, size)]
    padded = functional.pad(inputs, pads, mode=mode)
    outputs = conv(inputs[:1]).shape[2:]
    found = []
    for location in itertools.product(*map(range, outputs)):
        for offset in itertools.product(*map(range, conv.kernel_size)):
            every = zip(location, conv.stride, offset, conv.dilation, strict=True)
            at = [t * stride + delta * dilation for t, stride, delta, dilation in every]
            found.append(padded[(slice(None), slice(None), *at)])
    return torch.cat(found), outputs.numel()


def dense_a(layer, inputs):
    """A of every group, the offset before the channel."""
    offsets, found = layer.weight[0, 0].numel(), []
    every, locations = patches(layer.module, inputs)
    for x in every.chunk(layer.groups, 1):
        mean, covariance = x.mean(0), torch.cov(x.T, correction=0).view(x.shape[1], -1)
        ones = torch.ones(offsets, 1).double()
        a = torch.kron(torch.eye(offsets).double(), covariance) + torch.kron(ones @ ones.T, torch.outer(mean, mean))
        if layer.bias is not None:
            border = torch.kron(ones, mean[:, None])
            a = torch.cat([torch.cat([a, border], 1), torch.cat([border.T, torch.ones(1, 1).double()], 1)])
        found.append(locations * a)
    return found


def by_offset(layer, matrix):
    """[q, p] with the offset before the channel."""
    count = layer.weight[0].numel()
    weights = matrix[:, :count].unflatten(1, (layer.weight.shape[1], -1)).mT.flatten(1)
    return torch.cat([weights, matrix[:, count:]], 1)


@over_networks
@pytest.mark.parametrize("form", ["factored", "unbalanced", "exact"])
def test_a_step_is_the_dense_one(network, form):
    model, inputs = network_of(network)
    dense, x = {}, inputs
    for layer in affine_layers(model):
        dense[layer.name] = dense_factors(model, inputs, layer)
    for name, module in model.named_children():
        if name in dense and not isinstance(module, nn.Linear):
            layer = next(layer for layer in affine_layers(model) if layer.name == name)
            if layer.weight[0, 0].numel() > 1:
                dense[name] = dense_a(layer, x.detach()), dense[name][1]
        x = module(x)
    directions, _ = stepped(model, inputs, damping=0.3, damping_form=form)
    for layer, direction in zip(affine_layers(model), directions, strict=True):
        gradients = layer.joined(*[param.grad for param in layer.params])
        for a, g, gradient, moved in zip(*dense[layer.name], gradients, direction, strict=True):
            if layer.weight.ndim > 2:
                gradient, moved = by_offset(layer, gradient), by_offset(layer, moved)
            expected = dense_direction(a, g, gradient, 0.3, form)
            torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["factored", "exact"])
def test_without_several_offsets_it_is_kfc(form):
    """Of 1x1 kernels (with strides, padding and groups) and of linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)
    ).double()
    twin, inputs = copy.deepcopy(model), randn(5, 4, 4, 4, dtype=torch.float64)
    stepped(model, inputs, damping_form=form)
    stepped(twin, inputs, damping_form=form, spatially_uncorrelated=False)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("bias", [True, False])
def test_where_positions_are_uncorrelated_it_is_kfc(bias):
    """Every combination of three vectors at three positions, once: no covariance between positions, but a mean."""
    torch.manual_seed(0)
    vectors = randn(3, 2, dtype=torch.float64) + 1
    inputs = torch.stack([torch.stack(triple, 1) for triple in itertools.product(vectors, repeat=3)])
    model = nn.Sequential(nn.Conv1d(2, 2, 3, bias=bias), nn.Tanh()).double()
    twin = copy.deepcopy(model)
    (sua,), _ = stepped(model, inputs)
    (kfc,), _ = stepped(twin, inputs, spatially_uncorrelated=False)
    torch.testing.assert_close(sua, kfc, rtol=1e-12, atol=1e-12)


def test_undamped_weights_are_preconditioned_offset_by_offset():
    """By the inverse of the moments of [channels, 1], the gradient of the bias beside that of each offset; the bias by
    its gradient over T less what the weights move it by at the mean."""
    model, inputs = nn.Conv2d(2, 3, 2).double(), randn(6, 2, 4, 4, dtype=torch.float64) + 1
    (moved,), optimizer = stepped(model, inputs, damping=0.0)
    every, locations = patches(model, inputs)
    ones = torch.cat([every, torch.ones(len(every), 1).double()], 1)
    moments = locations * ones.T @ ones / len(ones)
    left = torch.linalg.inv(optimizer.state[model.weight]["G"][0])
    gradient = torch.cat([model.weight.grad.flatten(2), model.bias.grad[:, None, None].expand(3, 1, 4)], 1)
    expected = left @ torch.einsum("qck,cd->qdk", gradient, torch.linalg.inv(moments)).flatten(1)
    weights = expected.view(3, 3, 4)[:, :2]
    torch.testing.assert_close(moved[0, :, :-1].view(3, 2, 4), weights, rtol=1e-9, atol=1e-9)
    bias = left @ model.bias.grad / locations - weights.sum(2) @ every.mean(0)
    torch.testing.assert_close(moved[0, :, -1], bias, rtol=1e-9, atol=1e-9)


def test_passes_with_different_numbers_of_locations():
    """mu and Sigma over all patches there are."""
    model = nn.Conv1d(2, 3, 2).double()
    batches = [randn(4, 2, 6, dtype=torch.float64), randn(3, 2, 4, dtype=torch.float64)]
    optimizer = KFAC(model, **SUA)
    for batch in batches:
        loss_of(model(batch)).sum().backward()
    optimizer.step()
    every = torch.cat([patches(model, batch)[0] for batch in batches])
    locations = (4 * 5 + 3 * 3) / 7
    expected = locations * torch.cov(every.T, correction=0)
    torch.testing.assert_close(optimizer.state[model.weight]["A_deviation"][0], expected, rtol=1e-12, atol=1e-12)


def test_matrices_are_averaged_and_reported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 2, 3, groups=2), nn.Flatten(), nn.Linear(8, 2)).double()
    optimizer, expected = KFAC(model, decay=0.4, **SUA | dict(lr=0.0)), {}
    for k in range(1, 4):
        inputs = randn(5, 4, 4, 4, dtype=torch.float64, seed=k)
        optimizer.zero_grad()
        loss_of(model(inputs)).mean().backward()
        optimizer.step()
        twin = copy.deepcopy(model)
        _, alone = stepped(twin, inputs)
        keep = min(1 - 1 / k, 0.4)
        for name in ("A_deviation", "A_mean"):
            expected[name] = keep * expected.get(name, 0) + (1 - keep) * alone.state[twin[0].weight][name]
            torch.testing.assert_close(optimizer.state[model[0].weight][name], expected[name])
    rows = {row.name: row for row in optimizer.report()}
    assert rows["0.weight + bias"].structure == "A 2x2 and 3x3, G 1x1"
    assert (rows["0.weight + bias"].count, rows["0.weight + bias"].size) == (6, 3)
    assert rows["2.weight + bias"].structure == "A 9x9, G 2x2"


def test_an_option_of_a_group():
    model, inputs = network_of("plain")
    groups = [dict(params=model[0].parameters(), spatially_uncorrelated=False), dict(params=model[2].parameters())]
    optimizer = KFAC(model, groups=groups, **SUA)
    loss_of(model(inputs)).mean().backward()
    optimizer.step()
    assert [row.structure for row in optimizer.report()] == ["A 9x9, G 3x3", "A 3x3 and 3x3, G 2x2"]


@pytest.mark.parametrize("form", ["factored", "exact"])
def test_a_resumed_run_has_the_same_bits(form):
    def train(model, optimizer, steps, first):
        for t in range(first, first + steps):
            optimizer.zero_grad()
            loss_of(model(randn(5, 2, 4, 4, dtype=torch.float64, seed=t))).mean().backward()
            optimizer.step()

    options = dict(update_interval=2, factor_interval=5, damping_form=form, spatially_uncorrelated=True)
    (model, _), (other, _) = network_of("plain"), network_of("plain")
    optimizer, resumed = KFAC(model, **options), KFAC(other, **options)
    train(model, optimizer, 7, 0)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for net, opt in ((model, optimizer), (other, resumed)):
        train(net, opt, 6, 7)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(a, b)


def test_two_levels_correct_it():
    """What is added to zeta is in the span of R0, and R0 F delta = R0 grad: together that is the correction."""
    model, inputs = network_of("strides and groups")
    twin = copy.deepcopy(model)
    layers = affine_layers(model)
    own = [own_gradients(model, layer, inputs, loss_of) for layer in layers]
    columns = torch.stack([flat([part[n] for part in own]) for n in range(len(inputs))], 1)
    fisher = columns @ columns.T / len(inputs) + 0.3 * torch.eye(len(columns)).double()
    space = torch.block_diag(*[torch.ones(1, torch.Size(layer.shape).numel()).double() for layer in layers])
    zeta, _ = stepped(twin, inputs, damping=0.3)
    delta, _ = stepped(model, inputs, TwoLevelKFAC, damping=0.3)
    torch.testing.assert_close(space @ fisher @ flat(delta), space @ columns.mean(1), rtol=1e-9, atol=1e-9)
    added = flat(delta) - flat(zeta)
    assert added.norm() > 1e-3
    projected = space.T @ (space @ added / space.sum(1))
    torch.testing.assert_close(added, projected, rtol=1e-9, atol=1e-9)


def test_two_levels_refuse_a_space_that_is_not_unique():
    with pytest.raises(ValueError, match="^TwoLevelKFAC: expected coarse other than 'spectral'"):
        TwoLevelKFAC(nn.Conv2d(2, 2, 2), coarse="spectral", spatially_uncorrelated=True)
