"""The optimizers that are timed, and the check of their first steps against float64.

They take pairs of name and parameter, as `model.named_parameters()` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from mbf_optim import MBF
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

import mbf_kernels
from benchmarks.memory import state_bytes
from benchmarks.optimizers import NotApplicable, Together
from benchmarks.shapes import Shapes
from mbf_kernels.testing import RATIO, assert_below

LR, STEPS = 1e-3, 2  # of the check
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Named = Iterable[tuple[str, Parameter]]


@dataclass(frozen=True)
class Method:
    label: str
    make: Callable[..., Optimizer | Together]
    library: str = "torch"
    period: int = 1  # it does its rare work every so many steps
    condition: float | None = None  # the bound on a damped block's over n, for the check; None: no float64 twin


def muon(named: Named) -> Optimizer | Together:
    """torch's Muon for what is 2-D, AdamW for the rest."""
    named = list(named)
    matrices = [pair for pair in named if pair[1].ndim == 2]
    rest = [pair for pair in named if pair[1].ndim != 2]
    if not matrices:
        raise NotApplicable("no 2-D parameter")
    hidden = torch.optim.Muon(matrices, lr=LR)
    return Together(hidden, AdamW(rest, lr=LR, fused=True)) if rest else hidden


def shampoo(named: Named) -> Optimizer:
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(_parameters(named), lr=LR, start_preconditioning_step=1, preconditioning_compute_steps=10)


def soap(named: Named) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(_parameters(named), lr=LR, precondition_frequency=10)


def heavyball(name: str, named: Named) -> Optimizer:
    """Uncompiled: on a CPU its compilation takes minutes for a small network, and fails for some of its optimizers."""
    import heavyball

    heavyball.utils.compile_mode = None
    return getattr(heavyball, name)(_parameters(named), lr=LR, consume_grad=False)


def _parameters(named: Named) -> list[Parameter]:
    return [parameter for _, parameter in named]


# Conditions. Element-wise methods solve nothing. The paper's absolute damping, gradients of unit variance: F <= 0.19
# |g|^2 after two steps, |g|^2 < 5 n. Muon rounds to bfloat16.
METHODS = {
    "sgd": Method("SGD, momentum (fused)", partial(SGD, lr=LR, momentum=0.9, fused=True), condition=0),
    "adam": Method("Adam (fused)", partial(Adam, lr=LR, fused=True), condition=0),
    "adamw": Method("AdamW (fused)", partial(AdamW, lr=LR, fused=True), condition=0),
    "mbf": Method("MBF (grafted)", partial(MBF, lr=LR), "mbf_optim", condition=1 / 0.3),
    "mbf-paper": Method("MBF (paper)", partial(MBF.paper, lr=LR, damping=0.1), "mbf_optim", condition=0.19 * 5 / 0.1),
    "muon": Method("Muon + AdamW", muon),
    "po-shampoo": Method("Shampoo (pytorch_optimizer)", shampoo, "pytorch_optimizer", 10),
    "po-soap": Method("SOAP (pytorch_optimizer)", soap, "pytorch_optimizer", 10),
    "hb-shampoo": Method("KL-Shampoo (heavyball)", partial(heavyball, "KLShampoo"), "heavyball", 2),
    "hb-soap": Method("SOAP (heavyball)", partial(heavyball, "SOAP"), "heavyball", 2),
}
if not hasattr(torch.optim, "Muon"):
    del METHODS["muon"]
OWN_PROCESS = ("torch", "mbf_optim")  # the libraries whose optimizers leave gradients as they are


def random_parameters(shapes: Shapes, device: str, layout: str) -> dict[str, Parameter]:
    """Normal weights with normal gradients; those of convolutions in the memory format of that name."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        weight, grad = torch.randn(2, *shape, generator=generator, device=device)
        if len(shape) == 4:
            weight, grad = (t.to(memory_format=FORMATS[layout]) for t in (weight, grad))
        parameters[name] = Parameter(weight)
        parameters[name].grad = grad
    return parameters


def step_bytes(optimizer: Optimizer | Together, parameters: Iterable[Tensor]) -> int:
    """What a step must move that touches everything once: state and weights read and written, gradients read."""
    return 2 * state_bytes(optimizer) + 3 * sum(parameter.nbytes for parameter in parameters)


def largest_block(optimizer: Optimizer | Together) -> int:
    """n of its largest mini-block; 1 without."""
    return max(row.size for row in optimizer.report()) if isinstance(optimizer, MBF) else 1


def period_of(method: Method, optimizer: Optimizer | Together) -> int:
    """MBF refreshes matrices above 128 every 100 steps."""
    return 100 if largest_block(optimizer) > 128 else method.period


def check_first_steps(parameters: dict[str, Parameter], method: Method, optimizer: Optimizer | Together) -> None:
    """Takes STEPS steps: every weight stays finite, and two layers, the smallest and the last, follow float64 twins."""
    weights = [name for name, parameter in parameters.items() if parameter.ndim > 1]
    chosen = {min(weights, key=lambda name: parameters[name].numel()), weights[-1]}
    chosen |= {name.removesuffix("weight") + "bias" for name in chosen} & set(parameters)
    start = {name: parameters[name].detach().double() for name in chosen}
    twins = {name: Parameter(value.clone()) for name, value in start.items()}
    for name, twin in twins.items():
        twin.grad = parameters[name].grad.double()
    for _ in range(STEPS):
        optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in parameters.values()), "a weight is not finite"
    if method.condition is None:
        return
    with mbf_kernels.use_backend("reference"):
        reference = method.make(list(twins.items()))
        for _ in range(STEPS):
            reference.step()
    n = largest_block(reference)
    for name, twin in twins.items():
        check_step(parameters[name].detach(), twin.detach(), start[name], n, method.condition)


def check_step(param: Tensor, truth: Tensor, start: Tensor, n: int, condition: float) -> None:
    """The weights are as near the float64 ones as solves with a block's condition number allow.

    The solve has LAPACK's pass mark as its backward error, the matrix the rounding of a mean of as many outer products
    as there are outputs; each step rounds the weight once more.
    """
    eps = torch.finfo(param.dtype).eps
    relative = (RATIO * n + param.shape[0] + 4) * eps * (condition * n + 1)
    error = torch.linalg.vector_norm(param.double() - truth)
    bound = relative * torch.linalg.vector_norm(truth - start) + STEPS * eps * torch.linalg.vector_norm(truth)
    assert_below(error, bound, "error of the weights")
