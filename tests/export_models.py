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


class Bottleneck(nn.Module):
    """Of ResNet-50: 1x1, 3x3, 1x1."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        shapes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.path = nn.Sequential()
        for i, (c, k, size, step) in enumerate(shapes, 1):
            self.path.add_module(f"conv{i}", nn.Conv2d(c, k, size, step, size // 2, bias=False))
            self.path.add_module(f"bn{i}", nn.BatchNorm2d(k))
        self.downsample = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.downsample(x))


def resnet50() -> nn.Module:
    """ResNet-50's stem, classifier and widths; one block of each stage."""
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    blocks = [Bottleneck(*shape) for shape in ((64, 64, 1), (256, 128, 2), (512, 256, 2), (1024, 512, 2))]
    return nn.Sequential(stem, nn.BatchNorm2d(64), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=128, max_position_embeddings=32, num_labels=8, **sizes)).eval()


def llama() -> nn.Module:
    """With the embedding tied to the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=True, **sizes)).eval()


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
