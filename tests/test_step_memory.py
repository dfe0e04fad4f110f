"""What a step holds beside parameters, gradients and state: next to nothing, in a step and between steps."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from mbf_optim import MBF
from torch import nn

from mbf_kernels import use_backend
from mbf_kernels.testing import randn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.memory import state_bytes, with_peak_bytes  # noqa: E402

COUNT = 20  # layers of a kind: what is as large as one of them is not as large as the parameters
SMALL = 0.1  # of the parameters' bytes


def parameters(dtype=torch.float32):
    shapes = {"conv.weight": (16, 16, 3, 3), "linear.weight": (64, 72), "linear.bias": (64,)}
    named = {f"{i}.{name}": shape for i in range(COUNT) for name, shape in shapes.items()}
    params = {name: nn.Parameter(randn(*shape, dtype=torch.float32).to(dtype)) for name, shape in named.items()}
    for param in params.values():
        param.grad = torch.ones_like(param)
    return params


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_a_step_needs_no_copy_of_the_parameters():
    params = parameters()
    with use_backend("cpu"):
        optimizer, peak = with_peak_bytes(lambda: MBF(params.items()), 3)
    assert peak - state_bytes(optimizer) <= SMALL * nbytes(params.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_large_is_kept_outside_the_state(dtype):
    """Engines move and store ``optimizer.state``: what is elsewhere they do not see."""
    params = parameters(dtype)
    gc.collect()
    before = tensors()  # others', too, of which not all have memory
    optimizer = MBF(params.items())
    for _ in range(3):
        optimizer.step()
    gc.collect()
    given = storages([*params.values(), *(param.grad for param in params.values())])
    old = set(map(id, before))
    new = storages(tensor for tensor in tensors() if id(tensor) not in old)
    kept = sum(size for address, size in new.items() if address not in given)
    assert kept - state_bytes(optimizer) <= SMALL * nbytes(params.values())


def tensors():
    """All that Python holds."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def storages(of):
    """Addresses and bytes."""
    parts = [tensor.untyped_storage() for tensor in of if not tensor.is_meta]
    return {part.data_ptr(): part.nbytes() for part in parts}
