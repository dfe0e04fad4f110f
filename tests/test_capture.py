"""What layers are seen to do: rows give back every sample's own gradient, whatever the model does around the layer."""

import copy
import gc
import io
import pickle

import pytest
import torch
from mbf_optim.affine import affine_layers
from mbf_optim.capture import Capture
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from mbf_kernels.testing import randn

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "linear, sequences": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (4, 4, 11)),
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (4, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (4, 2, 6, 5)),
    "conv2d, stride": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 2, 6, 5)),
    "conv2d, dilation": (lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3), padding=2), (4, 2, 6, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 4, 5, 5)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (4, 2, 6, 5)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (4, 2, 6, 5)),
    **{
        f"conv2d, {mode}": (lambda mode=mode: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode), (4, 2, 6, 5))
        for mode in ("reflect", "replicate", "circular")
    },
}


def loss_of(outputs, mean=True):
    """Not symmetric in anything; of a sample its sum."""
    weights = torch.linspace(1, 2, outputs[0].numel(), dtype=outputs.dtype).view(outputs.shape[1:])
    losses = ((outputs + outputs.square()) * weights).flatten(1).sum(1)
    return losses.mean() if mean else losses.sum()


def own_gradients(model, layer, inputs, loss_of=loss_of):
    """Of every sample alone [m, groups, q, p], by torch.func."""
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params, sample):
        return loss_of(functional_call(model, params, (sample[None],))).sum()

    found = vmap(grad(loss), (None, 0))(params, inputs)
    names = {id(param): name for name, param in model.named_parameters()}
    return torch.stack(
        [layer.joined(*[found[names[id(param)]][n] for param in layer.params]) for n in range(len(inputs))]
    )


def watched(model):
    layers = affine_layers(model)
    return layers, Capture(model, [layer.module for layer in layers])


