"""The optimizers by name. A factory takes the model, so that a method may look at its layers too.

To add one: write `def name(model, lr, **options) -> Optimizer` and enter it into OPTIMIZERS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer


class NotApplicable(ValueError):
    """The method has nothing to do on this model."""


class Together:
    """Several optimizers, each for its own part of the parameters, stepped as one."""

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def mbf(model: nn.Module, lr: float, **options) -> Optimizer:
    """Mini-Block Fisher, grafted: all defaults."""
    from mbf_optim import MBF

    return MBF(model.named_parameters(), lr=lr, **options)


def mbf_paper(model: nn.Module, lr: float, damping: float, **options) -> Optimizer:
    """Mini-Block Fisher as in the paper."""
    from mbf_optim import MBF

    return MBF.paper(model.named_parameters(), lr=lr, damping=damping, **options)


def adam(model: nn.Module, lr: float, **options) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True, **options)


def muon(model: nn.Module, lr: float, adam_lr: float | None = None, **options) -> Together:
    """torch's Muon for the hidden matrices, Adam for the rest: biases, norms, embeddings, heads.

    Steps are scaled to Adam's size, so that one learning rate serves both, unless Adam is given its own.
    """
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and name.split(".")[0] not in model.outer
        (hidden if inside else rest).append(parameter)
    if not hidden:
        raise NotApplicable("torch.optim.Muon steps 2-D weights, and this network has no hidden ones")
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"} | options
    return Together(torch.optim.Muon(hidden, lr=lr, **options), torch.optim.Adam(rest, lr=adam_lr or lr, fused=True))


def sgd(model: nn.Module, lr: float, **options) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True, **options)


@dataclass(frozen=True)
class Method:
    label: str
    make: Callable[..., Optimizer | Together]
    color: str
    damped: bool = False  # takes a damping that has to be tuned


OPTIMIZERS: dict[str, Method] = {
    "mbf": Method("MBF (grafted)", mbf, "tab:red"),
    "mbf-paper": Method("MBF (paper)", mbf_paper, "tab:orange", damped=True),
    "adam": Method("Adam", adam, "tab:blue"),
    "muon": Method("Muon + Adam", muon, "tab:green"),
    "sgd": Method("SGD, momentum", sgd, "tab:gray"),
}
