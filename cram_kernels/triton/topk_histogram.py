"""How many keys have which digit (docs/contract.md: Top-k): what several ranks add up to find a threshold over all of them."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Action, send
from .number import magnitude_key, widen
from .perturb import rho_of, uphill, weight_at
from .table import GRAD, MASTER, PARAM, PLACE, Table, chunk_of, elements_of

BLOCK_BINS = tl.constexpr(2048)  # up to so many are counted within a program first


@triton.jit
def count_bins(histogram, bin, inside, BINS: tl.constexpr):
    """Add to histogram [BINS], of int32 or int64, how many of bin [n] that are `inside` have each value."""
    if BINS <= BLOCK_BINS:
        counted = tl.histogram(tl.where(inside, bin, 0), BINS, mask=inside)
        counts = counted.to(histogram.dtype.element_ty)
        tl.atomic_add(histogram + tl.arange(0, BINS), counts, mask=counted > 0, sem="relaxed")
    else:
        one = tl.full(bin.shape, 1, histogram.dtype.element_ty)
        tl.atomic_add(histogram + bin, one, mask=inside, sem="relaxed")


@triton.jit
def histogram_kernel(
    rows, chunks, rho, inv_scale, prefix, shift, histogram,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    s = tl.load(row + PLACE)
    u = weight_at(row, start, i, valid, PARAM, T, PERTURB and MASTERS, ALIGNED)
    if PERTURB:
        u = widen(uphill(u, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, None, T, ALIGNED))
    key = tl.reshape(magnitude_key(u), [BLOCK])
    inside = tl.reshape(valid, [BLOCK]) & ((key >> (shift + BITS)).to(tl.int64) == tl.load(prefix + s))
    count_bins(histogram + (s << BITS), (key >> shift) & ((1 << BITS) - 1), inside, 1 << BITS)


def topk_histogram(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Tensor,
    sets: Sequence[int],
    prefix: Tensor,
    shift: int,
    bits: int,
    *,
    inv_scale: Tensor | None = None,
    masters: Sequence[Tensor] = (),
) -> Tensor:
    histogram = torch.zeros(prefix.numel(), 1 << bits, dtype=torch.int64, device=prefix.device)
    table = Table(params, {PARAM.value: params, GRAD.value: grads, MASTER.value: masters}, {PLACE.value: sets})
    constants: dict[str, Any] = {"RHO_EACH": rho.dim() > 0, "BITS": bits}
    launches: list[Action] = []
    for moves in (True, False):  # where there is no gradient, the weight counts as it is
        own = [i for i, s in enumerate(sets) if s >= 0 and (table[i, GRAD] != 0) == moves]
        arguments = rho, inv_scale, prefix, shift, histogram
        launches += table.launches(histogram_kernel, *arguments, among=set(own).__contains__, PERTURB=moves, **constants)
    send(launches)
    return histogram
