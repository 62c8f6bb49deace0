"""The format "cutlass-sm80": matrices packed for SM 8.x, as torch's SparseSemiStructuredTensorCUTLASS holds them.

A tensor NAME that is eligible is stored as NAME.packed and NAME.meta (docs/contract.md: Packed 2:4), the others dense.
"""

from pathlib import Path

import torch
from torch import Tensor

from .check import nonzero
from .consumers import CUTLASS
from .container import dtype_named, take
from .report import Row

NAME = "cutlass-sm80"
META = {1: (torch.int32, 32), 2: (torch.int16, 16), 4: (torch.int16, 8)}  # size of a weight -> a metadata word, weights that it is for
MULTIPLES = {torch.int8: (16, 64), torch.float16: (32, 32), torch.bfloat16: (32, 32), torch.float32: (32, 16)}  # rows, columns
SLOTS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # a number as an integer, by its size: bits are moved, not numbers

# Whether slots 0 to 3 of a group are not zero, as the digits of a binary number -> the places of the two that are kept. As in torch
# (sparse_semi_structured_from_dense_cutlass); of more than two, some are lost.
PLACES = ((2, 3), (2, 3), (2, 3), (2, 3), (1, 2), (1, 3), (1, 2), (1, 3), (0, 2), (0, 3), (0, 2), (0, 3), (0, 1), (0, 1), (0, 1), (0, 1))


def _word_places(meta: Tensor) -> Tensor:
    """int64, the shape of meta: where CUTLASS wants each word (reorder_meta in its host_reorder.h, then ColumnMajorInterleaved<2>)."""
    rows, cols = meta.shape
    group = 16 if meta.dtype == torch.int32 else 32
    row = torch.arange(rows, device=meta.device)[:, None].expand(rows, cols)
    col = torch.arange(cols, device=meta.device)[None, :].expand(rows, cols)
    row = row // group * group + row % 8 * (group // 8) + row % group // 8
    corner = (row % 2 == 0).long() * (col % 2 == 1) - (row % 2 == 1).long() * (col % 2 == 0)  # corners of a 2x2 block change places
    row, col = row + corner, col - corner
    return col // 2 * rows * 2 + row * 2 + col % 2


def _kept(w: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the first and the second number of each group, int64 [rows, groups]."""
    if w.dtype == torch.float32:  # 1:2: a pair is a group of four halves
        second = (~nonzero(w).unflatten(1, (-1, 2))[..., 0]).long()
        return 2 * second, 2 * second + 1
    digits = torch.tensor([8, 4, 2, 1], device=w.device)
    index = (nonzero(w).unflatten(1, (-1, 4)) * digits).sum(-1)
    first, second = torch.tensor(PLACES, device=w.device)[index].unbind(-1)
    return first, second


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 weights (float32: 1:2) as the sparse tensor cores of SM 8.x read them, bit-equal to torch's packer. Checks no pattern.

    Args:
        w: [rows, cols] on any device, multiples of MULTIPLES.

    Returns:
        packed [rows, cols / 2], the numbers that stay; meta, where they come from, 4 bits a group: int16 [rows, cols / 16] of 16-bit
        weights, int32 [rows, cols / 32] of int8, int16 [rows, cols / 8] of float32. The layout: docs/contract.md, Packed 2:4.

    Raises:
        ValueError: another dtype or shape.
    """
    rows, cols = MULTIPLES.get(w.dtype, (0, 0))
    if not rows or w.dim() != 2 or w.shape[0] % rows or w.shape[1] % cols:
        wanted = f"a matrix of a multiple of {rows} rows and {cols} columns" if rows else "int8, float16, bfloat16 or float32"
        raise ValueError(f"pack: w must be {wanted}, got {w.dtype} {list(w.shape)}")
    meta_dtype, width = META[w.element_size()]
    slots, (first, second) = w.view(SLOTS[w.element_size()]), _kept(w)
    if w.dtype == torch.float32:
        packed = slots.unflatten(1, (-1, 2)).gather(-1, first[..., None] // 2)
    else:
        packed = slots.unflatten(1, (-1, 4)).gather(-1, torch.stack((first, second), -1))
    meta = torch.empty(w.shape[0], w.shape[1] // width, dtype=meta_dtype, device=w.device)
    places = (first | second << 2).unflatten(1, (-1, 2 * meta.element_size()))  # 4 bits a group
    words = (places << 4 * torch.arange(places.shape[-1], device=w.device)).sum(-1)
    meta.view(-1)[_word_places(meta).flatten()] = words.flatten().to(meta_dtype)
    return packed.flatten(1).view(w.dtype), meta


def unpack(packed: Tensor, meta: Tensor) -> Tensor:
    """The inverse of `pack`."""
    words = meta.flatten()[_word_places(meta)].long()  # [rows, words]
    places = words[..., None] >> 4 * torch.arange(2 * meta.element_size(), device=meta.device) & 15
    first, second = (places & 3).flatten(1)[..., None], (places >> 2).flatten(1)[..., None]
    slots = packed.view(SLOTS[packed.element_size()])
    if packed.dtype == torch.float32:
        groups = torch.where(torch.arange(2, device=packed.device) == first // 2, slots[..., None], 0)
    else:
        pairs, own = slots.unflatten(1, (-1, 2)), torch.arange(4, device=packed.device)
        groups = torch.where(own == first, pairs[..., :1], 0) | torch.where(own == second, pairs[..., 1:], 0)
    return groups.flatten(1).view(packed.dtype)


def why_not(row: Row) -> str | None:
    """None where the tensor can be packed."""
    verdict = row.verdicts.get(CUTLASS.name)
    return (row.why_dense or "not 2:4") if verdict is None else None if verdict.runs == "yes" else verdict.why


def encode(name: str, t: Tensor, row: Row) -> dict[str, Tensor] | None:
    """t contiguous -> the tensors to store; None where it is stored dense."""
    if why_not(row) is not None:
        return None
    packed, meta = pack(t)
    return {f"{name}.packed": packed, f"{name}.meta": meta}


def parts(name: str, tensors: dict[str, Tensor], dtype: str, shape: tuple[int, ...], path: Path) -> tuple[Tensor, Tensor]:
    """The packed numbers and the metadata of a tensor of the file.

    Raises:
        ValueError: they are missing, have other shapes, or are not what packing writes.
    """
    rows, cols = CUTLASS.multiples.get(dtype_named(dtype), (0, 0))
    if not rows or shape[0] % rows or shape[1] % cols:
        raise ValueError(f"{path}: {name!r} must be of a dtype and shape that are packed, got {dtype} {list(shape)}: the file is damaged")
    packed = take(f"{name}.packed", tensors, dtype, (shape[0], shape[1] // 2), path)
    meta_dtype, width = META[packed.element_size()]
    meta = take(f"{name}.meta", tensors, str(meta_dtype).removeprefix("torch."), (shape[0], shape[1] // width), path)
    if not torch.equal(pack(unpack(packed, meta))[1], meta):
        raise ValueError(f"{path}: {name}.meta must be what packing its weight gives, got other metadata: the file is damaged")
    return packed, meta


def decode(name: str, tensors: dict[str, Tensor], dtype: str, shape: tuple[int, ...], path: Path) -> Tensor:
    return unpack(*parts(name, tensors, dtype, shape, path))
