"""Shapes of well-known networks' parameters: an optimizer's step needs no more of them."""

Shape = tuple[int, ...]


def resnet50(width: int = 64, repeats: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> list[Shape]:
    """All 161 tensors, 25.6 million parameters."""
    shapes: list[Shape] = [*convolution(width, 3, 7)]
    inputs = width
    for stage, count in enumerate(repeats):
        inner = width * 2**stage
        for index in range(count):
            shapes += convolution(inner, inputs, 1) + convolution(inner, inner, 3) + convolution(4 * inner, inner, 1)
            if index == 0:
                shapes += convolution(4 * inner, inputs, 1)  # the shortcut
            inputs = 4 * inner
    return [*shapes, (classes, inputs), (classes,)]


def convolution(outputs: int, inputs: int, kernel: int) -> list[Shape]:
    """A convolution without bias and its batch normalisation."""
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]


def filters(shapes: list[Shape]) -> list[Shape]:
    """The 3x3 convolutions among them."""
    return [shape for shape in shapes if shape[2:] == (3, 3)]


def transformer(width: int = 768, depth: int = 12) -> list[Shape]:
    """The matrices of a transformer's layers: queries, keys and values, projection, and the two of the perceptron."""
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return layer * depth
