"""The norm of all gradients, in one fixed order of additions (contract: Norm)."""

import math

import torch
from torch import Tensor

from .key import canonical, flat
from .perturb import unscale

CHUNK = 1024  # elements


def fold(x: Tensor) -> Tensor:
    """[..., 2^j] -> [...]: add the second half to the first until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def padded(x: Tensor, size: int) -> Tensor:
    """x [n] with zeros behind it: [size]."""
    return torch.cat([x, x.new_zeros(size - x.numel())])


@torch.no_grad()
def grad_norm(grads: list[Tensor], *, inv_scale: Tensor | None = None) -> Tensor:
    """float32 []."""
    sums = [torch.zeros(0, dtype=torch.float64, device=grads[0].device if grads else None)]
    for g in grads:
        squares = unscale(flat(g), inv_scale).double().square()
        chunks = -(-g.numel() // CHUNK)
        sums.append(fold(padded(squares, chunks * CHUNK).view(chunks, CHUNK)))
    total = torch.cat(sums)
    size = 1 << max(0, total.numel() - 1).bit_length()
    root = math.sqrt(float(fold(padded(total, size))))  # correctly rounded, which torch's own roots need not be
    return canonical(torch.tensor(root, dtype=torch.float32, device=total.device))
