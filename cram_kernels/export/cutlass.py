"""The format "cutlass-sm80": matrices packed for SM 8.x, as torch's SparseSemiStructuredTensorCUTLASS holds them.

A tensor NAME that is eligible is stored as NAME.packed and NAME.meta (docs/contract.md: Packed 2:4), the others dense.
"""

from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from .consumers import CUTLASS
from .container import dtype_named, take
from .report import Row

NAME = "cutlass-sm80"
META = {1: (torch.int32, 32), 2: (torch.int16, 16), 4: (torch.int16, 8)}  # size of a weight -> a metadata word, weights that it is for


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [rows, cols] int8, float16, bfloat16 or float32 (1:2) -> packed [rows, cols / 2], meta; checks no pattern."""
    meta_dtype, width = META[w.element_size()]
    packed = w.new_empty(w.shape[0], w.shape[1] // 2)
    meta = torch.empty(w.shape[0], w.shape[1] // width, dtype=meta_dtype, device=w.device)
    ops.pack_24_([w], [packed], [meta])
    return packed, meta


def unpack(packed: Tensor, meta: Tensor) -> Tensor:
    """The inverse of `pack`."""
    w = packed.new_empty(packed.shape[0], 2 * packed.shape[1])
    ops.unpack_24_([w], [packed], [meta])
    return w


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
