"""The networks of the training problems, and ResNet-18 for timing training iterations.

`outer` names the layers whose weights are not hidden matrices (embeddings, heads): Muon leaves them to Adam.
`distribution` is that of the targets given the outputs: the Fisher matrix draws from it.
"""

from torch import Tensor, nn
from torch.nn import functional


class Autoencoder(nn.Sequential):
    """Hinton and Salakhutdinov's deep autoencoder, with ReLU: a linear code of six units, logits out."""

    widths = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
    outer = ()
    distribution = "bernoulli"

    def __init__(self):
        layers = []
        for fan_in, fan_out in zip(self.widths, self.widths[1:], strict=False):
            linear = fan_out in (min(self.widths), self.widths[-1])  # the code and the logits
            layers += [nn.Linear(fan_in, fan_out), nn.Identity() if linear else nn.ReLU()]
        super().__init__(*layers)


class ConvNet(nn.Sequential):
    """Three 3x3 convolutions for 8x8 images of ten classes."""

    outer = ("head",)
    distribution = "categorical"

    def __init__(self, width: int = 32):
        super().__init__()
        for index, fan_in in enumerate((1, width, width)):
            self.add_module(f"conv{index}", nn.Conv2d(fan_in, width, 3, padding=1))
            self.add_module(f"relu{index}", nn.ReLU())
            if index:
                self.add_module(f"pool{index}", nn.MaxPool2d(2))  # 8x8 -> 4x4 -> 2x2
        self.add_module("flatten", nn.Flatten())
        self.add_module("head", nn.Linear(4 * width, 10))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer layer that normalises before attention and before its two-layer perceptron."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.think(x)


class Transformer(nn.Module):
    """A byte-level language model: each position predicts the byte that follows it."""

    outer = ("embed", "place", "head")
    distribution = "categorical"

    def __init__(self, context: int = 64, width: int = 128, depth: int = 2, heads: int = 4):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)  # torch's own default of 1 drowns the layers' output

    def forward(self, text: Tensor) -> Tensor:  # [batch, time] -> [batch, time, 256]
        x = self.embed(text) + self.place.weight[: text.shape[1]]
        return self.head(self.norm(self.layers(x)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.path(x) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """He et al.'s residual network of 18 layers, for images of at least 32x32 and a thousand classes."""

    outer = ("head",)
    distribution = "categorical"

    def __init__(self, width: int = 64):
        stem = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        stages, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            stages += [ResidualBlock(inputs, outputs, 2 if stage else 1), ResidualBlock(outputs, outputs, 1)]
            inputs = outputs
        super().__init__(*stem, nn.MaxPool2d(3, 2, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.add_module("head", nn.Linear(inputs, 1000))
