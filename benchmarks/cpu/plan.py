"""How much is measured: everything, what takes two minutes, or a rehearsal for the tests."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.ops import triangle
from benchmarks.shapes import (
    Shapes,
    autoencoder,
    filters,
    matrices,
    resnet18,
    resnet32,
    resnet50,
    transformer,
    vgg16,
)

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """The tensors of one network, in one memory format."""

    shapes: Shapes
    layout: str = "contiguous"
    libraries: bool = True  # the optimizers of other libraries than torch run on it too


@dataclass(frozen=True)
class Plan:
    name: str
    sizes: tuple[int, ...]  # n of the ops
    state_bytes: int  # of the blocks that an op works on
    most_blocks: int  # at small n: the slowest peer takes microseconds a block
    curve_sizes: tuple[int, ...]  # n of the curves against B
    counts: tuple[int, ...]  # B of the curves
    curve_bytes: int  # of the blocks, at most
    all_sizes: tuple[int, ...]  # n of the curve against n
    cases: dict[str, Case]
    problems: tuple[str, ...]  # of training, whose whole iterations are timed
    rounds: int  # of four iterations
    many: str  # the case whose tensors show the host's share of a step
    seconds: float  # per contestant
    patience: float  # seconds that an optimizer's rare work may take before it is left out
    cubes: float  # sum of the cubes of its matrices' sizes up to which a library's Shampoo or SOAP is tried
    copy_bytes: int
    product_size: int  # of the matrix product that measures the peak

    def count(self, n: int, itemsize: int = 4) -> int:
        """B: whole outputs of 64 inputs."""
        fitting = self.state_bytes // (itemsize * triangle(n))
        return max(1, min(self.most_blocks, fitting) // 64) * 64


def half_decades(first: int, last: int) -> tuple[int, ...]:
    return tuple(int(10 ** (half / 2)) for half in range(2 * first, 2 * last + 1))


CONVOLUTIONS = "3x3 convolutions of ResNet-18"
LINEAR = "linear layers of a transformer"

FULL = Plan(
    name="full",
    sizes=(1, 2, 4, 9, 16, 20, 25, 32, 49, 64, 96, 128),
    state_bytes=32 * MIB,
    most_blocks=100_000,
    curve_sizes=(4, 9, 16, 32, 64),
    counts=half_decades(2, 7),
    curve_bytes=2048 * MIB,
    all_sizes=tuple(range(1, 129)),
    cases={
        CONVOLUTIONS: Case(filters(resnet18()), libraries=False),
        f"{CONVOLUTIONS}, channels_last": Case(filters(resnet18()), "channels_last", libraries=False),
        "ResNet-18": Case(resnet18()),
        "ResNet-50": Case(resnet50()),
        "VGG16 (CIFAR)": Case(vgg16()),
        "ResNet-32 (CIFAR)": Case(resnet32()),
        "transformer, 12 x 768": Case(transformer()),
        LINEAR: Case(matrices(transformer()), libraries=False),
        "autoencoder MNIST": Case(autoencoder(784, 1000, 500, 250, 30)),
        "autoencoder FACES": Case(autoencoder(625, 2000, 1000, 500, 30)),
        "autoencoder CURVES": Case(autoencoder(784, 400, 200, 100, 50, 25, 6)),
    },
    problems=("curves", "digits", "text"),
    rounds=12,
    many="ResNet-50",
    seconds=0.25,
    patience=60,
    cubes=2e10,
    copy_bytes=512 * MIB,
    product_size=2048,
)

FAST = Plan(
    name="fast",
    sizes=(4, 9, 32, 128),
    state_bytes=2 * MIB,
    most_blocks=10_000,
    curve_sizes=(9, 32),
    counts=half_decades(2, 5),
    curve_bytes=64 * MIB,
    all_sizes=(1, 2, 4, 6, 9, 12, 16, 20, 21, 25, 32, 49, 64, 96, 128),
    cases={
        CONVOLUTIONS: Case(filters(resnet18(32)), libraries=False),
        f"{CONVOLUTIONS}, channels_last": Case(filters(resnet18(32)), "channels_last", libraries=False),
        "ResNet-18, a quarter of its width": Case(resnet18(16)),
        "ResNet-32 (CIFAR)": Case(resnet32()),
        "transformer, 2 x 128": Case(transformer(128, 2)),
        LINEAR: Case(matrices(transformer(256, 2)), libraries=False),
        "autoencoder CURVES": Case(autoencoder(784, 400, 200, 100, 50, 25, 6)),
    },
    problems=("digits",),
    rounds=3,
    many="ResNet-32 (CIFAR)",
    seconds=0.03,
    patience=2,
    cubes=1e7,
    copy_bytes=64 * MIB,
    product_size=1024,
)

REHEARSAL = Plan(
    name="rehearsal",
    sizes=(2, 21),
    state_bytes=100_000,
    most_blocks=64,
    curve_sizes=(2, 9),
    counts=(10, 100, 1000),
    curve_bytes=MIB,
    all_sizes=(1, 2, 21),
    cases={
        CONVOLUTIONS: Case(filters(resnet32(2, (1, 1)))),
        LINEAR: Case(matrices(transformer(8, 1))),
        "autoencoder": Case(autoencoder(150, 4)),  # a row of more than 128 inputs: refreshed every 100 steps
    },
    problems=(),
    rounds=1,
    many=CONVOLUTIONS,
    seconds=0.002,
    patience=10,
    cubes=1e7,
    copy_bytes=MIB // 4,
    product_size=64,
)

PLANS = {plan.name: plan for plan in (FULL, FAST, REHEARSAL)}
