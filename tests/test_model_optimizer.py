"""What the optimizers that look at layers have in common: when they look, what they keep, what they refuse."""

import copy
import io
from functools import partial

import pytest
import torch
from mbf_optim import KBFGS, KBFGSL, KFAC, KPSVD, AdaFisher, AdaFisherW, TwoLevelKFAC
from mbf_optim.kronecker import inverses
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mbf_kernels import SymmetricBlocks, factor
from mbf_kernels.testing import assert_bitwise, randn

KINDS = {
    "KFAC": KFAC,
    "KFAC, exact": lambda model, **options: KFAC(model, damping_form="exact", **options),
    **{
        f"KPSVD, {method}": lambda model, method=method, **options: KPSVD(model, method=method, **options)
        for method in ("kpsvd", "deflation", "lanczos", "kfac_corrected")
    },
    "two-level": TwoLevelKFAC,
    "two-level, additive": lambda model, **options: TwoLevelKFAC(model, form="additive", **options),
    "AdaFisher": AdaFisher,
    "AdaFisherW": AdaFisherW,
}
QUASI = {"KBFGS": KBFGS, "KBFGSL": KBFGSL}
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_all = pytest.mark.parametrize("kind", KINDS | QUASI)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)).double()


def loss_of(model, t):
    outputs = model(randn(6, 4, dtype=torch.float64, seed=t))
    return nn.functional.cross_entropy(outputs, torch.arange(6) % 3)


def train(model, optimizer, steps, first=0):
    for t in range(first, first + steps):

        def closure(t=t):
            optimizer.zero_grad()
            loss = loss_of(model, t)
            loss.backward()
            return loss

        optimizer.step(closure)


def same(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert_bitwise(x, y)


@over_kinds
def test_a_state_that_is_loaded_back_goes_on_as_the_first_time(kind):
    """Into an optimizer that has stepped on, to where statistics were not due."""
    model = net()
    model[2].eval()
    optimizer = KINDS[kind](model, lr=0.01, update_interval=3)
    train(model, optimizer, 6)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 5, first=6)
    twin = copy.deepcopy(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, 5, first=6)
    same(model, twin)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("AdaFisher")])
@pytest.mark.parametrize("steps", [3, 5])
def test_targets_are_not_drawn_where_the_first_run_drew_none(kind, steps):
    """So that dropout sees the same random numbers."""
    options = dict(lr=0.01, update_interval=3, distribution="categorical")
    runs = []
    for resumed in (False, True):
        model = net()
        optimizer = KINDS[kind](model, **options)
        train(model, optimizer, steps)
        if resumed:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            model = net(seed=1)
            optimizer = KINDS[kind](model, **options)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        torch.manual_seed(7)
        train(model, optimizer, 7, first=steps)
        runs.append(model)
    same(*runs)


@over_kinds
def test_an_interval_that_is_changed_counts_at_once(kind):
    model = net()
    optimizer = KINDS[kind](model, lr=0.0, update_interval=5)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["update_interval"] = 1
    train(model, optimizer, 3)
    assert optimizer.state[model[0].weight]["updates"] == 4


