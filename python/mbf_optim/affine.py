"""Linear and convolutional layers as what they are to their curvature: W abar, once for every location and group.

abar is a sample's input at one location (an im2col patch), with a 1 appended where there is a bias; g the gradient of
the sample's loss with respect to the output there. [W | b] is the matrix, its bias the last column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .capture import Use
from .replicas import Extent


class Rows(NamedTuple):
    """m samples at T locations each, in ``groups`` groups. Samples with fewer locations have rows of zeros."""

    inputs: Tensor  # abar, [m, T, groups, p]
    gradients: Tensor  # g, [m, T, groups, q]
    locations: float  # T, on average

    def weighted(self, root: float) -> Rows:
        """With gradients times so much."""
        return self if root == 1 else self._replace(gradients=root * self.gradients)

    def padded(self, locations: int) -> Rows:
        """With rows of zeros up to so many."""
        return Rows(_padded(self.inputs, locations), _padded(self.gradients, locations), self.locations)


@dataclass(frozen=True, eq=False)
class ModuleLayer(ABC):
    """A module with a weight. ``bias``: None also where it is frozen."""

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None

    @property
    def params(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def dtype(self) -> torch.dtype:
        """Of all that is computed from the layer: float32 at least."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @abstractmethod
    def fits(self, use: Use) -> bool:
        """Whether the module did with its input what its class does; a subclass may do otherwise."""

    @abstractmethod
    def extent(self, uses: Sequence[Use]) -> Extent:
        """Of all uses."""


