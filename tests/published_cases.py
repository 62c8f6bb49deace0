"""Ours and the published optimizers side by side: made alike, and stepped with gradients that are handed in.

lr, momentum and weight decay are powers of two here: then every product of torch.optim.SGD is exact, an FMA rounds like a product and a
sum, and a comparison is one of bits over many steps.
"""

import importlib

import torch
from optim_cases import clones, random_tensors, set_gradients
from torch import Tensor, nn

EXACT = {"lr": 2**-4, "momentum": 2**-1, "weight_decay": 2**-9}
SHAPES = [(8, 16), (16,), (8, 8, 3, 3), (8,)]


def optimizer(where: str, name: str, params, base=torch.optim.SGD, **options) -> torch.optim.Optimizer:
    """`from cram_kernels import TopkCrAM`, or `from published import TopkCrAM`: the one line that changes."""
    return getattr(importlib.import_module(where), name)(params, base, **{**EXACT, **options} if base is torch.optim.SGD else options)


def step(sam, params: list[Tensor], first: list[Tensor | None], second: list[Tensor | None]) -> list[Tensor]:
    """One step with these gradients; returns the weights of the second pass."""
    between: list[Tensor] = []
    set_gradients(params, first)

    def closure():
        between.extend(clones(params))
        set_gradients(params, second)

    sam.step(closure)
    return between


def pair(name: str, shapes=SHAPES, options=None, theirs=None) -> tuple:
    """Ours and the published one over equal parameters: (ours, params, published, params)."""
    ours, other = ([nn.Parameter(t) for t in random_tensors(shapes, seed=3)] for _ in range(2))
    options = options or {}
    return optimizer("cram_kernels", name, ours, **options), ours, optimizer("published", name, other, **options, **(theirs or {})), other


def gradients(shapes=SHAPES, seed: int = 5) -> list[Tensor]:
    return random_tensors(shapes, seed)