@over_kinds
def test_a_layer_that_comes_late_has_curvature_from_its_first_step_on(kind):
    """Unfrozen between two updates, after a first step without gradients."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = KINDS[kind](model, lr=0.01, update_interval=10)
    optimizer.step()
    train(model, optimizer, 23, first=1)
    assert "updates" not in optimizer.state[model[0].weight]
    assert optimizer.state[model[3].weight]["updates"] == 3  # at the second step, the 11th and the 21st
    model[0].requires_grad_(True)
    train(model, optimizer, 1, first=24)
    row = optimizer.report()[0]
    assert optimizer.state[model[0].weight]["updates"] == 1 and row.structure != "gradient"
    if "Ada" not in kind:
        layer = optimizer._layer_of[model[0]]
        gradient = layer.joined(*[param.grad for param in layer.params])
        assert optimizer._direction(layer, gradient, optimizer.param_groups[0]) is not None


@over_all
def test_a_group_that_is_added_has_curvature(kind):
    model = net()
    optimizer = (KINDS | QUASI)[kind](model, lr=0.01, groups=[{"params": model[3].parameters()}])
    train(model, optimizer, 2)
    assert [row.name for row in optimizer.report()] == ["3.weight + bias"]
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, optimizer, 2, first=2)
    assert optimizer.state[model[0].weight]["updates"] >= 1
    assert "gradient" not in [row.structure for row in optimizer.report()]


@over_all
def test_layers_that_are_made_of_others_or_do_something_else(kind):
    """Weight norm, an expert that gets no sample, a subclass that shifts its input: all have a step."""

    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.causal, self.idle, self.last = Causal(1, 2, 3), nn.Linear(4, 2), nn.Linear(8, 3)

        def forward(self, x):
            x = self.normed(x)
            return self.last(self.causal(x[:, None]).flatten(1)) + self.idle(x[:0]).sum()

    model = Model().double()
    before = copy.deepcopy(model)
    optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
    train(model, optimizer, 2)
    structures = {row.name: row for row in optimizer.report()}
    assert structures["causal.weight"].structure == "gradient" if "causal.weight" in structures else True
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        moved = not torch.equal(a, b)
        assert a.isfinite().all() and moved == (not name.startswith("idle")), name


@over_all
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind):
    make = (KINDS | QUASI)[kind]
    model, other = net(), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
    optimizer, foreign = make(model, lr=0.01), make(other, lr=0.01)
    train(model, optimizer, 2)
    train(other, foreign, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="to have shape"):
        optimizer.load_state_dict(foreign.state_dict())
    with pytest.raises(ValueError, match="expected a state with"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["state"][index][name]) if isinstance(value, torch.Tensor) else (
                value == after["state"][index][name]
            )  # fmt: skip


@over_all
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_state_of_another_dtype_goes_on(kind, dtypes):
    saved, here = dtypes
    make = (KINDS | QUASI)[kind]
    model, other = net().to(saved), net().to(here)
    optimizer, resumed = make(model, lr=0.01), make(other, lr=0.01)
    inputs = randn(6, 4, dtype=torch.float64)

    def run(model, optimizer, dtype):
        def closure():
            optimizer.zero_grad()
            loss = model(inputs.to(dtype)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    run(model, optimizer, saved)
    resumed.load_state_dict(optimizer.state_dict())
    statistics = next(name for name in ("A", "R", "H") if name in resumed.state[other[0].weight])
    assert resumed.state[other[0].weight][statistics].dtype == saved
    run(other, resumed, here)
    for param in other.parameters():
        assert param.isfinite().all()
        assert all(value.dtype == here for value in resumed.state[param].values() if isinstance(value, torch.Tensor))


@over_all
def test_overwritten_inputs_are_left_out_and_counted(kind):
    model = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
    buffer = randn(6, 4, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model(buffer).square().mean()
        loss.backward()
        buffer.mul_(1.0)
        return loss

    optimizer.step(closure)
    (row,) = optimizer.report()
    assert row.skipped >= 1 and row.structure == "gradient" and model[0].weight.isfinite().all()


@pytest.mark.parametrize("kind", ["KFAC", "KPSVD, kpsvd", "KPSVD, deflation", "two-level"])
def test_a_layer_that_is_not_finite_leaves_the_others_alone(kind):
    """The clip goes over all layers."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).double()
    optimizer = KINDS[kind](model, lr=0.1, kl_clip=1e-3)
    model(randn(6, 4, dtype=torch.float64)).square().mean().backward()
    model[1].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert [layer.weight.isfinite().all().item() for layer in model] == [True, False, True]


def test_matrices_that_float32_cannot_factor():
    """Of rank 5, with a multiple of I that only just shows. Those that are positive definite have an inverse."""
    rows = [randn(20, 5, dtype=torch.float32, seed=seed) for seed in range(40)]
    matrices = torch.stack([x @ x.T + 1e-6 * torch.eye(20) for x in rows])
    definite = matrices[torch.linalg.eigvalsh(matrices.double()).amin(1) > 1e-7]
    _, info = factor(SymmetricBlocks.from_dense(definite), damping=0.0)
    assert (info != 0).any()
    for matrix in definite[info != 0]:
        ((inverse, good),) = inverses([matrix[None]])
        exact = torch.linalg.inv(matrix.double())
        assert good.all() and (inverse[0] - exact).norm() <= 1e-6 * exact.norm()  # 16 eps of float32


@pytest.mark.parametrize("kind", ["KFAC", "KPSVD, kpsvd"])
def test_without_an_inverse_the_gradient_is_taken(kind):
    """Inputs so large that no damping shows: the layer moves as under SGD, and is counted."""
    model, twin = nn.Linear(6, 2), nn.Linear(6, 2)
    twin.load_state_dict(model.state_dict())
    optimizer = KINDS[kind](model, lr=1e-3, damping=1e-30, momentum=0.0)
    sgd = torch.optim.SGD(twin.parameters(), lr=1e-3)
    inputs = randn(1, 6, dtype=torch.float32).expand(4, 6) * 1e3
    for net, opt in ((model, optimizer), (twin, sgd)):
        net(inputs).sin().mean().backward()
        opt.step()
    same(model, twin)
    assert optimizer.report()[0].skipped == 1


