"""A CURVES-like data set, drawn on the spot: 28x28 gray images of smooth curves through three random points.

This is our own re-creation of the idea of Hinton and Salakhutdinov, "Reducing the dimensionality of data with
neural networks" (Science, 2006), not their file: losses on it cannot be compared with published ones.
Three points have six coordinates, hence the six units in the middle of the autoencoder that is trained on it.
"""

import torch
from torch import Tensor

SIDE = 28  # pixels
MARGIN = 3.0  # pixels between the three points and the border
DOTS = 64  # points at which a curve is sampled: about a pixel apart even on the longest one
SEED = 2006
CHUNK = 256  # images drawn at once: few enough that the distances stay in cache


def curves(train: int = 20_000, test: int = 10_000, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Training and test images [count, 784] with values from 0 to 1; the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(train + test, 3, 2, generator=generator) * (SIDE - 2 * MARGIN) + MARGIN
    images = torch.cat([draw(chunk) for chunk in points.split(CHUNK)])
    return images[:train], images[train:]


def draw(points: Tensor) -> Tensor:
    """Images [count, 784] of the curves through points [count, 3, 2]."""
    dots = through(points)  # [count, DOTS, 2]
    pixels = torch.arange(SIDE) + 0.5
    across, down = (dots[..., None] - pixels).square().unbind(2)  # [count, DOTS, SIDE] each
    squared = torch.full((len(points), SIDE, SIDE), torch.inf)
    for dot in range(DOTS):
        torch.minimum(squared, down[:, dot, :, None] + across[:, dot, None, :], out=squared)
    # Full ink up to half a pixel from the curve, none beyond one and a half: that is the anti-aliasing.
    return (1.5 - squared.sqrt()).clamp(0, 1).flatten(1)


def through(points: Tensor) -> Tensor:
    """The parabolas [count, DOTS, 2] that pass through points [count, 3, 2] at the times 0, 1/2 and 1."""
    t = torch.linspace(0, 1, DOTS)
    weights = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], dim=1)
    return weights @ points
