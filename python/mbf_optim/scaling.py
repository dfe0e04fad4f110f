"""What ``torch.amp.GradScaler`` leaves to a step: it sets ``optimizer.found_inf`` and ``optimizer.grad_scale``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from .layers import HALF
from .schedule import capturing
from .sharding import local_gradient


def overflown(optimizer: Optimizer) -> bool:
    """Whether the scaled gradients are not finite: then the step is left out. Waits for the device."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return False
    if capturing():
        raise RuntimeError("MBF.step: expected no GradScaler inside the capture of a CUDA graph: it asks the device")
    return bool(found_inf)


def unscaled(optimizer: Optimizer) -> Tensor | None:
    """Undoes the scale of the gradients, in place; of those of low precision, which would underflow, it is left to who
    reads them in float32. Returns the factor, None without a scale."""
    grad_scale = getattr(optimizer, "grad_scale", None)
    if grad_scale is None:
        return None
    factor = grad_scale.double().reciprocal().float()
    of_devices: dict[torch.device, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.dtype not in HALF:
                grad = local_gradient(param)
                of_devices.setdefault(grad.device, []).append(grad)
    for device, grads in of_devices.items():
        torch._foreach_mul_(grads, factor.to(device))
    return factor
