"""What other libraries offer for the same work: one batched call on dense blocks F [B, n, n], g and rhs [B, n].

A peer's maker gets its own inputs and returns the call to be timed. NumPy, SciPy and JAX run on the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.baseline import linalg_step
from benchmarks.ops import DAMPING, DECAY, FUSED, Problem, accumulated, damped, dense
from mbf_kernels.testing import assert_factors, assert_solves

T2 = 100  # steps between inversions in the code of the paper's authors
CHOLESKY = "torch cholesky_ex + cholesky_solve"
INVERSE, PRODUCT = "torch.linalg.inv + product", "product with an old inverse"
AMORTISED = f"old inverse, a new one every {T2} steps"


def missing(library: str) -> str | None:
    """Why a library's part cannot be measured; None if it can."""
    return None if importlib.util.find_spec(library) else "not installed (`make bench PEERS=1` installs it)"


@dataclass(frozen=True)
class Peer:
    label: str
    op: str  # of ours, whose result it gives
    library: str
    make: Callable[[Tensor, Tensor, Tensor], Callable[[], object]]
    solves: bool = True  # what it returns is the op's result, to be checked

    def checked_call(self, p: Problem) -> Callable[[], object]:
        """The call, once its result on a copy of the problem has been compared with float64."""
        call = self.make(p.fisher.to_dense(), p.g, p.rhs)
        result = call()
        if self.solves:
            index = p.sample()
            before = dense(p.fisher, index)
            result = (result if isinstance(result, Tensor) else torch.from_numpy(result.copy()))[index]
            if self.op == "factor":
                assert_factors(damped(before), result, p.g.dtype)
            else:
                matrix = accumulated(before, p.g[index])[0] if self.op == FUSED else before
                assert_solves(damped(matrix), result, p.rhs[index], p.rhs.dtype)
        return call


def cholesky_ex(F: Tensor, g: Tensor, rhs: Tensor):
    return lambda: torch.linalg.cholesky_ex(damped(F))[0]


def cholesky_solve(F: Tensor, g: Tensor, rhs: Tensor):
    lower = torch.linalg.cholesky_ex(damped(F))[0]
    return lambda: torch.cholesky_solve(rhs[..., None], lower)[..., 0]


def torch_cholesky(F: Tensor, g: Tensor, rhs: Tensor):
    return lambda: linalg_step(F, g, rhs, DECAY, DAMPING)


def updated(F: Tensor, g: Tensor) -> Tensor:
    """F <- beta F + (1 - beta) g g^T in place; returns F + lambda I."""
    return damped(F.baddbmm_(g[:, :, None], g[:, None, :], beta=DECAY, alpha=1 - DECAY))


def torch_solve(F: Tensor, g: Tensor, rhs: Tensor):
    return lambda: torch.linalg.solve(updated(F, g), rhs)


def torch_inverse(F: Tensor, g: Tensor, rhs: Tensor):
    return lambda: torch.bmm(torch.linalg.inv(updated(F, g)), rhs[..., None])[..., 0]


def old_inverse(F: Tensor, g: Tensor, rhs: Tensor):
    inverse = torch.linalg.inv(damped(F))
    return lambda: torch.bmm(inverse, rhs[..., None])[..., 0]


def numpy_solve(F: Tensor, g: Tensor, rhs: Tensor):
    import numpy

    return array_solve(numpy.linalg.solve, F, g, rhs)


def scipy_solve(F: Tensor, g: Tensor, rhs: Tensor):
    import scipy.linalg

    return array_solve(partial(scipy.linalg.solve, assume_a="pos", check_finite=False), F, g, rhs)


def array_solve(solve: Callable, F: Tensor, g: Tensor, rhs: Tensor):
    """`updated` on NumPy's arrays, without a second temporary."""
    blocks, ridge = F.numpy(), damped(torch.zeros_like(F[:1])).numpy()
    g, rhs = ((1 - DECAY) ** 0.5 * g).numpy(), rhs[..., None].numpy()

    def call():
        blocks[...] *= DECAY
        blocks[...] += g[:, :, None] * g[:, None, :]
        return solve(blocks + ridge, rhs)[..., 0]

    return call


def jax_cholesky(F: Tensor, g: Tensor, rhs: Tensor):
    import jax
    import jax.numpy as jnp
    import numpy

    ridge = damped(torch.zeros_like(F[:1])).numpy()

    @partial(jax.jit, donate_argnums=0)
    def step(F, g, rhs):
        F = DECAY * F + (1 - DECAY) * g[:, :, None] * g[:, None, :]
        factor = jnp.linalg.cholesky(F + ridge)
        return F, jax.scipy.linalg.cho_solve((factor, True), rhs[..., None])[..., 0]

    with jax.default_device(jax.devices("cpu")[0]):
        held, g, rhs = (jnp.array(tensor.numpy()) for tensor in (F, g, rhs))

    def call():
        nonlocal held
        held, x = step(held, g, rhs)
        return numpy.asarray(x)  # waits for it; no copy

    return call


PEERS = [
    Peer(CHOLESKY, FUSED, "torch", torch_cholesky),
    Peer("torch.linalg.solve", FUSED, "torch", torch_solve),
    Peer(INVERSE, FUSED, "torch", torch_inverse),
    Peer(PRODUCT, FUSED, "torch", old_inverse, solves=False),
    Peer("NumPy solve", FUSED, "numpy", numpy_solve),
    Peer("SciPy solve, positive definite", FUSED, "scipy", scipy_solve),
    Peer("JAX cholesky + cho_solve", FUSED, "jax", jax_cholesky),
    Peer("torch.linalg.cholesky_ex", "factor", "torch", cholesky_ex),
    Peer("torch.cholesky_solve", "solve", "torch", cholesky_solve),
]
