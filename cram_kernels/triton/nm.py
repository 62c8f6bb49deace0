"""N of M along the input channels (docs/contract.md: N:M)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .number import NAN_KEY, magnitude_key, widen
from .perturb import perturb_masked_kernel, perturb_table, raise_flag, rho_of, save, uphill
from .table import MASK, NUMBER, PARAM, PLACE, Kind, Table, chunk_of, column, elements_of, only, store_bits

SCRATCH = NUMBER  # the tensor's first byte in the scratch, -1: none


@triton.jit
def kept(key, N: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr):
    """key int32 [groups, LANES] -> bool: the N last of a group in the order of key and place.

    Small groups rank each weight by counting those before it, large ones search for the first that stays, bit by bit.
    """
    j = tl.arange(0, LANES)[None, :]
    if LANES <= 32:
        rank = tl.zeros(key.shape, tl.int32)
        for other in tl.static_range(M):
            own = tl.sum(tl.where(j == other, key, 0), 1)[:, None]
            rank += ((own < key) | ((own == key) & (other < j))).to(tl.int32)
        return (rank >= M - N) & (key < NAN_KEY)
    else:
        order = tl.where(j < M, (key.to(tl.int64) << 10) | j, -1)
        first = tl.sum(order * 0, 1)  # int64 [groups]
        for bit in range(41):
            higher = first | (tl.full([], 1 << 40, tl.int64) >> bit)
            enough = tl.sum((order >= higher[:, None]).to(tl.int32), 1) >= N
            first = tl.where(enough, higher, first)
        return (order >= first[:, None]) & (key < NAN_KEY)


@triton.jit
def groups_of(row, first, size, M: tl.constexpr, ADJACENT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """A chunk of groups: an element to count from, places behind it, which of them there are; in [GROUPS, LANES] a row is a group.

    ADJACENT: the weights of a group are neighbours in memory and M, the number of lanes, is a power of two: rows are mask bytes meanwhile.
    """
    if ADJACENT:
        i, valid = elements_of(size * M, GROUPS * M)
        return first * M, i, valid
    else:
        g, j = tl.arange(0, GROUPS)[:, None], tl.arange(0, LANES)[None, :]
        inner = tl.load(row + PLACE)
        g, near = g + (first % inner).to(tl.int32), inner.to(tl.int32)  # divisions of 64 bits are slow
        i = (g // near).to(tl.int64) * (M * inner) + g % near + j * inner
        return first // inner * (M * inner), i, (tl.arange(0, GROUPS)[:, None] < size) & (j < M)


@triton.jit
def nm_kernel(
    rows, chunks, rho, inv_scale, found_inf, scratch,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr, N: tl.constexpr, M: tl.constexpr, ADJACENT: tl.constexpr, LANES: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tensor, row, first, size = chunk_of(rows, chunks, GROUPS, ALIGNED)
    start, i, valid = groups_of(row, first, size, M, ADJACENT, GROUPS, LANES)
    if PERTURB:
        w = save(row, start, i, valid, T, MASTERS, ALIGNED)
        u = uphill(w, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, found_inf, T, ALIGNED)
    else:
        u = tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=valid, other=0)
    key = magnitude_key(widen(u))
    keep = valid & tl.reshape(kept(tl.reshape(key, [GROUPS, LANES]), N, M, LANES), valid.shape)
    tl.store(column(row, PARAM, start, T, ALIGNED) + i, tl.where(keep | (key == NAN_KEY), u, 0).to(T), mask=valid)
    if ADJACENT:
        store_bits(row, start, size * M, keep, GROUPS * M)
    else:
        own = tl.load(row + SCRATCH)
        tl.store(scratch + own + start + i, keep.to(tl.uint8), mask=only(valid, own >= 0))


@triton.jit
def mask_kernel(
    rows, chunks, scratch,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A byte a weight in the scratch -> a bit a weight in the mask."""
    _tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    keep = tl.load(scratch + tl.load(row + SCRATCH) + start + i, mask=valid, other=0)
    byte = tl.arange(0, BLOCK // 8)
    bytes = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, :], 1)
    tl.store(column(row, MASK, start // 8, tl.uint8, False) + byte, bytes.to(tl.uint8), mask=byte * 8 < size)


def inner_strides(tensors: Sequence[Tensor], prune: Sequence[int]) -> list[int]:
    """Elements between neighbours along axis 1; 0 where nothing is pruned."""
    return [t.stride(1) if own and t.numel() else 0 for t, own in zip(tensors, prune, strict=True)]


def scratch_places(tensors: Sequence[Tensor], masks: Sequence[Tensor], inner: Sequence[int], m: int) -> tuple[list[int], int]:
    """Where the bytes of each tensor that needs some begin, and their number: one a weight, where mask bytes straddle groups."""
    places, size = [-1] * len(tensors), 0
    for i, t in enumerate(tensors):
        if len(masks) and masks[i].numel() and inner[i] and not adjacent(inner[i], m):
            places[i] = size
            size += -(-t.numel() // 16) * 16
    return places, size


def adjacent(inner: int, m: int) -> bool:
    return inner == 1 and m & (m - 1) == 0


def launches(table: Table, inner: list[int], m: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Chunks of groups, and the options of their launch."""
    lanes = triton.next_power_of_2(m)
    groups = tuple(numel // m for numel in table.sizes)

    def per_program(kind: Kind) -> int:
        return max(1, kind.tuning.block // lanes)

    for near in (True, False):
        own = {i for i, stride in enumerate(inner) if stride > 0 and adjacent(stride, m) == near}
        for kind, chunks in table.chunks(own.__contains__, groups, per_program):
            options = kind.constants | kind.tuning.options | {"GROUPS": per_program(kind), "LANES": lanes, "ADJACENT": near}
            del options["BLOCK"]
            yield chunks, options


def launch(table: Table, inner: list[int], places: list[int], size: int, n: int, m: int, perturbation: dict[str, Any]) -> None:
    scratch = torch.empty(size, dtype=torch.uint8, device=table.device)
    for chunks, options in launches(table, inner, m):
        nm_kernel[(len(chunks),)](table.rows, chunks, scratch=scratch, N=n, M=m, **perturbation, **options)
    table.launch(mask_kernel, scratch, among=lambda i: places[i] >= 0)


def prune_nm_(weights: Sequence[Tensor], masks: Sequence[Tensor], prune: Sequence[int], n: int, m: int) -> None:
    inner = inner_strides(weights, prune)
    places, size = scratch_places(weights, masks, inner, m)
    table = Table(weights, {PARAM.value: weights, MASK.value: masks}, {PLACE.value: inner, SCRATCH.value: places})
    launch(table, inner, places, size, n, m, {"rho": None, "inv_scale": None, "found_inf": None, "PERTURB": False, "RHO_EACH": False})


def perturb_nm_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    masks: Sequence[Tensor],
    perturbed: Tensor,
    rho: Tensor,
    prune: Sequence[int],
    n: int,
    m: int,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
) -> None:
    inner = inner_strides(params, prune)
    places, size = scratch_places(params, masks, inner, m)
    pruned_masks = [mask if own else mask[:0] for mask, own in zip(masks, inner, strict=False)]
    table = perturb_table(params, grads, saved, pruned_masks, masters, {PLACE.value: inner, SCRATCH.value: places})
    raise_flag("perturb_nm_", perturbed)
    perturbation = {"rho": rho, "inv_scale": inv_scale, "found_inf": found_inf, "RHO_EACH": rho.dim() > 0}
    launch(table, inner, places, size, n, m, {**perturbation, "PERTURB": True})
    for kind, chunks in table.chunks(lambda i: inner[i] == 0):
        perturb_masked_kernel[(len(chunks),)](table.rows, chunks, **perturbation, **kind.constants, **kind.tuning.options)
