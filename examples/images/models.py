"""Networks by name. Those for small images are here; those for ImageNet are torchvision's, but for EfficientNet-Lite0."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from efficientnet import EfficientNetLite0
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (He et al., 2016, arXiv 1512.03385); a 1x1 one where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network for small images: a 3x3 stem without pooling, stages of basic blocks, the mean over positions, a linear head.

    ResNet-20 and 32 have the layers of He et al., section 4.2, with 1x1 convolutions as shortcuts, and the parameter names of the code
    published with CrAM, whose checkpoints load.
    """

    def __init__(self, classes: int, channels: int, blocks: Sequence[int], widths: Sequence[int], pool: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        width_in, self.stages = widths[0], len(widths)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            strides = [1 if stage == 1 else 2] + [1] * (count - 1)
            layers = [Block(width_in if i == 0 else width, width, stride) for i, stride in enumerate(strides)]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
            width_in = width
        self.fc = nn.Linear(width_in, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def vgg16(classes: int, channels: int) -> nn.Module:
    """VGG-16 with batch norm for 32x32 images: one linear layer behind the convolutions (Simonyan and Zisserman, arXiv 1409.1556)."""
    layers: list[nn.Module] = []
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))


SMALL: dict[str, Callable[[int, int], nn.Module]] = {  # (classes, channels of an image)
    "resnet8": lambda classes, channels: ResNet(classes, channels, (1, 1, 1), (8, 16, 32), pool=True),
    "resnet8_wide": lambda classes, channels: ResNet(classes, channels, (1, 1, 1), (16, 32, 64), pool=True),
    "resnet20": lambda classes, channels: ResNet(classes, channels, (3, 3, 3), (16, 32, 64)),
    "resnet32": lambda classes, channels: ResNet(classes, channels, (5, 5, 5), (16, 32, 64)),
    "resnet18_cifar": lambda classes, channels: ResNet(classes, channels, (2, 2, 2, 2), (64, 128, 256, 512)),
    "vgg16_cifar": vgg16,
    "efficientnet_lite0": EfficientNetLite0,
}
LARGE = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_large")


def make(name: str, classes: int, channels: int = 3) -> nn.Module:
    """A new network.

    Raises:
        ValueError: another name, or a network of torchvision, which does not import.
    """
    if name in SMALL:
        return SMALL[name](classes, channels)
    if name not in LARGE:
        raise ValueError(f"model must be one of {', '.join([*SMALL, *LARGE])}, got {name!r}")
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        needs = "pip install torchvision, of the release and build that belong to this torch"
        raise ValueError(f"model {name} is torchvision's, which does not import ({error}): {needs}") from error
    return models.get_model(name, weights=None, num_classes=classes)


def head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer and its name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
