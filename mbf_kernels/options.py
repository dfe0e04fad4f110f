"""What all tensors of one ``mbf_step_`` share. A tensor is a number on the device, 0-d, float32 or float64."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
