"""Small models of every kind that is exported, pruned to 2:4 along the input channels."""

import torch
from torch import Tensor, nn

from cram_kernels import NM, prune


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """A stem, two blocks, a depthwise convolution and a classifier."""
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
    return nn.Sequential(
        stem, nn.BatchNorm2d(16), Block(16, 16, 1), Block(16, 32, 2), depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 12)
    )


class Transformer(nn.Module):
    """Tokens -> a score of each: an embedding, two encoder layers and a head."""

    def __init__(self, width: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 100, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


def pruned(model: nn.Module) -> nn.Module:
    prune(model, NM(2, 4), exclude=["embedding.weight"] if isinstance(model, Transformer) else ())
    return model.eval()


def images() -> tuple[Tensor]:
    return (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


def tokens() -> tuple[Tensor]:
    return (torch.arange(14).view(2, 7) * 7 % 100,)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 4, 1))


MODELS = {  # name -> model, inputs, what stays dense
    "resnet": (resnet, images, ()),
    "transformer": (Transformer, tokens, ("embedding.weight",)),
    "convolution": (convolution, lambda: (torch.randn(1, 8, 6, 6),), ()),
}


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...], tuple[str, ...]]:
    """A pruned model, an input, and the patterns of what is not pruned."""
    torch.manual_seed(0)
    model, inputs, exclude = MODELS[name]
    return pruned(model()), inputs(), exclude
