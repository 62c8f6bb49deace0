"""The norm of all gradients, in one fixed order of additions (docs/contract.md: Norm)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, send
from .number import rounded, scaled, widen
from .table import PARAM, PLACE, Table, chunk_of, column

CHUNK = tl.constexpr(1024)  # elements
FOLD = 1024  # sums that one program of `fold_kernel` makes one of
COLUMNS = 4  # sums that it makes


@triton.jit
def fold(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS * COLUMNS], rows outside -> [COLUMNS]: add the second half of the rows to the first until one is left. ROWS: a power of two."""
    if ROWS == 1:
        return x
    else:
        return fold(tl.sum(tl.reshape(x, [2, ROWS * COLUMNS // 2]), 0), ROWS // 2, COLUMNS)


@triton.jit
def chunk_sums_kernel(
    rows, chunks, inv_scale, sums,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums float64 [chunks of 1024 of all tensors]."""
    _tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    c = tl.arange(0, BLOCK // CHUNK)
    i = tl.arange(0, CHUNK)[:, None] + c[None, :] * CHUNK
    g = scaled(widen(tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=i < size, other=0)), inv_scale).to(tl.float64)
    squares = tl.where(i < size, g * g, 0.0)  # an infinite inv_scale makes NaN of the zeros beyond the end
    folded = fold(tl.reshape(squares, [BLOCK]), CHUNK, BLOCK // CHUNK)
    tl.store(sums + tl.load(row + PLACE) + start // CHUNK + c, folded, mask=c * CHUNK < size)


@triton.jit
def fold_kernel(sums, n, out, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums [n], padded with zeros to [ROWS, width] -> out [width]; the last, of width 1, is the norm float32."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)[:, None].to(tl.int64) * width + c[None, :]
    x = tl.load(sums + i, mask=(i < n) & (c < width)[None, :], other=0)
    folded = fold(tl.reshape(x, [ROWS * COLUMNS]), ROWS, COLUMNS)
    if out.dtype.element_ty == tl.float32:
        folded = rounded(tl.sqrt(folded).to(tl.float32), tl.float32)
    tl.store(out + c, folded, mask=c < width)


def grad_norm(grads: Sequence[Tensor], *, inv_scale: Tensor | None = None) -> Tensor:
    device = grads[0].device
    counts = [-(-g.numel() // CHUNK.value) for g in grads]
    before = [0]
    for count in counts:
        before.append(before[-1] + count)
    table = Table(grads, {PARAM.value: grads}, {PLACE.value: before[:-1]})
    n = before[-1]
    sums = torch.empty(n, dtype=torch.float64, device=device)
    launches = table.launches(chunk_sums_kernel, inv_scale, sums)
    norm = torch.empty((), dtype=torch.float32, device=device)
    size = 1 << max(0, n - 1).bit_length()
    while True:
        fold_rows = min(FOLD, size)
        size //= fold_rows
        out = norm if size == 1 else torch.empty(size, dtype=torch.float64, device=device)
        options = {"ROWS": fold_rows, "COLUMNS": COLUMNS, "num_warps": 4, "enable_fp_fusion": False}
        launches.append(launch(fold_kernel, -(-size // COLUMNS), sums, n, out, size, **options))
        if size == 1:
            break
        sums, n = out, size
    send(launches)
    return norm
