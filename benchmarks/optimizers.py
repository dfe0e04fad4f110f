"""The optimizers by name. A factory takes the model, so that a method may look at its layers too.

To add one: write `def name(model, lr, **options) -> Optimizer` and enter it into OPTIMIZERS.
"""

from collections.abc import Callable, Mapping
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


def family(name: str, **fixed) -> Callable[..., Optimizer]:
    """An optimizer of mbf_optim that takes the model."""

    def make(model: nn.Module, **options) -> Optimizer:
        import mbf_optim

        return getattr(mbf_optim, name)(model, **fixed | options)

    return make


def adafisher(variant: str, **fixed) -> Callable[..., Optimizer]:
    """Curvature at every tenth step, as its authors train language models: their 100 are for longer runs."""
    return family("AdaFisher", variant=variant, update_interval=10, **fixed)


def kronecker(name: str, **fixed) -> Callable[..., Optimizer]:
    """One of K-FAC's kin: the Fisher matrix of drawn targets at every step and an inverse at every 20th, as Ren and
    Goldfarb run K-FAC on the autoencoders."""
    make = family(name, **{"update_interval": 1, "factor_interval": 20} | fixed)
    return lambda model, **options: make(model, **{"distribution": model.distribution} | options)


def kpsvd(method: str) -> Callable[..., Optimizer]:
    """Singular pairs at every tenth step: of convolutions they take longer than the training itself."""
    return kronecker("KPSVD", method=method, update_interval=10)


KRONECKER = {"lr": 1e-2, "damping": 1e-2}
TWO_PRODUCTS = {"lr": 1e-2, "damping": 1e-1}
KBFGS = {"lr": 0.3, "damping": 0.3}
ADAFISHER = {"lr": 1e-3, "damping": 1e-3}


@dataclass(frozen=True)
class Method:
    label: str
    make: Callable[..., Optimizer | Together]
    color: str
    start: Mapping[str, float]  # what is tuned, and from where: the method's defaults, but for Adam's eps
    closure: bool = False  # its step takes a closure, and calls it more than once


OPTIMIZERS: dict[str, Method] = {
    "mbf": Method("MBF", mbf, "tab:red", {"lr": 1e-3}),
    "mbf-damped": Method("MBF, damping tuned", mbf, "darkred", {"lr": 1e-3, "damping": 0.3}),
    "mbf-paper": Method("MBF (paper)", mbf_paper, "tab:orange", {"lr": 1e-3, "damping": 0.1}),
    "adam": Method("Adam", adam, "tab:blue", {"lr": 1e-3}),
    "adam-eps": Method("Adam, eps tuned", adam, "navy", {"lr": 1e-3, "eps": 1e-4}),
    "muon": Method("Muon + Adam", muon, "tab:green", {"lr": 1e-3}),
    "sgd": Method("SGD, momentum", sgd, "tab:gray", {"lr": 1e-2}),
    "kfac": Method("K-FAC", kronecker("KFAC"), "tab:purple", KRONECKER),
    "kfac-exact": Method("K-FAC, exact damping", kronecker("KFAC", damping_form="exact"), "orchid", KRONECKER),
    "two-level": Method("two-level K-FAC", kronecker("TwoLevelKFAC", weight=0.01), "tab:pink", KRONECKER),
    "two-level-additive": Method(
        "two-level, additive", kronecker("TwoLevelKFAC", form="additive"), "deeppink", KRONECKER
    ),
    "kpsvd": Method("KPSVD", kpsvd("kpsvd"), "tab:brown", KRONECKER),
    "deflation": Method("deflation", kpsvd("deflation"), "orangered", TWO_PRODUCTS),
    "lanczos": Method("Lanczos", kpsvd("lanczos"), "goldenrod", TWO_PRODUCTS),
    "kfac-corrected": Method("K-FAC, corrected", kpsvd("kfac_corrected"), "olivedrab", TWO_PRODUCTS),
    "kbfgs": Method("K-BFGS", family("KBFGS"), "tab:olive", KBFGS, closure=True),
    "kbfgsl": Method("K-BFGS(L)", family("KBFGSL"), "seagreen", KBFGS, closure=True),
    "adafisher": Method("AdaFisher", adafisher("official"), "tab:cyan", ADAFISHER),
    "adafisher-paper": Method("AdaFisher (paper)", adafisher("paper"), "teal", ADAFISHER),
    "adafisher-relative": Method(
        "AdaFisher, relative", adafisher("paper", relative_damping=0.1), "steelblue", ADAFISHER
    ),
}
