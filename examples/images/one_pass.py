"""A step of one pass instead of CrAM's two: at the dense weights or at the pruned ones, drawn at random."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cram_kernels import CrAM


def one_pass_step(optimizer: CrAM, loss: Callable[[Any], Tensor], batch: Any, dense: bool) -> Tensor:
    """Step with twice the gradient of one pass: over fair coins its mean is the gradient of CrAM+ with rho 0. Returns the loss.

    Args:
        optimizer: with plus=False: a pruned step has no first gradient to add.
        dense: take a plain step; else prune to a pattern that the optimizer draws, and step from the dense weights with mask * gradient.
    """
    optimizer.zero_grad()
    if not dense:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)  # nothing moves uphill: perturb() only prunes
        optimizer.perturb()
    try:
        value = loss(batch)
        (2 * value).backward()
        if dense:
            optimizer.plain_step()
        else:
            optimizer.step()
    except BaseException:
        optimizer.restore()
        raise
    finally:
        optimizer.zero_grad()
    return value.detach()