# ---- drawn targets


def test_structured_outputs():
    """A function of them says what is drawn, and from what nothing is."""

    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.body, self.head, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), kind

        def forward(self, x):
            hidden = self.body(x).tanh()
            logits = self.head(hidden)
            return {dict: {"logits": logits, "hidden": hidden}, tuple: (logits, hidden), None: logits}[self.kind]

    def residual(outputs):
        if isinstance(outputs, dict):
            return {"logits": outputs["logits"].sin()}
        return (outputs[0].sin(), None) if isinstance(outputs, tuple) else outputs.sin()

    runs = []
    for kind in (None, tuple, dict):
        torch.manual_seed(0)
        model = Model(kind).double()
        optimizer = KFAC(model, distribution=residual)
        outputs = model(randn(6, 4, dtype=torch.float64))
        (outputs["logits"] if kind is dict else outputs[0] if kind is tuple else outputs).square().mean().backward()
        optimizer.step()
        assert optimizer.state[model.body.weight]["updates"] == 1
        runs.append(model)
    same(*runs[:2])
    same(*runs[1:])
    with pytest.raises(TypeError, match="KFAC: expected the model to return a tensor, got tuple"):
        model, optimizer = Model(tuple), None
        optimizer = KFAC(model, distribution="categorical")
        model(torch.ones(2, 4))
    with pytest.raises(ValueError, match="expected distribution to return gradients of a tensor"):
        model = Model(None)
        optimizer = KFAC(model, distribution=lambda outputs: outputs[:1])
        model(torch.ones(2, 4))
    del optimizer


def test_models_without_anything_to_draw_for():
    for model in (
        nn.Sequential(nn.LayerNorm(3)),
        nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.LayerNorm(3)),
    ):
        optimizer = KFAC(model, distribution="categorical")
        nn.functional.cross_entropy(model(torch.ones(2, 3)), torch.zeros(2, dtype=torch.long)).backward()
        optimizer.step()


def test_a_branch_that_leads_nowhere_is_drawn_for_only_when_due():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.unused(x)
            return self.head(x)

    model, drawn = Model().double(), []

    def residual(outputs):
        drawn.append(len(outputs))
        return outputs.sin()

    optimizer = KFAC(model, update_interval=3, distribution=residual)
    train(model, optimizer, 7)
    assert len(drawn) == 3


# ---- bad input


@over_all
def test_what_every_one_refuses(kind):
    make, model = (KINDS | QUASI)[kind], net()
    title = kind.split(",")[0].replace("two-level", "TwoLevelKFAC")
    with pytest.raises(TypeError, match=f"{title}: expected model to be a torch.nn.Module, got generator"):
        make(model.parameters())
    with pytest.raises(ValueError, match=f"{title}: expected a model with parameters"):
        make(nn.Tanh())
    for name in ("lr", "damping", "weight_decay"):
        with pytest.raises(TypeError, match=f"{title}: expected {name} to be a number, got '0.1'"):
            make(model, **{name: "0.1"})
    if not title.startswith("AdaFisher"):
        with pytest.raises(TypeError, match=f"{title}: expected mean_loss to be True or False, got 'sum'"):
            make(model, mean_loss="sum")
    if kind not in QUASI:
        with pytest.raises(
            TypeError, match=f"{title}: expected grad_scaler to be a torch.amp.GradScaler or None, got 5"
        ):
            make(model, grad_scaler=5)


def test_options_of_one_kind():
    model = net()
    for wrong, name in (
        (lambda: KFAC(model, kl_clip=0.0), "kl_clip"), (lambda: KFAC(model, distribution=[]), "distribution"),
        (lambda: KPSVD(model, method=["kpsvd"]), "method"), (lambda: AdaFisher(model, variant=[1.0]), "variant"),
        (lambda: TwoLevelKFAC(model, groups=[{"params": model[0].parameters()},
                                             {"params": model[3].parameters(), "weight": 0.5}]), "weight"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"expected {name}"):
            wrong()
    with pytest.raises(TypeError, match="expected spatially_uncorrelated to be True or False"):
        KFAC(model, spatially_uncorrelated="no")


@pytest.fixture
def compiler():
    """Not Inductor, which takes seconds: what it gets is what it would be."""
    torch.compiler.reset()
    yield partial(torch.compile, backend="aot_eager")
    torch.compiler.reset()


@over_all
@pytest.mark.parametrize("place", ["around", "in place"])
def test_a_compiled_model_is_looked_at(kind, place, compiler):
    models = []
    for compiled in (False, True):
        model = net()
        model[2].eval()  # draws other numbers
        options = {} if kind in QUASI else {"update_interval": 2}
        optimizer = (KINDS | QUASI)[kind](model, lr=0.01, **options)
        called = model
        if compiled and place == "in place":
            model.compile(backend="aot_eager")
        elif compiled:
            called = compiler(model)
        train(called, optimizer, 3)
        assert optimizer.state[model[3].weight]["updates"] >= 2
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_compiled_model_may_draw_targets(compiler):
    models = []
    for wrap in (lambda model: model, compiler):
        model = net()
        model[2].eval()
        optimizer = KFAC(model, lr=0.01, distribution="categorical")
        train(wrap(model), optimizer, 3)
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@over_all
def test_a_model_that_was_compiled_and_called_before_is_refused(kind, compiler):
    """It would not call the optimizer's hooks; once it is compiled anew it does."""
    model = net()
    called = compiler(model)
    loss_of(called, 0).backward()
    model.zero_grad()
    optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="expected to notice the model's forward passes"):
        train(called, optimizer, 1)
    same(model, before)
    torch.compiler.reset()
    train(called, optimizer, 1)
    assert optimizer.state[model[0].weight]["updates"] == 1


