"""Packed 2:4, and how far weights are from N:M (docs/contract.md: Packed 2:4). Numbers are moved as integers: no bit of them changes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Action, launch, send
from .nm import Layout, groups_of
from .table import MASK, NUMBER, PARAM, PLACE, STATE, Table, chunk_of, column
from .tuning import tuning

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # the bits of a number, by its size
MAGNITUDE = NUMBER  # those that make it not zero
PACKED, META, COLS, ROWS_IN_ALL = STATE, MASK, PLACE, NUMBER


def as_integers(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.view(INTEGERS[t.element_size()]) for t in tensors]


@triton.jit
def violations_kernel(
    rows, chunks, found, n, FORM: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Add a chunk to found int64 [tensors, 3]; -1, no place, is the largest of unsigned numbers."""
    tensor, row, first, size = chunk_of(rows, chunks, GROUPS, ALIGNED, WHOLE)
    start, i, valid = groups_of(row, first, size, M, FORM, GROUPS, LANES)
    x = tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=valid, other=0)
    number = ((x & tl.load(row + MAGNITUDE).to(T)) != 0).to(tl.int32)
    numbers = tl.sum(tl.reshape(number, [GROUPS, LANES]), 1)
    wrong = numbers > n
    places = start + tl.min(tl.reshape(i, [GROUPS, LANES]), 1)
    place = tl.min(tl.where(wrong, places, -1).to(tl.uint64), 0)
    found += tensor * 3
    tl.atomic_add(found, tl.sum(wrong.to(tl.int32), 0).to(tl.int64), sem="relaxed")
    tl.atomic_min((found + 1).to(tl.pointer_type(tl.uint64)), place, sem="relaxed")
    tl.atomic_add(found + 2, tl.sum(numbers, 0).to(tl.int64), sem="relaxed")


def nm_violations(weights: Sequence[Tensor], n: int, m: int) -> Tensor:
    signless = [-1 if w.dtype == torch.int8 else 2 ** (8 * w.element_size() - 1) - 1 for w in weights]
    slots = as_integers(weights)
    layout = Layout(slots, [1] * len(slots), m, windows=False)
    table = Table(slots, {PARAM.value: slots}, {PLACE.value: layout.inner, MAGNITUDE.value: signless})
    found = torch.zeros(len(weights), 3, dtype=torch.int64, device=table.device)
    found[:, 1] = -1
    send(launch(violations_kernel, len(chunks), table.rows, chunks, found, n, M=m, **options) for chunks, options in layout.passes(table))
    return found


