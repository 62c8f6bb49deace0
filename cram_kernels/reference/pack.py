"""2:4 weights as the sparse tensor cores of SM 8.x read them, and how far weights are from N:M (contract: Packed 2:4)."""

import torch
from torch import Tensor

from .key import flat

SLOTS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # a number as an integer, by its size

# Which of the four slots of a group are not zero (slot 0 first) -> the places of the two that are kept; of more than two, some are lost.
PLACES = {
    (0, 0, 0, 0): (2, 3),
    (0, 0, 0, 1): (2, 3),
    (0, 0, 1, 0): (2, 3),
    (0, 0, 1, 1): (2, 3),
    (0, 1, 0, 0): (1, 2),
    (0, 1, 0, 1): (1, 3),
    (0, 1, 1, 0): (1, 2),
    (0, 1, 1, 1): (1, 3),
    (1, 0, 0, 0): (0, 2),
    (1, 0, 0, 1): (0, 3),
    (1, 0, 1, 0): (0, 2),
    (1, 0, 1, 1): (0, 3),
    (1, 1, 0, 0): (0, 1),
    (1, 1, 0, 1): (0, 1),
    (1, 1, 1, 0): (0, 1),
    (1, 1, 1, 1): (0, 1),
}


def nonzero(w: Tensor) -> Tensor:
    """bool, the shape of w: a NaN is not zero, -0 is."""
    return w.to(torch.float32) != 0


def meta_places(meta: Tensor) -> Tensor:
    """int64 [rows, cols], as meta: where CUTLASS wants each word (reorder_meta in its host_reorder.h, then ColumnMajorInterleaved<2>)."""
    rows, cols = meta.shape
    group = 16 if meta.dtype == torch.int32 else 32
    row = torch.arange(rows)[:, None].expand(rows, cols)
    col = torch.arange(cols)[None, :].expand(rows, cols)
    row = row // group * group + row % 8 * (group // 8) + row % group // 8
    corner = (row % 2 == 0).long() * (col % 2 == 1) - (row % 2 == 1).long() * (col % 2 == 0)  # corners of a 2x2 block that change places
    row, col = row + corner, col - corner
    return col // 2 * rows * 2 + row * 2 + col % 2


def choose(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [rows, cols] -> the places of the first and the second number of each group, int64 [rows, groups]."""
    rows = w.shape[0]
    if w.dtype == torch.float32:  # 1:2: a pair is a group of four halves
        second = (~nonzero(w).view(rows, -1, 2)[..., 0]).long()
        return 2 * second, 2 * second + 1
    table = torch.tensor([PLACES[i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(16)])
    index = (nonzero(w).view(rows, -1, 4) * torch.tensor([8, 4, 2, 1])).sum(-1)
    first, second = table[index].unbind(-1)
    return first, second


@torch.no_grad()
def pack_24_(weights, packed, metas):
    for w, out, meta in zip(weights, packed, metas, strict=True):
        if w.numel() == 0:
            continue
        slots = w.view(SLOTS[w.element_size()])
        first, second = choose(w)
        if w.dtype == torch.float32:
            kept = slots.view(len(w), -1, 2).gather(-1, first[..., None] // 2)
        else:
            kept = slots.view(len(w), -1, 4).gather(-1, torch.stack((first, second), -1))
        out.copy_(kept.reshape(out.shape).view(w.dtype))
        places = (first | second << 2).view(*meta.shape, -1)  # 4 bits a group
        shifts = 4 * torch.arange(places.shape[-1])
        words = (places << shifts).sum(-1)
        meta.view(-1)[meta_places(meta).flatten()] = words.flatten().to(meta.dtype)


@torch.no_grad()
def unpack_24_(weights, packed, metas):
    for w, numbers, meta in zip(weights, packed, metas, strict=True):
        if w.numel() == 0:
            continue
        words = meta.flatten()[meta_places(meta)].long()  # [rows, words]
        places = words[..., None] >> 4 * torch.arange(2 * meta.element_size()) & 15
        first, second = (places & 3).reshape(len(w), -1, 1), (places >> 2).reshape(len(w), -1, 1)
        slots = numbers.view(SLOTS[w.element_size()])
        if w.dtype == torch.float32:
            groups = torch.where(torch.arange(2) == first // 2, slots[..., None], 0)
        else:
            pairs = slots.view(len(w), -1, 2)
            own = torch.arange(4)
            groups = torch.where(own == first, pairs[..., :1], 0) | torch.where(own == second, pairs[..., 1:], 0)
        w.copy_(groups.reshape(w.shape).view(w.dtype))


@torch.no_grad()
def nm_violations(weights, n, m):
    return torch.tensor([_violations(w, n, m) for w in weights], dtype=torch.int64).view(-1, 3)


def _violations(w: Tensor, n: int, m: int) -> tuple[int, int, int]:
    """Groups with more than n numbers, where the first begins in memory order (-1: none), numbers that are not zero."""
    if w.numel() == 0:
        return 0, -1, 0
    counts = nonzero(w).unflatten(1, (-1, m)).sum(2)  # [K, C / m, ...]
    index = torch.empty_like(w, dtype=torch.int64)  # of each element in memory
    flat(index).copy_(torch.arange(w.numel()))
    wrong = index.unflatten(1, (-1, m)).select(2, 0)[counts > n]
    return wrong.numel(), int(wrong.min()) if wrong.numel() else -1, int(counts.sum())
