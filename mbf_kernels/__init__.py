"""Batched kernels for small SPD blocks: build, damp, Cholesky-factor and solve them all in one launch."""

from .backend import backends, use_backend
from .blocks import SymmetricBlocks
from .ops import accumulate_, accumulate_factor_solve_, factor, mbf_step_, solve

__version__ = "0.1.0"

__all__ = [
    "SymmetricBlocks",
    "accumulate_",
    "accumulate_factor_solve_",
    "backends",
    "factor",
    "mbf_step_",
    "solve",
    "use_backend",
]
