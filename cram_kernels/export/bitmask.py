"""The format "bitmask": smaller files for any zeros, in no engine's layout; `read` gives the dense tensors back, bit for bit.

A tensor NAME of 2 or more dims is stored in two parts, both in row-major order. NAME.values holds every number that is not +0; -0 is kept.
NAME.bitmask, uint8 [ceil(numel / 8)], says where they are: bit i % 8 of byte i // 8 is 1 if element i is among the values. Where that is
not smaller, NAME is stored dense.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from ..reference.key import pack_bits, unpack_bits
from .container import dtype_named, take

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAME = "bitmask"


def encode(name: str, t: Tensor) -> dict[str, Tensor] | None:
    """t contiguous -> the tensors to store; None where dense is as small."""
    if t.dim() < 2 or t.is_complex():
        return None
    bits = t.flatten().view(INTEGERS[t.element_size()])
    kept = bits != 0
    values = bits[kept].view(t.dtype)
    mask = pack_bits(kept)
    return {f"{name}.values": values, f"{name}.bitmask": mask} if values.nbytes + mask.nbytes < t.nbytes else None


def decode(name: str, tensors: dict[str, Tensor], dtype: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """The dense tensor.

    Raises:
        ValueError: values or bits are missing or do not fit each other.
    """
    if dtype_named(dtype).itemsize not in INTEGERS:
        raise ValueError(f"{path}: {name!r} must be of a dtype of at most 8 bytes, got {dtype}: the file is damaged")
    numel = math.prod(shape)
    kept = unpack_bits(take(f"{name}.bitmask", tensors, "uint8", (-(-numel // 8),), path), numel)
    values = take(f"{name}.values", tensors, dtype, (int(kept.sum()),), path)
    t = torch.zeros(shape, dtype=dtype_named(dtype))
    integer = INTEGERS[t.element_size()]
    t.view(-1).view(integer)[kept] = values.view(integer)
    return t
