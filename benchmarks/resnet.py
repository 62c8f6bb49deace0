"""ResNet-50 (He et al. 2015, with the stride in the 3x3 convolutions) in plain torch, batch norm folded: what an engine runs. ReLU and sums
are in place, as in torchvision's."""

import torch
from torch import Tensor, nn

# (planes of the 3x3 convolutions, blocks, stride of the first block)
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, planes, 1)
        self.spatial = nn.Conv2d(planes, planes, 3, stride, 1)
        self.expand = nn.Conv2d(planes, 4 * planes, 1)
        self.shortcut = nn.Conv2d(channels, 4 * planes, 1, stride) if stride != 1 or channels != 4 * planes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.spatial(self.reduce(x).relu_()).relu_())
        return y.add_(self.shortcut(x)).relu_()


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels, blocks = 64, []
        for planes, count, stride in STAGES:
            for i in range(count):
                blocks.append(Bottleneck(channels, planes, stride if i == 0 else 1))
                channels = 4 * planes
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.stem(x).relu_()).contiguous()
        return self.fc(self.blocks(y).mean((2, 3)))


def resnet50() -> ResNet50:
    """With He's random weights."""
    model = ResNet50().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    model.stem.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # in which torch's max pooling takes a tenth of its time
    return model


def _distinct_convolutions() -> list[tuple[int, int, int, int, int]]:
    """(channels, out_channels, size of the input, kernel, stride) of all convolutions but the stem, each once."""
    found: dict[tuple[int, int, int, int, int], None] = {}

    def note(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[conv.in_channels, conv.out_channels, inputs[0].shape[-1], conv.kernel_size[0], conv.stride[0]] = None

    with torch.device("meta"):
        model = ResNet50()
        for module in model.blocks.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return list(found)


CONVOLUTIONS = _distinct_convolutions()
