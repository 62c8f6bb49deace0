"""What every page of the documentation may use without defining it, as a reader has it: a small model, data, a loss."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def names() -> dict[str, Any]:
    """A fresh namespace: `model` (a convolution with batch norm, and a head), `images`, `labels`, `loader` of 4 batches, `criterion`,
    `loss(model)` of the batch, and the imports that stand at the top of any script."""
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(4, 32, 3, padding=1, bias=False),
        "norm": nn.BatchNorm2d(32),
        "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(32, 32),
        "head": nn.Linear(32, 8),
    }
    model = nn.Sequential(OrderedDict(layers))
    loader = [(torch.randn(16, 4, 8, 8), torch.randint(0, 8, (16,))) for _ in range(4)]
    images, labels = loader[0]
    criterion = nn.CrossEntropyLoss()
    return {
        "torch": torch,
        "nn": nn,
        "model": model,
        "loader": loader,
        "images": images,
        "labels": labels,
        "criterion": criterion,
        "loss": lambda model: criterion(model(images), labels),
    }
