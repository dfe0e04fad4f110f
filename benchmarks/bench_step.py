"""``MBF.step`` against torch's optimizers on the same tensors: ``make bench``, or pytest benchmarks/bench_step.py.

3x3 convolutions, 11.5 million parameters. The floor of MBF's time over Adam's is 2.15: 60 bytes a parameter (F read and
written, g, M and W) against Adam's 28.
"""

import pytest
import torch
from mbf_optim import MBF

SHAPES = [(64, 64)] * 4 + [(128, 128)] * 4 + [(256, 256)] * 4 + [(512, 512)] * 3 + [(512, 256), (256, 128), (128, 64)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
    "mbf": lambda params: MBF(params, lr=1e-3),
    "mbf-paper": lambda params: MBF.paper(params, lr=1e-3, damping=1e-2),
}


def convolutions(memory_format: torch.memory_format) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator).to(memory_format=memory_format)
        params.append(torch.nn.Parameter(weight))
        params[-1].grad = torch.randn_like(weight)
    return params


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def bench_step(benchmark, name, memory_format):
    params = convolutions(FORMATS[memory_format])
    optimizer = OPTIMIZERS[name](params)
    optimizer.step()
    assert all(param.isfinite().all() for param in params)
    benchmark.group = f"3x3 convolutions, {sum(p.numel() for p in params) / 1e6:.1f} M parameters, {memory_format}"
    benchmark(optimizer.step)
