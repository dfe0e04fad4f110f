"""The parameters of well-known networks, by name and shape: an optimizer's step needs no more of them."""

from itertools import pairwise

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def resnet50(width: int = 64, repeats: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> Shapes:
    """All 161 tensors, 25.6 million parameters."""
    shapes = normalised("stem", width, 3, 7)
    inputs = width
    for stage, count in enumerate(repeats):
        inner = width * 2**stage
        for index in range(count):
            name = f"stage{stage}.{index}"
            shapes |= normalised(f"{name}.reduce", inner, inputs, 1)
            shapes |= normalised(f"{name}.filter", inner, inner, 3)
            shapes |= normalised(f"{name}.expand", 4 * inner, inner, 1)
            if index == 0:
                shapes |= normalised(f"{name}.shortcut", 4 * inner, inputs, 1)
            inputs = 4 * inner
    return shapes | linear("head", classes, inputs)


def resnet18(width: int = 64) -> Shapes:
    """11.7 million parameters."""
    stem = normalised("stem", width, 3, 7)
    return stem | basic_stages(width, (2, 2, 2, 2), shortcuts=True) | linear("head", 1000, 8 * width)


def resnet32(width: int = 16, repeats: tuple[int, ...] = (5, 5, 5)) -> Shapes:
    """For CIFAR-10: 0.46 million parameters; its shortcuts have none."""
    stem = normalised("stem", width, 3, 3)
    return stem | basic_stages(width, repeats, shortcuts=False) | linear("head", 10, 4 * width)


def basic_stages(width: int, repeats: tuple[int, ...], shortcuts: bool) -> Shapes:
    """Stages of blocks of two 3x3 convolutions, each stage twice as wide as the one before."""
    shapes: Shapes = {}
    inputs = width
    for stage, count in enumerate(repeats):
        outputs = width * 2**stage
        for index in range(count):
            name = f"stage{stage}.{index}"
            shapes |= normalised(f"{name}.first", outputs, inputs, 3)
            shapes |= normalised(f"{name}.second", outputs, outputs, 3)
            if shortcuts and inputs != outputs:
                shapes |= normalised(f"{name}.shortcut", outputs, inputs, 1)
            inputs = outputs
    return shapes


def vgg16(width: int = 64) -> Shapes:
    """For CIFAR-10, with one linear layer: 14.7 million parameters."""
    widths = [3] + [width] * 2 + [2 * width] * 2 + [4 * width] * 3 + [8 * width] * 6
    shapes: Shapes = {}
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        shapes |= {f"conv{index}.weight": (outputs, inputs, 3, 3), f"conv{index}.bias": (outputs,)}
    return shapes | linear("head", 10, 8 * width)


def transformer(width: int = 768, depth: int = 12) -> Shapes:
    """Its layers: attention, a perceptron, and the normalisation before each; 85 million parameters."""
    shapes: Shapes = {}
    for index in range(depth):
        name = f"layer{index}"
        shapes |= normalisation(f"{name}.norm1", width) | linear(f"{name}.qkv", 3 * width, width)
        shapes |= linear(f"{name}.out", width, width) | normalisation(f"{name}.norm2", width)
        shapes |= linear(f"{name}.up", 4 * width, width) | linear(f"{name}.down", width, 4 * width)
    return shapes


def llama(width: int = 4096, depth: int = 32, inner: int = 11008, vocabulary: int = 32000) -> Shapes:
    """A decoder with a gated perceptron and a head of its own, no biases: 6.7 billion parameters."""
    shapes: Shapes = {"embed.weight": (vocabulary, width)}
    for index in range(depth):
        name = f"layer{index}"
        shapes |= {f"{name}.norm1.weight": (width,), f"{name}.norm2.weight": (width,)}
        shapes |= {f"{name}.{part}.weight": (width, width) for part in ("query", "key", "value", "out")}
        shapes |= {f"{name}.{part}.weight": (inner, width) for part in ("gate", "up")}
        shapes |= {f"{name}.down.weight": (width, inner)}
    return shapes | {"norm.weight": (width,), "head.weight": (vocabulary, width)}


def autoencoder(*encoder: int) -> Shapes:
    """Linear layers of these widths, and back again."""
    widths = [*encoder, *reversed(encoder[:-1])]
    shapes: Shapes = {}
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        shapes |= linear(f"layer{index}", outputs, inputs)
    return shapes


def normalised(name: str, outputs: int, inputs: int, kernel: int) -> Shapes:
    """A convolution without bias and its batch normalisation."""
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)} | normalisation(f"{name}.norm", outputs)


def normalisation(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def filters(shapes: Shapes) -> Shapes:
    """The 3x3 convolutions among them."""
    return {name: shape for name, shape in shapes.items() if shape[2:] == (3, 3)}


def matrices(shapes: Shapes) -> Shapes:
    """The weights of the linear layers among them."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2}
