"""Optimizers for PyTorch over the batched kernels of ``mbf_kernels``."""

from .kfac import KFAC
from .kpsvd import KPSVD
from .mbf import MBF

__all__ = ["KFAC", "KPSVD", "MBF"]
