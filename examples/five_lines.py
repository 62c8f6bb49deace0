"""CrAM in five lines: a small network, trained twice on made-up data, and pruned to a tenth of its weights in one shot.

Run: python examples/five_lines.py
"""

import torch
from torch import Tensor, nn

from cram_kernels import CrAM, TopK, prune


def spirals(n: int) -> tuple[Tensor, Tensor]:
    """Points [n, 2] on three arms of a spiral, and which arm [n]."""
    arm = torch.arange(n) % 3
    radius = torch.rand(n)
    angle = 4 * radius + arm * (2 * torch.pi / 3) + 0.15 * torch.randn(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm


def train(with_cram: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if with_cram:
        optimizer = CrAM(optimizer, compression=[TopK(sparsity=0.5), TopK(sparsity=0.7), TopK(sparsity=0.9)], rho=0.1)
    for _ in range(1000):
        points, arm = spirals(256)

        def loss(points=points, arm=arm) -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(points), arm)
            value.backward()
            return value

        optimizer.step(loss)
    return model


def accuracy(model: nn.Module) -> float:
    points, arm = spirals(3000)
    with torch.no_grad():
        return float((model(points).argmax(1) == arm).float().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)  # a network this small is all overhead on more
    for name in ("SGD", "CrAM+"):
        model = train(with_cram=name == "CrAM+")
        dense = accuracy(model)
        prune(model, TopK(sparsity=0.9))
        print(f"{name:6} dense {dense:.1%}, without 90 % of its weights {accuracy(model):.1%}")
