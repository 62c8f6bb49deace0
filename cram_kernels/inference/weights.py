"""A weight with zeros as compressed rows, and as the bitmask and values that a state dict holds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.key import pack_bits, unpack_bits

MAX_COLUMNS = 65535  # a column is 16 bits


@dataclass(frozen=True)
class Rows:
    """Compressed rows of a float32 weight: `ops.py` says what they hold."""

    values: Tensor
    columns: Tensor
    counts: Tensor


def compress(weight: Tensor) -> Rows:
    """The elements with any bit set, so that -0 and NaN come back.

    Raises:
        ValueError: weight is not float32 of 2 or more dims, or a row has no element or more than 65535.
    """
    _check_shape(tuple(weight.shape), weight.dtype)
    rows = weight.detach().reshape(weight.shape[0], -1)
    kept = rows.contiguous().view(torch.int32) != 0
    columns = kept.nonzero()[:, 1]
    return Rows(rows[kept], columns.to(torch.int32).to(torch.int16), kept.sum(1).to(torch.int32).to(torch.int16))


def _check_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    columns = torch.Size(shape[1:]).numel()
    if dtype != torch.float32 or len(shape) < 2 or not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"compress: weight must be float32 with rows of 1 to {MAX_COLUMNS} elements, got {dtype} of shape {list(shape)}")


def positions(rows: Rows, shape: tuple[int, ...]) -> Tensor:
    """Of each value, its place in the flattened weight."""
    counts = rows.counts.to(torch.int64) & 0xFFFF
    columns = rows.columns.to(torch.int64) & 0xFFFF
    row = torch.repeat_interleave(torch.arange(shape[0], device=counts.device), counts)
    return row * torch.Size(shape[1:]).numel() + columns


def decompress(rows: Rows, shape: tuple[int, ...]) -> Tensor:
    """The dense weight, to the bit."""
    weight = rows.values.new_zeros(shape)
    weight.view(-1)[positions(rows, shape)] = rows.values
    return weight


def to_bitmask(rows: Rows, shape: tuple[int, ...]) -> Tensor:
    """The mask of the file format "bitmask": bit i % 8 of byte i // 8 is 1 where element i of the flattened weight is stored."""
    kept = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
    kept[positions(rows, shape)] = True
    return pack_bits(kept)


def from_bitmask(values: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Rows:
    """The rows of a weight that is stored as values and mask.

    Raises:
        ValueError: they don't fit each other or the shape.
    """
    numel = torch.Size(shape).numel()
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (-(-numel // 8),):
        raise ValueError(f"bitmask must be uint8 [{-(-numel // 8)}] for a weight {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    kept = unpack_bits(mask, numel).reshape(shape[0], -1)
    if values.dtype != torch.float32 or tuple(values.shape) != (int(kept.sum()),):
        raise ValueError(f"values must be float32 [{int(kept.sum())}], as the bitmask says, got {values.dtype} {list(values.shape)}")
    if numel % 8 and int(mask[-1]) >> numel % 8:
        raise ValueError(f"bitmask must have zeros behind its {numel} bits, got others")
    columns = kept.nonzero()[:, 1]
    return Rows(values.detach().clone(), columns.to(torch.int32).to(torch.int16), kept.sum(1).to(torch.int32).to(torch.int16))