def assert_rows(rows, expected):
    """sum over t of g a^T, of every sample."""
    actual = torch.einsum("mtgq,mtgp->mgqp", rows.gradients, rows.inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mean", [True, False])
def test_rows_are_the_samples_gradients(layer, mean):
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model, inputs = make().double(), randn(*shape, dtype=torch.float64)
    (layer,), capture = watched(model)
    loss_of(model(inputs), mean).backward()
    rows = layer.rows(capture.uses(layer.module), mean_loss=mean)
    assert_rows(rows, own_gradients(model, layer, inputs))
    assert rows.locations == rows.inputs.shape[1]
    assert rows.inputs.shape[2:] == (layer.shape[0], layer.shape[2]) and rows.gradients.shape[2:] == layer.shape[:2]
    for tensors in (layer.params, [torch.ones_like(p) for p in layer.params]):
        for tensor, back in zip(tensors, layer.split(layer.joined(*tensors)), strict=True):
            torch.testing.assert_close(back, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mean", [True, False])
def test_means_are_those_of_rows(layer, mean):
    """Of two passes, one over part of the samples and with the module used twice; so is the number of samples, and the
    mean of outputs."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model, inputs = make().double(), randn(*shape, dtype=torch.float64)
    outer = nn.ModuleList([model])
    (layer,) = affine_layers(outer)
    capture = Capture(outer, [model])
    for part in (inputs, inputs[1:].sin()):
        capture._begin_pass(outer, ())
        outputs = torch.cat([model(part), *([model(part.square())] if len(part) < len(inputs) else [])], -1)
        loss_of(outputs, mean).backward()
    uses = capture.uses(model)
    rows, seen = layer.rows(uses, mean), [layer.patches(use.inputs) for use in uses]
    m, t = rows.inputs.shape[:2]
    assert len(uses) == 3 and layer.extent(uses) == (m, round(rows.locations * m), t) and m == 2 * len(inputs) - 1
    abar, g = layer.means(uses, mean)
    locations = sum(patches.shape[0] * patches.shape[1] for patches in seen)
    for actual, part in ((abar, rows.inputs), (g, rows.gradients)):
        torch.testing.assert_close(actual, part.sum((0, 1)) / locations, rtol=1e-12, atol=1e-12)
    weight = layer.joined(*layer.params).detach()
    torch.testing.assert_close(layer.outputs(abar).detach(), torch.einsum("gqp,gp->gq", weight, abar))


@pytest.mark.parametrize("layer", ["linear", "conv2d, groups"])
def test_an_accumulated_gradient_is_one_batch(layer):
    """Each part's loss divided by the number of parts, as is usual; parts of different lengths too."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model, inputs = make().double(), randn(*shape, dtype=torch.float64)
    (layer,), capture = watched(model)
    for part in inputs.split(2):
        (loss_of(model(part)) / 2).backward()
    assert_rows(layer.rows(capture.uses(layer.module), True), own_gradients(model, layer, inputs))
    capture.clear()
    assert capture.uses(layer.module) == []


class Wild(nn.Module):
    """A layer used twice, in-place activations, and what may surround a layer."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.checkpointed = checkpointed

    def middle(self, x):
        return torch.tanh(self.shared(torch.relu_(self.shared(input=x))))

    def forward(self, x):
        x = torch.relu_(self.first(x).mul_(2.0))
        x = self.middle(x) if self.checkpointed is None else checkpoint(self.middle, x, **self.checkpointed)
        return self.last(x)


@pytest.mark.parametrize("checkpointed", [None, dict(use_reentrant=False), dict(use_reentrant=True)], ids=str)
def test_shared_modules_in_place_activations_and_checkpoints(checkpointed):
    torch.manual_seed(0)
    model, inputs = Wild(checkpointed).double(), randn(6, 4, dtype=torch.float64)
    layers, capture = watched(model)
    loss_of(model(inputs)).backward()
    plain = Wild().double()
    plain.load_state_dict(model.state_dict())
    for layer, twin in zip(layers, affine_layers(plain), strict=True):
        rows = layer.rows(capture.uses(layer.module), True)
        assert rows.locations == (2 if layer.name == "shared" else 1)
        assert_rows(rows, own_gradients(plain, twin, inputs))


@pytest.mark.parametrize("layer", LAYERS)
def test_in_place_activations_of_every_layer(layer):
    """Linear gives a view for sequences, and an in-place change drops the hooks of a view."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    inputs = randn(*shape, dtype=torch.float64)
    model = nn.Sequential(make(), nn.ReLU(inplace=True)).double()
    (known,), capture = watched(model)
    loss_of(model(inputs)).backward()
    assert_rows(known.rows(capture.uses(known.module), True), own_gradients(model, known, inputs))


def test_passes_with_different_numbers_of_locations():
    """Shorter samples get rows of zeros; the mean counts what is there."""
    model = nn.Linear(3, 2).double()
    (layer,), capture = watched(model)
    batches = [randn(2, 4, 3, dtype=torch.float64), randn(1, 1, 3, dtype=torch.float64)]
    for batch in batches:
        loss_of(model(batch), mean=False).backward()
    rows = layer.rows(capture.uses(model), False)
    assert rows.inputs.shape == (3, 4, 1, 4) and rows.locations == 9 / 3
    expected = torch.cat([own_gradients(model, layer, batch) for batch in batches])
    assert_rows(rows, expected)


def test_what_is_not_recorded():
    model = Wild().double()
    layers, capture = watched(model)
    inputs = randn(6, 4, dtype=torch.float64)
    model.first.requires_grad_(False)
    model.last.eval()
    with torch.no_grad():
        model(inputs)
    model(inputs)  # without a backward pass
    loss_of(model(inputs)).backward()
    assert [len(capture.uses(layer.module)) for layer in layers] == [0, 2, 0]
    capture.clear()
    capture.recording = False
    loss_of(model(inputs)).backward()
    assert [len(capture.uses(layer.module)) for layer in layers] == [0, 0, 0]


def test_only_modules_that_are_wanted_are_looked_at():
    model, wanted = Wild().double(), Wanted()
    capture = Capture(model, [model.first, model.shared, model.last], wanted.looks)
    wanted.modules = {model.shared}
    loss_of(model(randn(6, 4, dtype=torch.float64))).backward()
    assert [len(capture.uses(module)) for module in (model.first, model.shared, model.last)] == [0, 2, 0]
    assert capture.called == {model.shared}


class Wanted:
    def looks(self, module):
        return module in self.modules


def test_a_frozen_bias_is_no_part_of_the_matrix():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    (layer,) = affine_layers(model)
    assert layer.bias is None and layer.shape == (1, 2, 3)


def test_tied_weights_are_no_layers():
    """Of an embedding the inputs are not known; and two layers are not one that is used twice."""
    embedding, head, a, b = nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(3, 3), nn.Linear(3, 3)
    head.weight, b.bias = embedding.weight, a.bias
    single = nn.Linear(3, 3)
    layers = affine_layers(nn.ModuleDict(dict(e=embedding, head=head, a=a, b=b, single=single, again=single)))
    assert [layer.name for layer in layers] == ["single"]


def test_samples_without_a_batch_dimension():
    for model, shape in ((nn.Linear(3, 2), (3,)), (nn.Conv2d(2, 3, 2), (2, 4, 4)), (nn.Conv1d(2, 3, 2), (2, 4))):
        model, inputs = model.double(), randn(*shape, dtype=torch.float64)
        (layer,), capture = watched(model)
        model(inputs).square().sum().backward()
        rows = layer.rows(capture.uses(model), True)
        assert_rows(rows, layer.joined(model.weight.grad, model.bias.grad)[None])


def test_autocast_gives_rows_of_the_weights_dtype():
    model = nn.Linear(3, 2)
    (layer,), capture = watched(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(randn(4, 3, dtype=torch.float32)).float().square().mean()
    loss.backward()
    rows = layer.rows(capture.uses(model), True)
    assert rows.inputs.dtype == rows.gradients.dtype == torch.float32


def test_hooks_bind_neither_the_model_nor_its_copies():
    """A copied or pickled model records nothing, and a capture that is gone leaves no hook behind."""
    model = nn.Sequential(nn.Linear(3, 2))
    layers, capture = watched(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        other(randn(4, 3, dtype=torch.float32)).sum().backward()
        assert capture.uses(layers[0].module) == []
    del capture
    gc.collect()
    assert not model._forward_pre_hooks and not model[0]._forward_hooks


# ---- what reaches the weights, and what does not


def recorded(backward, inputs=None):
    """Rows of a linear layer's samples after ``backward(model, inputs)``, and the gradients that they should be of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs = randn(5, 4, dtype=torch.float64) if inputs is None else inputs
    layers, capture = watched(model)
    backward(model, inputs)
    for layer in layers:
        rows = layer.rows(capture.uses(layer.module), True)
        actual = torch.einsum("mtgq,mtgp->gqp", rows.gradients, rows.inputs) / len(rows.inputs)
        yield rows, actual, layer.joined(*[param.grad for param in layer.params])


def two_losses(model, inputs):
    outputs = model(inputs)
    loss_of(outputs).backward(retain_graph=True)
    outputs.square().sum(1).mean().backward()


def side_gradients(model, inputs):
    """Of another batch, of the same pass for a penalty's sake, and a backward pass whose result is dropped."""
    attacked = inputs.clone().requires_grad_()
    torch.autograd.grad(loss_of(model(attacked)), attacked)
    loss_of(model(inputs)).backward()
    model.zero_grad()
    outputs = model(attacked)
    (slope,) = torch.autograd.grad(outputs.sum(), attacked, create_graph=True)
    torch.autograd.grad(slope.square().sum(), model[0].weight, retain_graph=True)
    loss_of(outputs).backward()


def gradients_by_hand(model, inputs):
    params = list(model.parameters())
    for param, gradient in zip(params, torch.autograd.grad(loss_of(model(inputs)), params), strict=True):
        param.grad = gradient


@pytest.mark.parametrize("backward", [two_losses, side_gradients, gradients_by_hand])
def test_rows_are_of_what_reached_the_weights(backward):
    """Samples, not uses: two losses of one pass are one loss."""
    for rows, actual, expected in recorded(backward):
        assert rows.locations == 1 and len(rows.inputs) == 5
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_side_gradients_do_not_pile_up():
    model = nn.Sequential(nn.Linear(4, 3))
    _, capture = watched(model)
    for _ in range(5):
        inputs = torch.ones(2, 4, requires_grad=True)
        torch.autograd.grad(model(inputs).sum(), inputs)
    assert len(capture.uses(model[0])) == 1


def test_a_frozen_weights_bias_accumulates_too():
    model = nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    _, capture = watched(model)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    assert len(capture.uses(model)) == 2
    model.weight.requires_grad_(True)
    model(torch.ones(2, 4)).sum().backward()
    assert [len(use.inputs) for use in capture.uses(model)] == [2]  # the weight's first


def test_parts_of_a_model_may_be_called_by_themselves():
    """Two batches in turn are no two locations of the same samples."""

    def apart(model, inputs):
        for part in inputs.split([2, 3]):
            outputs = model[2](torch.tanh(model[0](part)))
            (loss_of(outputs) * len(part) / len(inputs)).backward()

    for rows, actual, expected in recorded(apart):
        assert rows.locations == 1 and len(rows.inputs) == 5
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_a_call_without_samples_is_none():
    """Of a part of a batch, or of an expert that is not asked."""

    def halves(model, inputs):
        for part in (inputs[:0], inputs):
            model(part).square().sum(1).sum().div(len(inputs)).backward()

    for rows, actual, expected in recorded(halves):
        assert len(rows.inputs) == 5
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    for model, shape in ((nn.Conv2d(2, 3, 2), (0, 2, 4, 4)), (nn.Linear(3, 0), (2, 3)), (nn.Linear(0, 3), (2, 0))):
        (layer,), capture = watched(model)
        model(torch.zeros(shape)).sum().backward()
        assert capture.uses(layer.module) == []


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Frozen(nn.Linear):
    @torch.no_grad()
    def forward(self, input):
        return super().forward(input)


@pytest.mark.parametrize("kind", [Pair, Frozen])
def test_outputs_that_no_gradient_comes_back_to_as_a_tensor(kind):
    model = kind(3, 2)
    _, capture = watched(model)
    model(torch.ones(4, 3))
    assert capture.uses(model) == []


def test_transforms_of_torch_func_are_let_be():
    model, inputs = nn.Sequential(nn.Linear(3, 3)).double(), randn(4, 3, dtype=torch.float64)
    expected = model(inputs).detach()
    _, capture = watched(model)
    torch.testing.assert_close(vmap(model)(inputs).detach(), expected)
    torch.func.jvp(model, (inputs,), (inputs,))
    params = {name: param.detach() for name, param in model.named_parameters()}
    grad(lambda params: functional_call(model, params, (inputs,)).sum())(params)
    assert capture.uses(model[0]) == []


class CausalConv1d(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


class TimeLast(nn.Linear):
    def forward(self, x):
        return super().forward(x).mT


def test_a_subclass_that_does_something_else_does_not_fit():
    for model, shape, fits in (
        (CausalConv1d(2, 3, 3), (4, 2, 6), False), (TimeLast(3, 2), (4, 5, 3), False),
        (nn.Conv1d(2, 3, 3, stride=2), (2, 6), True), (nn.Linear(3, 2), (3,), True),
    ):  # fmt: skip
        (layer,), capture = watched(model)
        model(torch.ones(shape)).sum().backward()
        assert [layer.fits(use) for use in capture.uses(model)] == [fits]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_fits(layer):
    make, shape = LAYERS[layer]
    (known,), capture = watched(model := make())
    model(randn(*shape, dtype=torch.float32)).sum().backward()
    assert [known.fits(use) for use in capture.uses(model)] == [True]


def test_inputs_that_are_overwritten():
    """Before the statistics are made of them; under autocast a copy is kept."""
    model = nn.Linear(3, 3)
    _, capture = watched(model)
    buffer = torch.ones(4, 3)
    model(buffer).sum().backward()
    (use,) = capture.uses(model)
    assert not use.overwritten
    buffer.add_(1)
    assert use.overwritten
    capture.clear()
    x = torch.ones(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        x += y
    x.sum().backward()
    (use,) = capture.uses(model)
    assert not use.overwritten and use.inputs.eq(1).all()


def test_a_users_hook_that_changes_the_output():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model[0].register_forward_hook(lambda module, args, output: 10 * output)
    (layer,), capture = watched(model)
    model(randn(4, 3, dtype=torch.float64)).sum().backward()
    (use,) = capture.uses(layer.module)
    assert use.gradients.eq(10).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_a_weight_that_is_made_of_others_is_no_layers(make):
    model = nn.Sequential(make(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert [layer.name for layer in affine_layers(model)] == ["1"]
