"""Batched kernels for small SPD blocks: build, damp, Cholesky-factor and solve them all in one launch."""

from .backend import backends, use_backend
from .blocks import SymmetricBlocks
from .ops import accumulate_, accumulate_factor_solve_, factor, solve
from .prepared import PreparedStep, StepNumbers
from .step_ops import mbf_diagonal_step_, mbf_shared_step_, mbf_step_, rank_one_step_

__version__ = "0.1.0"

__all__ = [
    "PreparedStep",
    "StepNumbers",
    "SymmetricBlocks",
    "accumulate_",
    "accumulate_factor_solve_",
    "backends",
    "factor",
    "mbf_diagonal_step_",
    "mbf_shared_step_",
    "mbf_step_",
    "rank_one_step_",
    "solve",
    "use_backend",
]
