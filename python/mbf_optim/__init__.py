"""Optimizers for PyTorch over the batched kernels of ``mbf_kernels``."""

from .kfac import KFAC
from .mbf import MBF

__all__ = ["KFAC", "MBF"]
