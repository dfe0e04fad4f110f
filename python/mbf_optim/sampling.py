"""Targets drawn from the model's own distribution: what turns a curvature of gradients into the Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Residual = Callable[[Tensor], Tensor]


def categorical(logits: Tensor) -> Tensor:
    """softmax(z) - onehot(y), y ~ softmax(z) over the last dimension."""
    probabilities = logits.softmax(-1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1).view(logits.shape[:-1] + (1,))
    return probabilities.scatter_add(-1, drawn, -torch.ones_like(probabilities[..., :1]))


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
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(map(repr, DISTRIBUTIONS))
        raise ValueError(f"{title}: expected distribution to be None, {known} or a function, got {distribution!r}")
    return DISTRIBUTIONS[distribution]
