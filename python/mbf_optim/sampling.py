"""Targets drawn from the model's own distribution: what turns a curvature of gradients into the Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Residual = Callable[[Any], Any]


def categorical(logits: Tensor) -> Tensor:
    """softmax(z) - onehot(y), y ~ softmax(z) over the last dimension."""
    probabilities = logits.softmax(-1)
    targets = torch.multinomial(probabilities.reshape(-1, logits.shape[-1]), 1).view(logits.shape[:-1] + (1,))
    return probabilities.scatter_add(-1, targets, -torch.ones_like(probabilities[..., :1]))


def bernoulli(logits: Tensor) -> Tensor:
    """sigmoid(z) - y, y ~ Bernoulli(sigmoid(z))."""
    probabilities = logits.sigmoid()
    return probabilities - probabilities.bernoulli()


def gaussian(means: Tensor) -> Tensor:
    """z - y, y ~ N(z, 1): of half the squared error."""
    return torch.randn_like(means)


DISTRIBUTIONS: dict[str, Residual] = {"categorical": categorical, "bernoulli": bernoulli, "gaussian": gaussian}


def residual_of(title: str, distribution: str | Residual) -> Residual:
    """Of -log p(y | z) for drawn y the gradient with respect to z, of each sample alone: [m, ...] -> [m, ...]."""
    if callable(distribution):
        return distribution
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        known = ", ".join(map(repr, DISTRIBUTIONS))
        raise ValueError(f"{title}: expected distribution to be None, {known} or a function, got {distribution!r}")
    return DISTRIBUTIONS[distribution]


def drawn(title: str, residual: Residual, outputs: object) -> list[tuple[Tensor, Tensor]]:
    """The outputs that a loss may come back to, each with the gradient of its drawn targets; none if they are not
    finite, as then there is no distribution to draw from."""
    if not isinstance(outputs, Tensor) and residual in DISTRIBUTIONS.values():
        raise TypeError(
            f"{title}: expected the model to return a tensor, got {type(outputs).__name__}; "
            "for others pass a function of them as distribution"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in _tensors(outputs)):
        return []
    if isinstance(outputs, Tensor):  # a draw in half precision would be a coarse one
        found = residual(outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32)))
    else:
        found = residual(outputs)
    return [(z, r.to(z.dtype)) for z, r in _pairs(title, outputs, found) if z.requires_grad]


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (Mapping, tuple, list)):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(value)


def _pairs(title: str, outputs: Any, found: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the tensors in both, at the same place."""
    if found is None:
        return
    if isinstance(outputs, Tensor) and isinstance(found, Tensor) and outputs.shape == found.shape:
        yield outputs, found
    elif isinstance(outputs, Mapping) and isinstance(found, Mapping) and found.keys() <= outputs.keys():
        for key, value in found.items():
            yield from _pairs(title, outputs[key], value)
    elif isinstance(outputs, (tuple, list)) and isinstance(found, (tuple, list)) and len(outputs) == len(found):
        for output, value in zip(outputs, found, strict=True):
            yield from _pairs(title, output, value)
    else:
        wanted, got = (_described(value) for value in (outputs, found))
        raise ValueError(f"{title}: expected distribution to return gradients of {wanted}, got {got}")


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
