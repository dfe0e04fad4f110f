"""The step of rank one on this CPU, beside what torch has for it:

    python -m benchmarks.rank_one [--threads 2] [--seconds 3]

Side by side: `rank_one_step_`; the same in `torch._foreach` functions and an F for every tensor; `torch.optim.Adam`,
fused, which moves 28 bytes per float32 parameter where the step of rank one moves 20; and a copy that moves those 20.
The first two are compared before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from benchmarks.cpu.copies import copies
from benchmarks.shapes import Shapes, matrices, resnet18, transformer
from benchmarks.timing import Timing, race
from mbf_kernels import rank_one_step_
from mbf_kernels.testing import assert_relative

CASES = {
    "ResNet-18": (resnet18(), torch.contiguous_format),
    "ResNet-18, channels_last": (resnet18(), torch.channels_last),
    "12 x 768 transformer, linear weights": (matrices(transformer()), torch.contiguous_format),
}
STEP = {"lr": 1e-3, "momentum": 0.9, "damping": 1e-3}
BYTES = 20  # per parameter: W, g and M read, W and M written


class Tensors:
    """Weights, gradients and momenta, and positive s and h of every output and of what enters it."""

    def __init__(self, shapes: Shapes, memory_format: torch.memory_format):
        generator = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            drawn = torch.randn(shape, generator=generator)
            return drawn.to(memory_format=memory_format) if drawn.ndim == 4 else drawn

        self.params, self.grads, self.momenta = ([draw(shape) for shape in shapes.values()] for _ in range(3))
        self.rows = [draw(shape[:1]).square() for shape in shapes.values()]
        self.columns = [draw((prod(shape[1:]),)).square() for shape in shapes.values()]

    def fused(self) -> None:
        rank_one_step_(self.params, self.grads, self.momenta, self.rows, self.columns, **STEP)

    def foreach(self) -> None:
        torch._foreach_mul_(self.momenta, STEP["momentum"])
        torch._foreach_add_(self.momenta, self.grads, alpha=1 - STEP["momentum"])
        for param, momentum, s, h in zip(self.params, self.momenta, self.rows, self.columns, strict=True):
            f = torch.outer(s, h).view(param.shape).add_(STEP["damping"])
            param.addcdiv_(momentum, f, value=-STEP["lr"])

    def adam(self) -> Callable[[], object]:
        params = [torch.nn.Parameter(param.clone()) for param in self.params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        return torch.optim.Adam(params, lr=1e-3, fused=True).step


def check(shapes: Shapes, memory_format: torch.memory_format) -> None:
    """Both round each element a dozen times."""
    one, other = Tensors(shapes, memory_format), Tensors(shapes, memory_format)
    start = [param.clone() for param in one.params]
    one.fused()
    other.foreach()
    for a, b, before in zip(one.params, other.params, start, strict=True):
        assert_relative(a - before, b - before, 1e-5)
    for a, b in zip(one.momenta, other.momenta, strict=True):
        assert_relative(a, b, 1e-6)


def rows(shapes: Shapes, memory_format: torch.memory_format, seconds: float) -> dict[str, Timing]:
    tensors, count = Tensors(shapes, memory_format), sum(map(prod, shapes.values()))
    calls = {"rank_one_step_": tensors.fused, "torch._foreach": tensors.foreach, "Adam (fused)": tensors.adam()}
    return race(calls | {"copy of 20 bytes": copies([BYTES * count]).popitem()[1]}, "cpu", seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each call")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, (shapes, memory_format) in CASES.items():
        check(shapes, memory_format)
        count = sum(map(prod, shapes.values()))
        print(f"{name}: {len(shapes)} tensors, {count / 1e6:.1f} million parameters, {options.threads} threads")
        timings = rows(shapes, memory_format, options.seconds)
        ours = timings["rank_one_step_"].median
        for call, timing in timings.items():
            milliseconds = [f"{1e3 * t:8.2f}" for t in (timing.median, timing.p20, timing.p80)]
            speed = count * (28 if call.startswith("Adam") else BYTES) / timing.median * 1e-9
            ratio = f"{timing.median / ours:6.2f}"
            print(f"  {call:18}{''.join(milliseconds)} ms (median, p20, p80)  {ratio}  {speed:6.1f} GB/s")


if __name__ == "__main__":
    main()
