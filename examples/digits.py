"""What the examples train: a small convolutional network on scikit-learn's handwritten digits, 8 x 8 pixels each.

They run on a CPU, where a resumed run ends in the same bits as an undisturbed one.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images [N, 1, 8, 8] in [0, 1] with their labels: 1440 to train with, 357 to test with."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    return TensorDataset(images[:1440], labels[:1440]), TensorDataset(images[1440:], labels[1440:])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The share of the test images that ``model`` names right."""
    images, labels = test.tensors
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def same_weights(one: nn.Module, other: nn.Module) -> str:
    """Whether two models agree in every bit, in words."""
    equal = all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    return "the same weights" if equal else "other weights"
