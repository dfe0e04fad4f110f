"""``python -m mbf_kernels``: what is installed, which backends work here, and a self-check of each."""

from __future__ import annotations

import platform
import sys

import torch

from . import SymmetricBlocks, __version__, accumulate_factor_solve_, backends, native, triton_ops, use_backend

SIZES = (4, 9, 16, 25, 64, 128)
COUNT = 33  # one tile and one block more


def self_check(backend: str, size: int) -> float:
    """The largest residual |(F + lambda I) x - b| / (|F + lambda I| |x| n eps) over the blocks; a few units at most."""
    generator = torch.Generator().manual_seed(size)
    on_gpu = backend == "cuda" or (backend == "triton" and not triton_ops.is_interpreted())
    device = "cuda" if on_gpu else "cpu"
    g, b = (torch.randn(COUNT, size, generator=generator).to(device) for _ in range(2))
    identity = torch.eye(size, device=device)
    fisher = SymmetricBlocks.from_dense(identity.expand(COUNT, size, size))
    with use_backend(backend):
        x, info = accumulate_factor_solve_(fisher, g, b, decay=0.9, damping=0.1)
    matrix = fisher.to_dense().double() + 0.1 * identity
    residual = torch.linalg.vector_norm((matrix @ x.double()[..., None])[..., 0] - b, dim=1)
    scale = torch.linalg.matrix_norm(matrix) * torch.linalg.vector_norm(x.double(), dim=1)
    ratio = (residual / (scale * size * torch.finfo(torch.float32).eps)).max().item()
    return ratio if not info.any() else float("inf")


def main() -> int:
    print(f"mbf_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if native.UNAVAILABLE is None:
        print(f"CPU instruction set {native.cpu_isa()} (of {', '.join(native.cpu_isas())})")
        if architectures := native.cuda_architectures():
            print(f"CUDA kernels for compute capabilities {', '.join(architectures)}")
    failed = False
    for name, status in backends().items():
        print(f"  {name:10} {status}")
        if status != "available":
            continue
        for size in (n for n in SIZES if name != "triton" or n <= triton_ops.MAX_SIZE):
            ratio = self_check(name, size)
            good = ratio < 30  # LAPACK's own threshold for this ratio
            failed |= not good
            print(f"    n = {size:3}: residual {ratio:.2f} n eps, {'ok' if good else 'FAILED'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
