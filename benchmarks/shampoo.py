"""What distributed Shampoo keeps and sends, from its documentation: not measured here.

H.-J. M. Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer for
Training Neural Networks At-Scale", arXiv 2309.06497, and the notes on its distributors: small dimensions are merged,
tensors cut into blocks, and each block has a factor and its inverse root for every dimension; beside the weights a
filtered gradient and the second moment of the grafting. All float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.shapes import Shape

LARGEST = 1024  # dimension of a block


def state_bytes(shapes: Iterable[Shape]) -> int:
    """Of all processes together."""
    return sum(4 * (2 * math.prod(shape) + 2 * _factor_elements(_merged(shape))) for shape in shapes)


def _merged(shape: Shape) -> Shape:
    """Neighbouring dimensions as one while their product is no larger than a block."""
    merged = [shape[0]]
    for size in shape[1:]:
        if merged[-1] * size <= LARGEST:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged)


def _factor_elements(shape: Shape) -> int:
    pieces = [math.ceil(size / LARGEST) for size in shape]
    squares = [size // LARGEST * LARGEST**2 + (size % LARGEST) ** 2 for size in shape]
    return sum(square * math.prod(pieces) // pieces[i] for i, square in enumerate(squares))


def mean_state_bytes(shapes: Iterable[Shape], processes: int) -> float:
    """Of a process, where whole blocks are dealt out to all."""
    return state_bytes(shapes) / processes


def shard_state_bytes(shapes: Iterable[Shape], processes: int) -> int:
    """Of the first process, where each has blocks of its own rows: an approximation."""
    return state_bytes((math.ceil(shape[0] / processes), *shape[1:]) for shape in shapes)