@over_all
def test_a_state_by_name_takes_no_step(kind):
    """Where there is no state yet, torch.distributed.checkpoint would take one, with a learning rate of zero."""
    models = []
    for saved in (False, True):
        model = net()
        model[2].eval()
        optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
        if saved:
            state = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, optimizer, state)
            assert optimizer.param_groups[0]["step"] == 0 and all(param.grad is None for param in model.parameters())
        train(model, optimizer, 2)
        models.append(model)
    same(*models)


@over_all
def test_a_state_that_lost_statistics_is_refused(kind):
    """As one that was filled in by name: what a new optimizer does not have yet is not filled in."""
    model, other = net(), net(seed=1)
    optimizer, new = ((KINDS | QUASI)[kind](m, lr=0.01) for m in (model, other))
    train(model, optimizer, 2)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    with pytest.raises(ValueError, match="expected a state of .* tensors in a group, got 4; .* take a step before"):
        set_optimizer_state_dict(other, new, state, options=options)
    assert "updates" not in new.state[other[0].weight] and new.param_groups[0]["step"] == 0


@over_all
def test_a_flat_state_is_filled_in_after_a_step(kind):
    """With a layer that has not been seen, of which there are no statistics to lose."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    models = []
    for resumed in (False, True):
        model = net()
        model[2].eval()
        model[3].eval()
        optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
        train(model, optimizer, 2)
        if resumed:
            weights, state = model.state_dict(), get_optimizer_state_dict(model, optimizer, options=options)
            model = net(seed=1)
            model[2].eval()
            model[3].eval()
            optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
            train(model, optimizer, 1)
            model.load_state_dict(weights)
            set_optimizer_state_dict(model, optimizer, state, options=options)
        train(model, optimizer, 2)
        models.append(model)
    same(*models)


@over_all
def test_a_state_before_the_first_step_is_none(kind):
    """It holds all that there will be, of the same shapes, so that it can be filled in; loaded, it is not there."""
    model = net()
    optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    train(model, optimizer, 2)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for index, values in optimizer.state_dict()["state"].items():
        fixed = {name: value for name, value in values.items() if name in state["state"][index]}
        missing = values.keys() - fixed.keys()
        assert not missing or kind.startswith("two-level"), missing
        for name, value in fixed.items():
            other = state["state"][index][name]
            assert type(value) is type(other) and getattr(value, "shape", 0) == getattr(other, "shape", 0), name
    other = net()
    resumed = (KINDS | QUASI)[kind](other, lr=0.01)
    resumed.load_state_dict(state)
    train(other, resumed, 2)
    same(model, other)


@over_all
def test_a_state_of_before_it_was_complete(kind):
    """Without what is not there yet, and without the number of its tensors."""
    models = []
    for how in ("whole", "old"):
        model = net()
        optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
        train(model, optimizer, 1)
        state = optimizer.state_dict()
        if how == "old":
            state["state"] = {i: dict(optimizer.state[param]) for i, param in enumerate(model.parameters())}
            for group in state["param_groups"]:
                del group["state_tensors"]
        resumed = (KINDS | QUASI)[kind](model, lr=0.01)
        resumed.load_state_dict(copy.deepcopy(state))
        train(model, resumed, 2)
        models.append(model)
    same(*models)


@over_all
def test_a_model_that_is_cast_before_the_first_step(kind):
    models = []
    for cast_after in (False, True):
        model = net().float()
        model = model if cast_after else model.double()
        optimizer = (KINDS | QUASI)[kind](model, lr=0.01)
        train(model.double(), optimizer, 3)
        models.append(model)
    same(*models)
