"""What is measured where: the GPU at full size, or its rehearsal on a CPU with tiny sizes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

import mbf_kernels

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    device: str
    backend: str  # "cuda", or what stands in for it in a rehearsal
    triton: bool  # measured too
    mappings: bool  # of blocks to threads can be forced
    state_bytes: int  # of the Fisher blocks in a measurement that fills the device
    cache_bytes: int
    seconds: float  # per measurement

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @classmethod
    def here(cls, rehearse: bool) -> Setting:
        """Raises RuntimeError where a measurement would be of something else than the CUDA kernels."""
        status = mbf_kernels.backends()
        triton = status["triton"] == "available"
        if rehearse:
            triton = triton and os.environ.get("TRITON_INTERPRET") == "1"
            stand_in = next(name for name in ("emulated", "cpu", "reference") if status[name] == "available")
            return cls("cpu", stand_in, triton, stand_in == "emulated", 20_000, 0, 0.002)
        if status["cuda"] != "available":
            raise RuntimeError(f"backend cuda is not available: {status['cuda']}")
        properties = torch.cuda.get_device_properties(0)
        state = min(2 * GIB, properties.total_memory // 32)
        return cls("cuda", "cuda", triton, True, state, properties.L2_cache_size, 0.3)

    def using(self, backend: str) -> AbstractContextManager:
        """The default is not forced: a forced backend is checked at every call, and that takes time."""
        return nullcontext() if backend == "cuda" else mbf_kernels.use_backend(backend)

    def sets(self, touched: int) -> int:
        """How many sets of inputs of so many bytes are three times the cache."""
        return max(1, min(512, -(-3 * self.cache_bytes // touched)))
