"""Optimizers for PyTorch over the batched kernels of ``mbf_kernels``."""

from .mbf import MBF

__all__ = ["MBF"]
