"""Optimizers for PyTorch over the batched kernels of ``mbf_kernels``."""

from .kbfgs import KBFGS, KBFGSL
from .kfac import KFAC
from .mbf import MBF

__all__ = ["KBFGS", "KBFGSL", "KFAC", "MBF"]
