"""A of a layer, the input side of K-FAC: whole, or what is left of a convolution's if positions are uncorrelated.

Either is, in some orthogonal basis, made of blocks [groups, n, n], each repeated some times. In that basis a tensor
[groups, q, p] has a part [groups, q k, n] for each of them: k rows of coordinates for every row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .affine import Affine, Rows
from .kronecker import gram, mean_diagonal
from .replicas import Seen


class Whole:
    """One block, A itself."""

    names = ("A",)

    def __init__(self, layer: Affine):
        _, _, self.size = layer.shape
        self.sizes = {"A": self.size}

    def sums(self, rows: Rows) -> Seen:
        """Over samples, of what the blocks are made of."""
        return Seen(rows.locations, {"A": gram(rows.inputs)}, {})

    def blocks(self, means: Seen) -> dict[str, Tensor]:
        """Of means over samples."""
        return {"A": means.matrices["A"]}

    def mean_diagonal(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """tr A / p, [groups]."""
        return mean_diagonal(blocks["A"])

    def split(self, x: Tensor) -> dict[str, Tensor]:
        return {"A": x}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["A"]

    def __str__(self) -> str:
        return f"A {self.size}x{self.size}"


class Uncorrelated:
    """SUA (Grosse & Martens 2016): a convolution's input, C channels of a group, has at all K offsets of the kernel one
    mean mu and one covariance Sigma, and between offsets no covariance. With the offset before the channel, and the 1
    of the bias last::

        A = T [I_K (x) Sigma + 1 1^T (x) mu mu^T   1 (x) mu]
              [1^T (x) mu^T                        1       ]

    Deviations from the mean over offsets see T Sigma, [C, C], K - 1 times. sqrt(K) times that mean, and the bias, see

        T [Sigma + K mu mu^T   sqrt(K) mu]
          [sqrt(K) mu^T        1         ]     [C + 1, C + 1], or without a bias [C, C]

    mu and Sigma are those of all patches and offsets, padding included. Departure: the paper counts for every pair of
    offsets the locations at which both lie inside the image.
    """

    names = ("A_deviation", "A_mean")

    def __init__(self, layer: Affine):
        self.channels, self.offsets = layer.weight.shape[1], layer.weight[0, 0].numel()
        self.biased = layer.bias is not None
        self.size = self.channels + self.biased
        self.sizes = dict(zip(self.names, (self.channels, self.size), strict=True))

    def sums(self, rows: Rows) -> Seen:
        weights, _ = self._apart(rows.inputs)
        inputs = weights.movedim(-1, 2).flatten(1, 2)  # [m, T K, groups, C]
        sums = {"first": inputs.sum((0, 1))[:, :, None] / self.offsets}
        return Seen(rows.locations, {"second": gram(inputs) / self.offsets}, sums)

    def blocks(self, means: Seen) -> dict[str, Tensor]:
        locations = means.locations
        mu = means.sums["first"] / locations
        common = locations * mu @ mu.mT
        deviation = means.matrices["second"] - common
        mean = deviation + self.offsets * common
        if self.biased:
            border = locations * self.offsets**0.5 * mu
            corner = torch.full_like(border[:, :1], locations)
            mean = torch.cat([torch.cat([mean, border], 2), torch.cat([border.mT, corner], 2)], 1)
        return {"A_deviation": deviation, "A_mean": mean}

    def mean_diagonal(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """tr A / p, [groups]."""
        deviation, mean = (mean_diagonal(blocks[name]) * blocks[name].shape[1] for name in self.names)
        return ((self.offsets - 1) * deviation + mean) / (self.channels * self.offsets + self.biased)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        weights, bias = self._apart(x)
        mean = weights.mean(-1)
        deviation = (weights - mean[..., None]).mT.flatten(1, 2)
        return {"A_deviation": deviation, "A_mean": torch.cat([self.offsets**0.5 * mean, bias], 2)}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        deviation, mean = parts["A_deviation"].unflatten(1, (-1, self.offsets)).mT, parts["A_mean"]
        weights = deviation + mean[..., : self.channels, None] / self.offsets**0.5
        return torch.cat([weights.flatten(2), mean[..., self.channels :]], 2)

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last dimension what belongs to weights, [..., C, K], and to the bias, [..., 1 or 0]."""
        count = self.channels * self.offsets
        return x[..., :count].unflatten(-1, (self.channels, self.offsets)), x[..., count:]

    def __str__(self) -> str:
        return f"A {self.channels}x{self.channels} and {self.size}x{self.size}"


def input_side(layer: Affine, group: dict) -> Whole | Uncorrelated:
    """By the options of the layer's group. Where there is one offset, SUA assumes nothing."""
    several = layer.weight[0, 0].numel() > 1
    return Uncorrelated(layer) if several and group["spatially_uncorrelated"] else Whole(layer)
