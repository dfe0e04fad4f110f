"""What the fused op is compared with, and what it must move."""

import torch
from torch import Tensor


def linalg_step(dense: Tensor, g: Tensor, rhs: Tensor, decay: float, damping: float) -> Tensor:
    """What a user writes without these kernels: F [B, n, n] in place, g and rhs [B, n]; returns x [B, n]."""
    dense.baddbmm_(g[:, :, None], g[:, None, :], beta=decay, alpha=1 - decay)
    damped = dense + damping * torch.eye(dense.shape[1], dtype=dense.dtype, device=dense.device)
    lower, _ = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(rhs[..., None], lower)[..., 0]


def fused_bytes(n: int, itemsize: int = 4) -> int:
    """Of a block: T = n(n+1)/2 scalars of F read and written, g and the right-hand side read, x and info written."""
    return itemsize * (n * (n + 1) + 3 * n) + 4
