"""The diagonals of AdaFisher: H of a layer's input side, S of its outputs, so that S (x) H has the shape of [W | b].

All uses of a layer in a step are one batch: an accumulated gradient gives what the whole batch would, and a layer that
is used twice sees twice the samples. The scales are those of AdaFisher's published code.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from .affine import Affine, ModuleLayer, affine_layers, layers_of
from .capture import Use
from .replicas import Extent, Seen, Share


class Norm(ModuleLayer):
    """A BatchNorm1d, BatchNorm2d or LayerNorm with a gain."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of an Affine whose input is one number."""
        return 1, self.weight.numel(), len(self.params)

    def fits(self, use: Use) -> bool:
        return use.inputs.shape == use.gradients.shape

    def extent(self, uses: Sequence[Use]) -> Extent:
        """Dimension 1 counts as locations."""
        shapes = [self.batched(use.inputs).shape for use in uses]
        return Extent(
            sum(shape[0] for shape in shapes),
            sum(shape[0] * shape[1] for shape in shapes),
            max((shape[1] for shape in shapes), default=0),
        )

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


def sums(layer: Affine | Norm, share: Share, scale: float = 1.0) -> Seen:
    """Of this process's part what the factors are made of. ``scale``: of the loss."""
    return (_affine_sums if isinstance(layer, Affine) else _norm_sums)(layer, share, scale)


def factors(layer: Affine | Norm, share: Share, totals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """H [n], that of the bias last, and S [m], of such sums over all processes."""
    return (_affine if isinstance(layer, Affine) else _norm)(layer, share, totals["inputs"], totals["gradients"])


def _affine_sums(layer: Affine, share: Share, scale: float) -> Seen:
    rows = layer.rows(share.uses, mean_loss=False)
    gradients = (rows.gradients / scale).square().sum((0, 1)).flatten()
    return Seen(share.locations, sums={"inputs": rows.inputs.square().sum((0, 1, 2)), "gradients": gradients})


def _affine(layer: Affine, share: Share, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of inputs and of gradients; H of a convolution, over all groups, is divided by its C/g kh kw too."""
    count = sum(extent.locations for extent in share.everywhere)
    patch = 1 if isinstance(layer.module, nn.Linear) else layer.weight[0].numel()
    return inputs / (count * patch), gradients / count


def _norm_sums(layer: Norm, share: Share, scale: float) -> Seen:
    sums = {
        "inputs": layer.weight.new_zeros(share.most, dtype=layer.dtype),
        "gradients": layer.weight.new_zeros(layer.weight.numel(), dtype=layer.dtype),
    }
    for use in share.uses:
        x = layer.batched(use.inputs).to(layer.dtype)
        sums["inputs"][: x.shape[1]] += x.transpose(0, 1).flatten(1).sum(1) / math.prod(x.shape[2:]) ** 2
        sums["gradients"] += (layer.rows(use.gradients).to(layer.dtype) / scale).sum(0)
    return Seen(share.locations, sums=sums)


def _norm(layer: Norm, share: Share, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """H = [sum_k a_k^2, size of dim 1] / B^2, with a_k the sum over all dims but 1, / T^2, T the size of dims 2 and on;
    S = (the shift's gradient)^2 / B."""
    samples = sum(share.lengths)
    h = inputs.square().sum()[None]
    if layer.bias is not None:
        h = functional.pad(h, (0, 1), value=float(share.most))
    return h / samples**2, gradients.square() / samples
