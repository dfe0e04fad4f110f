"""A GPU for triton that compiles and takes launches, and runs nothing: python fake_gpu.py cuda 90 32

Prints every launch as "kernel grid", and every compilation as "compiled kernel": what happens between a call of an op
and the device is then tested without one.
"""

import contextlib
import sys
from dataclasses import replace

import torch

from mbf_kernels import SymmetricBlocks, triton_ops
from mbf_kernels.options import StepOptions


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__
        print("compiled", self.name)

    def __call__(self, rows, columns, layers, *arguments):
        print(self.name, rows, columns)


class Device:
    def load_binary(self, name, binary, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**16}


class Driver:
    utils, launcher_cls = Device(), Launcher

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


OPTIONS = StepOptions(
    lr=0.1, momentum=0.9, decay=0.9, damping=0.1, weight_decay=0.0, eps=1e-8, relative=True, graft=True, nesterov=True,
    maximize=False, update=True, refactor=True,
)  # fmt: skip


def call_every_op(count, dtype, x):
    """x: the value of every number."""
    f = SymmetricBlocks.zeros(count, 2, dtype)
    g, rhs, w, m = (torch.zeros(count, 2, dtype=dtype) for _ in range(4))
    triton_ops.accumulate_(f, g[None], 0.5 if isinstance(x, torch.Tensor) else x)
    lower, _ = triton_ops.factor(f, x, True)
    triton_ops.solve(lower, torch.zeros(count, 2, 9, dtype=dtype))
    triton_ops.accumulate_factor_solve_(f, g, rhs, 0.5, x, False)
    options = replace(OPTIONS, lr=x, damping=x)
    triton_ops.mbf_step_([w], [g], [m], [f], [lower], [torch.tensor(0)], [x], [x], options)
    w, g, m, h = (torch.zeros(count, dtype=dtype) for _ in range(4))
    triton_ops.rank_one_step_([w], [g], [m], [torch.zeros(1, dtype=dtype)], [h], [x], options)


if __name__ == "__main__":
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    backend, architecture, lanes = sys.argv[1:]
    driver.set_active(Driver(GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, int(lanes))))
    torch.cuda.device = lambda device: contextlib.nullcontext()
    for dtype in (torch.float32, torch.float64):
        call_every_op(1000, dtype, 0.5)
        call_every_op(1001, dtype, 0.25)  # other values compile nothing
        call_every_op(7, dtype, torch.tensor(0.5))
