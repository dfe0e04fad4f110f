"""The training problems: a network, a criterion, and data cut into the same batches for every optimizer."""

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.curves import curves
from benchmarks.models import Autoencoder, ConvNet, Transformer

Pair = tuple[Tensor, Tensor]  # inputs and targets


@dataclass(frozen=True)
class Problem:
    name: str
    title: str
    network: Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> loss, averaged over samples
    unit: str  # of the loss
    train: Pair
    test: Pair
    batch: int
    steps: int  # in an epoch
    epochs: int
    fast_epochs: int  # for a first look
    judge: str  # the result that tells good settings from bad ones
    probe: int = 5_000  # at most so many samples of either split are evaluated
    accuracy: bool = False
    log: bool = True  # draw losses on a logarithmic axis

    def model(self, seed: int, device: str = "cpu") -> nn.Module:
        """A fresh network; the same weights for the same seed, on every device."""
        torch.manual_seed(seed)
        return self.network().to(device)

    def batches(self, seed: int, epoch: int) -> Iterator[Pair]:
        """The batches of one epoch, drawn without replacement; whatever the optimizer, they are the same."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        inputs, targets = self.train
        order = torch.randperm(len(inputs), generator=generator)
        for rows in order[: self.steps * self.batch].split(self.batch):
            yield inputs[rows.to(inputs.device)], targets[rows.to(inputs.device)]

    def probed(self, split: str) -> Pair:
        """The samples that are evaluated."""
        inputs, targets = getattr(self, split)
        stride = -(-len(inputs) // self.probe)
        return inputs[::stride], targets[::stride]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Loss (and accuracy) over the split, or over `probe` evenly spaced samples where it is larger."""
        inputs, targets = self.probed(split)
        model.eval()
        loss = correct = 0.0
        for x, y in zip(inputs.split(self.batch), targets.split(self.batch), strict=True):
            outputs = model(x)
            loss += self.criterion(outputs, y).item() * len(x)
            correct += (outputs.argmax(-1) == y).sum().item() if self.accuracy else 0
        model.train()
        result = {f"{split}_loss": loss / len(inputs)}
        return result | {f"{split}_accuracy": correct / len(inputs)} if self.accuracy else result


def autoencoder(device: str = "cpu") -> Problem:
    """784-400-200-100-50-25-6-...-784 on CURVES-like images; the loss sums over pixels, as is usual."""

    def criterion(logits: Tensor, images: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)

    train, test = (images.to(device) for images in curves())
    return Problem(
        name="curves",
        title="deep autoencoder on CURVES-like images (our re-creation)",
        network=Autoencoder,
        criterion=criterion,
        unit="nats per image",
        train=(train, train),
        test=(test, test),
        batch=1000,
        steps=len(train) // 1000,
        epochs=25,
        fast_epochs=4,
        judge="train_loss",
    )


def digits(device: str = "cpu") -> Problem:
    """A small convolutional network on scikit-learn's 1,797 handwritten digits, of which 500 are held out."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8).to(device) / 16
    labels = torch.tensor(labels)[order].to(device)
    return Problem(
        name="digits",
        title="convolutional network on handwritten digits",
        network=ConvNet,
        criterion=functional.cross_entropy,
        unit="nats per image",
        train=(images[500:], labels[500:]),
        test=(images[:500], labels[:500]),
        batch=64,
        steps=len(images[500:]) // 64,
        epochs=12,
        fast_epochs=4,
        judge="train_loss",
        accuracy=True,
    )


def text(device: str = "cpu") -> Problem:
    """A small transformer on the source of Python's standard library; every tenth file is held out."""

    def criterion(logits: Tensor, following: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), following.flatten())

    train, test = (windows.to(device) for windows in standard_library(context=64))
    return Problem(
        name="text",
        title="byte-level transformer on Python's standard library",
        network=Transformer,
        criterion=criterion,
        unit="nats per byte",
        train=(train[:, :-1], train[:, 1:]),
        test=(test[:, :-1], test[:, 1:]),
        batch=32,
        steps=40,
        epochs=10,
        fast_epochs=2,
        judge="test_loss",
        probe=256,
        log=False,
    )


def standard_library(context: int, limit: int = 4_000_000) -> Pair:
    """Windows of context + 1 bytes of the modules in the library's top folder: for training, and held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = b"".join(file.read_bytes() for file in files[::10])
    trained = b"".join(file.read_bytes() for index, file in enumerate(files) if index % 10)
    return windows(trained[:limit], context + 1), windows(held_out[:limit], context + 1)


def windows(data: bytes, length: int) -> Tensor:
    """The bytes as int64 [count, length]; a rest shorter than a window is dropped."""
    count = len(data) // length
    return torch.frombuffer(bytearray(data[: count * length]), dtype=torch.uint8).view(count, length).long()


PROBLEMS: dict[str, Callable[..., Problem]] = {"curves": autoencoder, "digits": digits, "text": text}