class Affine(ModuleLayer):
    """A Linear, Conv1d or Conv2d."""

    def fits(self, use: Use) -> bool:
        inputs, outputs = tuple(use.inputs.shape), tuple(use.gradients.shape)
        if isinstance(self.module, nn.Linear):
            return inputs[-1] == self.weight.shape[1] and outputs == (*inputs[:-1], self.weight.shape[0])
        dimensions = self.weight.ndim - 2
        *samples, channels = inputs[:-dimensions]
        fitting = len(samples) <= 1 and channels == self.weight.shape[1] * self.groups
        return fitting and outputs == (*samples, self.weight.shape[0], *self._places(inputs[-dimensions:]))

    def _places(self, sizes: Sequence[int]) -> list[int]:
        """Of a convolution's output, in every dimension."""
        module = self.module
        padding = module._reversed_padding_repeated_twice[::-1]
        return [
            (size + left + right - dilation * (kernel - 1) - 1) // stride + 1
            for size, left, right, kernel, stride, dilation in zip(
                sizes, padding[::2], padding[1::2], module.kernel_size, module.stride, module.dilation, strict=True
            )
        ]

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """groups, q, p."""
        outputs = self.weight.shape[0] // self.groups
        return self.groups, outputs, self.weight[0].numel() + (self.bias is not None)

    def joined(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[groups, q, p] of tensors of the shapes of the parameters."""
        matrix = weight.reshape(self.groups, -1, self.weight[0].numel()).to(self.dtype)
        return matrix if bias is None else torch.cat([matrix, bias.view(self.groups, -1, 1).to(self.dtype)], 2)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The reverse: of the shapes and dtypes of the parameters."""
        parts = [matrix] if self.bias is None else [matrix[..., :-1], matrix[..., -1]]
        return [part.reshape(p.shape).to(p.dtype) for part, p in zip(parts, self.params, strict=True)]

    def outputs(self, inputs: Tensor) -> Tensor:
        """[W | b] abar, [groups, q], of abar [groups, p]."""
        weight = self.joined(self.weight)
        outputs = (weight @ inputs[:, : weight.shape[2], None])[..., 0]
        return outputs if self.bias is None else outputs + self.bias.view(self.groups, -1).to(self.dtype)

    def rows(self, uses: Sequence[Use], mean_loss: bool) -> Rows:
        """Of all uses. Uses of one forward pass are locations of the same samples, passes have samples of their own.
        What comes may be a view of what the uses hold.

        ``mean_loss``: the loss was averaged over all samples, so that a sample's own gradient is that many times what
        autograd gave; otherwise it was a sum.
        """
        if not uses:
            groups, outputs, inputs = self.shape
            return Rows(*(self.weight.new_zeros(0, 1, groups, n, dtype=self.dtype) for n in (inputs, outputs)), 0.0)
        passes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for use in uses:
            inputs, gradients = self.patches(use.inputs), self._outputs(use.gradients)
            passes.setdefault((use.forward_pass, len(inputs)), []).append((inputs, gradients))
        parts = [tuple(_joined(tensors, 1) for tensors in zip(*alike, strict=True)) for alike in passes.values()]
        samples = sum(len(inputs) for inputs, _ in parts)
        locations = sum(inputs.shape[0] * inputs.shape[1] for inputs, _ in parts) / samples
        inputs, gradients = (_stacked(tensors) for tensors in zip(*parts, strict=True))
        return Rows(inputs, gradients * samples if mean_loss else gradients, locations)

    def extent(self, uses: Sequence[Use]) -> Extent:
        passes: dict[tuple[int, int], int] = {}
        for use in uses:
            samples = self._samples(use)
            locations = use.gradients.numel() // (samples * self.weight.shape[0])
            key = use.forward_pass, samples
            passes[key] = passes.get(key, 0) + locations
        locations = sum(samples * each for (_, samples), each in passes.items())
        return Extent(sum(samples for _, samples in passes), locations, max(passes.values(), default=0))

    def means(self, uses: Sequence[Use], mean_loss: bool) -> tuple[Tensor, Tensor]:
        """abar [groups, p] and g [groups, q], averaged over samples and locations; no rows are made for it."""
        if not uses:
            groups, outputs, inputs = self.shape
            zeros = self.weight.new_zeros(groups, inputs + outputs, dtype=self.dtype)
            return tuple(zeros.split((inputs, outputs), 1))
        inputs, gradients, counts = [], [], []
        for use in uses:
            patches = self.patches(self._batched(use.inputs).mean(0, keepdim=True))
            inputs.append(patches.mean((0, 1)))
            gradients.append(self._outputs(self._batched(use.gradients).mean(0, keepdim=True)).mean((0, 1)))
            counts.append(self._samples(use) * patches.shape[1])
        shares = [count / sum(counts) for count in counts]
        scale = self.extent(uses).samples if mean_loss else 1
        return (
            sum(share * part for share, part in zip(shares, inputs, strict=True)),
            sum(share * scale * part for share, part in zip(shares, gradients, strict=True)),
        )

    def patches(self, inputs: Tensor) -> Tensor:
        """abar of a module's inputs, [m, T, groups, p]."""
        inputs = self._batched(inputs)
        if isinstance(self.module, nn.Linear):
            patches = inputs.reshape(len(inputs), -1, 1, inputs.shape[-1])
        else:
            patches = self._unfolded(inputs)
        return patches if self.bias is None else functional.pad(patches, (0, 1), value=1.0)

    def _unfolded(self, inputs: Tensor) -> Tensor:
        module, dimensions = self.module, self.weight.ndim - 2
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        kernel, stride, dilation = (tuple(t) for t in (module.kernel_size, module.stride, module.dilation))
        if dimensions == 1:
            padded, kernel, stride, dilation = padded[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
        columns = functional.unfold(padded, kernel, dilation=dilation, stride=stride)
        return columns.unflatten(1, (self.groups, -1)).permute(0, 3, 1, 2)

    def _outputs(self, gradients: Tensor) -> Tensor:
        """g of the gradients of a module's outputs, [m, T, groups, q]."""
        gradients = self._batched(gradients)
        if isinstance(self.module, nn.Linear):
            return gradients.reshape(len(gradients), -1, 1, gradients.shape[-1])
        return gradients.flatten(2).unflatten(1, (self.groups, -1)).permute(0, 3, 1, 2)

    def _samples(self, use: Use) -> int:
        return 1 if use.inputs.ndim == self.weight.ndim - 1 else len(use.inputs)

    def _batched(self, x: Tensor) -> Tensor:
        return (x[None] if x.ndim == self.weight.ndim - 1 else x).to(self.dtype)


Kind = TypeVar("Kind", bound=ModuleLayer)


def affine_layers(model: nn.Module, trained: Container[int] | None = None) -> list[Affine]:
    return layers_of(model, Affine, (nn.Linear, nn.Conv1d, nn.Conv2d), trained)


def layers_of(
    model: nn.Module, make: type[Kind], kinds: tuple[type, ...], trained: Container[int] | None = None
) -> list[Kind]:
    """Of the modules of some kinds that have a weight.

    Only those whose weight and bias are parameters, not made of others at every pass, and which no other module holds:
    the inputs of the other would not be known. ``trained``: the ids of the parameters that count; None: all that
    require gradients.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, kinds) and module.weight is not None:
            bias = module.bias if module.bias is not None and module.bias.requires_grad else None
            if bias is not None and trained is not None and id(bias) not in trained:
                bias = None
            layer = make(name, module, module.weight, bias)
            single = all(owners.get(id(parameter)) == 1 for parameter in layer.params)
            if single and (trained is None or id(module.weight) in trained):
                layers.append(layer)
    return layers


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    most = max(tensor.shape[1] for tensor in tensors)
    return _joined([_padded(tensor, most) for tensor in tensors], 0)


def _padded(tensor: Tensor, most: int) -> Tensor:
    missing = most - tensor.shape[1]
    return functional.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
