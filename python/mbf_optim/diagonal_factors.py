"""The diagonals of AdaFisher: H of a layer's input side, S of its outputs, so that S (x) H has the shape of [W | b].

All uses of a layer in a step are one batch: an accumulated gradient gives what the whole batch would, and a layer that
is used twice sees twice the samples. The scales are those of AdaFisher's published code.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from torch import Tensor, nn
from torch.nn import functional

from .affine import Affine, ModuleLayer, affine_layers, layers_of
from .capture import Use


class Norm(ModuleLayer):
    """A BatchNorm1d, BatchNorm2d or LayerNorm with a gain."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of an Affine whose input is one number."""
        return 1, self.weight.numel(), len(self.params)

    def fits(self, use: Use) -> bool:
        return use.inputs.shape == use.gradients.shape

    def batched(self, tensor: Tensor) -> Tensor:
        """With a dimension of samples: LayerNorm does without."""
        return tensor[None] if tensor.ndim == self.weight.ndim else tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """[rows, m]: of what is scaled by the gain."""
        channels_first = not isinstance(self.module, nn.LayerNorm)
        return (tensor.movedim(1, -1) if channels_first else tensor).reshape(-1, self.weight.numel())


def known_layers(model: nn.Module, trained: Container[int]) -> list[Affine | Norm]:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
    return affine_layers(model, trained) + layers_of(model, Norm, norms, trained)


def raw_factors(layer: Affine | Norm, uses: Sequence[Use], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """H [n], that of the bias last, and S [m]. ``scale``: of the loss."""
    return (_affine if isinstance(layer, Affine) else _norm)(layer, uses, scale)


def _affine(layer: Affine, uses: Sequence[Use], scale: float) -> tuple[Tensor, Tensor]:
    """Mean squares of inputs and of gradients; H of a convolution, over all groups, is divided by its C/g kh kw too."""
    rows = layer.rows(uses, mean_loss=False)
    count = len(rows.inputs) * rows.locations
    patch = 1 if isinstance(layer.module, nn.Linear) else layer.weight[0].numel()
    h = rows.inputs.square().sum((0, 1, 2)) / (count * patch)
    s = (rows.gradients / scale).square().sum((0, 1)).flatten() / count
    return h, s


def _norm(layer: Norm, uses: Sequence[Use], scale: float) -> tuple[Tensor, Tensor]:
    """H = [sum_k a_k^2, size of dim 1] / B^2, with a_k the sum over all dims but 1, / T^2, T the size of dims 2 and on;
    S = (the shift's gradient)^2 / B."""
    inputs = [layer.batched(use.inputs).to(layer.dtype) for use in uses]
    samples = sum(map(len, inputs))
    sums = [x.transpose(0, 1).flatten(1).sum(1) / math.prod(x.shape[2:]) ** 2 for x in inputs]
    longest = max(map(len, sums))  # sequences may differ in length from use to use
    h = sum(functional.pad(a, (0, longest - len(a))) for a in sums).square().sum()[None]
    if layer.bias is not None:
        h = functional.pad(h, (0, 1), value=float(longest))
    s = sum((layer.rows(use.gradients).to(layer.dtype) / scale).sum(0) for use in uses).square()
    return h / samples**2, s / samples