@triton.jit
def tile_of(rows, chunks, WIDTH: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Of this program, a tile of [ROWS, WIDTH] numbers, whose metadata lie in runs: row of the table, its first row and column."""
    _tensor, row, start, _size = chunk_of(rows, chunks, ROWS * WIDTH, ALIGNED)
    across = (tl.load(row + COLS) + WIDTH - 1) // WIDTH
    tile = start // (ROWS * WIDTH)
    return row, tile // across * ROWS, tile % across * WIDTH


@triton.jit
def places_of(row, line, first, PART: tl.constexpr, WORD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The tile in a matrix of 1 / PART of the columns: where it begins, places behind that, and which of them there are."""
    cols = tl.load(row + COLS) // PART
    start = line * cols + first // PART
    cols, inside = tl.multiple_of(cols.to(tl.int32), WORD), tl.multiple_of((cols - first // PART).to(tl.int32), WORD)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH // PART)[None, :]
    return start, r.to(tl.int64) * cols + c, (c < inside) & (r >= 0)


@triton.jit
def meta_places_of(row, line, first, WORD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The metadata words, of WORD numbers each, where CUTLASS wants them (reference/pack.py: meta_places), and which of them there are."""
    c = first // WORD + tl.arange(0, WIDTH // WORD)[None, :]
    r = tl.arange(0, ROWS)[:, None]
    line += r % 8 * (ROWS // 8) + r // 8
    move = tl.where((line + c) % 2 == 0, 0, 1 - line % 2 * 2)
    place = (c - move) // 2 * (tl.load(row + ROWS_IN_ALL) * 2) + (line + move) * 2 + (c - move) % 2
    return place, (c * WORD < tl.load(row + COLS)) & (r >= 0)


@triton.jit
def pack_24_kernel(
    rows, chunks, META_T: tl.constexpr, ROWS: tl.constexpr, WORD: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK // ROWS
    row, line, first = tile_of(rows, chunks, WIDTH, ROWS, ALIGNED)
    start, i, valid = places_of(row, line, first, 1, WORD, WIDTH, ROWS)
    x = tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=valid, other=0)
    if T == tl.int32:  # 1:2: a pair is a group of four halves
        a, b = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
        leads = (a & 0x7FFFFFFF) != 0
        kept, nibble = tl.where(leads, a, b), tl.where(leads, 0x4, 0xE)
    else:
        even, odd = tl.split(tl.reshape(x, [BLOCK // 4, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        m0, m1, m3 = not_zero(a, T), not_zero(b, T), not_zero(d, T)
        none, both = (m0 | m1) ^ 1, m0 & m1
        one = ((m0 ^ 1) & m1) | (none << 1)  # the places that reference/pack.py lists
        two = both | none | m3 | ((both ^ 1) << 1)
        kept = tl.join(tl.where(one == 0, a, tl.where(one == 1, b, c)), tl.where(two == 1, b, tl.where(two == 2, c, d)))
        nibble = one | (two << 2)
    start, i, valid = places_of(row, line, first, 2, WORD, WIDTH, ROWS)
    tl.store(column(row, PACKED, start, T, ALIGNED) + i, tl.reshape(kept, [ROWS, WIDTH // 2]), mask=valid)
    NIBBLES: tl.constexpr = META_T.primitive_bitwidth // 4
    word = tl.sum(tl.reshape(nibble, [ROWS, WIDTH // WORD, NIBBLES]) << (4 * tl.arange(0, NIBBLES))[None, None, :], 2)
    place, valid = meta_places_of(row, line, first, WORD, WIDTH, ROWS)
    tl.store(column(row, META, 0, META_T, False) + place, word.to(META_T), mask=valid)


@triton.jit
def not_zero(x, T: tl.constexpr):
    """1 or 0. A byte has no sign bit to leave out: float8 is not packed."""
    return ((x if T == tl.int8 else x & 0x7FFF) != 0).to(tl.int32)


@triton.jit
def unpack_24_kernel(
    rows, chunks, META_T: tl.constexpr, ROWS: tl.constexpr, WORD: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK // ROWS
    NIBBLES: tl.constexpr = META_T.primitive_bitwidth // 4
    GROUPS: tl.constexpr = BLOCK // WORD * NIBBLES
    row, line, first = tile_of(rows, chunks, WIDTH, ROWS, ALIGNED)
    place, valid = meta_places_of(row, line, first, WORD, WIDTH, ROWS)
    word = tl.load(column(row, META, 0, META_T, False) + place, mask=valid, other=0).to(tl.int32)
    nibble = tl.reshape(word[:, :, None] >> (4 * tl.arange(0, NIBBLES))[None, None, :], [GROUPS])
    one, two = nibble & 3, (nibble >> 2) & 3
    start, i, valid = places_of(row, line, first, 2, WORD, WIDTH, ROWS)
    kept = tl.load(column(row, PACKED, start, T, ALIGNED) + i, mask=valid, other=0)
    if T == tl.int32:
        x = tl.reshape(kept, [GROUPS])
        slots = tl.join(tl.where(one < 2, x, 0), tl.where(one < 2, 0, x))
    else:
        x, y = tl.split(tl.reshape(kept, [GROUPS, 2]))
        even = tl.join(slot(0, one, two, x, y), slot(2, one, two, x, y))
        odd = tl.join(slot(1, one, two, x, y), slot(3, one, two, x, y))
        slots = tl.join(even, odd)
    start, i, valid = places_of(row, line, first, 1, WORD, WIDTH, ROWS)
    tl.store(column(row, PARAM, start, T, ALIGNED) + i, tl.reshape(slots, [ROWS, WIDTH]), mask=valid)


@triton.jit
def slot(own: tl.constexpr, one, two, x, y):
    return tl.where(one == own, x, 0) | tl.where(two == own, y, 0)


def launches(kernel: Any, weights: Sequence[Tensor], packed: Sequence[Tensor], metas: Sequence[Tensor]) -> Iterator[Action]:
    """Of pack_24_kernel or unpack_24_kernel, one a size of number and alignment."""
    slots = as_integers(weights)
    columns = {PARAM.value: slots, PACKED.value: as_integers(packed), META.value: metas}
    table = Table(slots, columns, {COLS.value: [w.shape[1] for w in slots], ROWS_IN_ALL.value: [w.shape[0] for w in slots]})
    padded = []  # to whole tiles
    for w in slots:
        rows, block = 16 if w.dtype == torch.int8 else 32, tuning(w.dtype).block
        padded.append(w.shape[0] // rows * -(-w.shape[1] * rows // block) * block)
    for kind, chunks in table.chunks(sizes=tuple(padded)):
        byte = kind.dtype == torch.int8
        layout = {"META_T": tl.int32 if byte else tl.int16, "ROWS": 16 if byte else 32, "WORD": 32 // kind.dtype.itemsize}
        yield launch(kernel, len(chunks), table.rows, chunks, **kind.options, **layout)


def pack_24_(weights: Sequence[Tensor], packed: Sequence[Tensor], metas: Sequence[Tensor]) -> None:
    send(launches(pack_24_kernel, weights, packed, metas))


def unpack_24_(weights: Sequence[Tensor], packed: Sequence[Tensor], metas: Sequence[Tensor]) -> None:
    send(launches(unpack_24_kernel, weights, packed, metas))
