"""Optimizers for PyTorch over the batched kernels of ``mbf_kernels``."""

from .adafisher import AdaFisher, AdaFisherW
from .kfac import KFAC
from .mbf import MBF

__all__ = ["KFAC", "MBF", "AdaFisher", "AdaFisherW"]
