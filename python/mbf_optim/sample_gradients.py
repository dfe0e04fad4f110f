"""The gradients of a layer's samples, dW_n = sum_t g_t a_t^T, kept in an optimizer's state: as they are, or as inputs a
and output gradients g where those are fewer numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .affine import Rows

WHOLE, FACTORS = "sample_gradients", ("sample_inputs", "sample_output_gradients")
NAMES = (WHOLE, *FACTORS)
SAMPLES_ALONG = {WHOLE: 0} | dict.fromkeys(FACTORS, 1)  # which dimension


def kept(rows: Rows) -> dict[str, Tensor]:
    """Of copies, under some of NAMES."""
    inputs, gradients = (part.permute(2, 0, 1, 3) for part in rows[:2])  # [groups, m, T, n]
    locations, p, q = inputs.shape[2], inputs.shape[3], gradients.shape[3]
    if p * q <= locations * (p + q):
        return {WHOLE: (gradients.mT @ inputs).transpose(0, 1).contiguous()}
    return {
        name: part.clone(memory_format=torch.contiguous_format)
        for name, part in zip(FACTORS, (inputs, gradients), strict=True)
    }


def sample_gradients(state: Mapping[str, Tensor]) -> Whole | Factored:
    return Whole(state[WHOLE]) if WHOLE in state else Factored(*(state[name] for name in FACTORS))


class Whole:
    def __init__(self, gradients: Tensor):
        self._shape, self._rows = gradients.shape[1:], gradients.flatten(1)

    def scores(self, x: Tensor) -> Tensor:
        """X . dW_n, [m], of X [groups, q, p]."""
        return self._rows @ x.flatten()

    def combination(self, weights: Tensor) -> Tensor:
        """sum_n weights[n] dW_n, [groups, q, p]."""
        return (weights @ self._rows).view(self._shape)


class Factored:
    def __init__(self, inputs: Tensor, gradients: Tensor):
        self._samples, self._locations = inputs.shape[1:3]
        self._inputs, self._gradients = inputs.flatten(1, 2), gradients.flatten(1, 2)

    def scores(self, x: Tensor) -> Tensor:
        """X . dW_n, [m], of X [groups, q, p]."""
        products = (self._inputs @ x.mT * self._gradients).sum((0, 2))
        return products.view(self._samples, self._locations).sum(1)

    def combination(self, weights: Tensor) -> Tensor:
        """sum_n weights[n] dW_n, [groups, q, p]."""
        return (self._gradients * weights.repeat_interleave(self._locations)[:, None]).mT @ self._inputs
