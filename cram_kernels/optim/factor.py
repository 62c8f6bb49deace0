"""What the ops multiply the gradients of a pass by."""

from typing import NamedTuple

import torch
from torch import Tensor


class Factor(NamedTuple):
    """For the gradients of one pass; None: 1, and no overflow is looked for. They stay on the device of the scaler."""

    inv_scale: Tensor | None = None  # float32 []
    found_inf: Tensor | None = None  # float32 []: 0, or else a gradient (before clipping) is Inf or NaN


def on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """The scalar on this device."""
    return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)
