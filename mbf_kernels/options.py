"""What all tensors of a step share. A tensor is a number on the device, 0-d, float32 or float64."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import checks


@dataclass(frozen=True)
class StepOptions:
    lr: float | Tensor  # alpha
    momentum: float  # mu
    decay: float  # beta
    damping: float | Tensor  # lambda, or its multiple of trace(F)/n when relative
    weight_decay: float  # gamma
    eps: float
    relative: bool
    graft: bool  # take the length of Adam's step
    nesterov: bool
    maximize: bool
    update: bool  # F <- decay F + (1-decay) g g^T first
    refactor: bool  # factor F; otherwise use the cached factors
    diagonal_decay: float = 0.0  # beta_2, of element-wise second moments
    decoupled: bool = True  # weight decay shrinks W, instead of joining the gradient

    def check(self, op: str) -> None:
        """Raises ValueError for a number out of its range."""
        checks.decay(op, self.decay)
        checks.momentum(op, self.momentum)
        checks.momentum(op, self.diagonal_decay, name="diagonal_decay")
        checks.non_negative(op, weight_decay=self.weight_decay, eps=self.eps)
        for name in ("lr", "damping"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                checks.non_negative(op, **{name: value})


def step_options(
    op: str,
    *,
    lr: float | Tensor,
    momentum: float,
    decay: float = 0.0,
    damping: float | Tensor = 0.0,
    weight_decay: float = 0.0,
    relative: bool = False,
    graft: str | None = None,
    nesterov: bool = False,
    eps: float = 1e-8,
    maximize: bool = False,
    update: bool = True,
    refactor: bool = True,
    diagonal_decay: float = 0.0,
    decoupled: bool = True,
) -> StepOptions:
    """The options from the keywords of a step op. Raises TypeError for what is no number, ValueError for a form that
    does not exist."""
    if not (graft is None or isinstance(graft, str) and graft == "adam"):
        raise ValueError(f'{op}: expected graft to be None or "adam", got {graft!r}')
    return StepOptions(
        lr if isinstance(lr, Tensor) else checks.number(op, "lr", lr),
        checks.number(op, "momentum", momentum),
        checks.number(op, "decay", decay),
        damping if isinstance(damping, Tensor) else checks.number(op, "damping", damping),
        checks.number(op, "weight_decay", weight_decay),
        checks.number(op, "eps", eps),
        checks.flag(op, "relative", relative),
        graft == "adam",
        checks.flag(op, "nesterov", nesterov),
        checks.flag(op, "maximize", maximize),
        checks.flag(op, "update", update),
        checks.flag(op, "refactor", refactor),
        checks.number(op, "diagonal_decay", diagonal_decay),
        checks.flag(op, "decoupled", decoupled),
    )
