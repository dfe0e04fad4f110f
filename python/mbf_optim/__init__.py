"""Optimizers for PyTorch over the batched kernels of ``mbf_kernels``."""

from .adafisher import AdaFisher, AdaFisherW
from .kbfgs import KBFGS, KBFGSL
from .kfac import KFAC
from .kpsvd import KPSVD
from .mbf import MBF
from .two_level import TwoLevelKFAC

__all__ = ["KBFGS", "KBFGSL", "KFAC", "KPSVD", "MBF", "AdaFisher", "AdaFisherW", "TwoLevelKFAC"]
