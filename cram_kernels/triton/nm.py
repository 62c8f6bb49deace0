"""N of M along the input channels (docs/contract.md: N:M)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Action, launch, send
from .number import NAN_KEY, magnitude_key, widen
from .perturb import perturb_masked_kernel, perturb_table, raise_flag, rho_of, save, uphill
from .table import MASK, NUMBER, PARAM, PLACE, Kind, Table, chunk_of, column, elements_of, only, store_bits

SCRATCH = NUMBER  # the tensor's first byte in the scratch, -1: none
SPAN = tl.constexpr(NUMBER.value + 1)  # elements of a window

# How the groups of a tensor lie in memory decides how a program sees them.
ROWS = tl.constexpr("rows")  # one after the other, M a power of two: each in lanes of its own, as it is loaded
WINDOWS = tl.constexpr("windows")  # within a few elements of each other, as in a convolution: loaded as they lie, ordered in shared memory
COLUMNS = tl.constexpr("columns")  # far apart, a multiple of 8 elements between neighbours along axis 1: 8 groups side by side
SINGLE = tl.constexpr("single")  # far apart


@triton.jit
def is_before(key, other, j):
    """1 where weight `other` of a group comes before weight j in the order of key and place, else 0. Of integers: predicates are few."""
    own = tl.sum(tl.where(j == other, key, 0), 1)[:, None]
    return ((own - key - (other < j).to(tl.int32)) >> 31) & 1  # the sign of a difference: keys are not negative


@triton.jit
def kept(key, N: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr):
    """key int32 [groups, LANES] -> bool: the N last of a group in the order of key and place.

    Small groups rank each weight by counting those before it (a loop that is not unrolled needs half the registers from 16 on), large
    ones search for the first that stays, bit by bit.
    """
    j = tl.arange(0, LANES)[None, :]
    if LANES <= 32:
        rank = tl.zeros(key.shape, tl.int32)
        if LANES <= 8:
            for other in tl.static_range(M):
                rank += is_before(key, other, j)
        else:
            for other in range(M):
                rank += is_before(key, other, j)
        return (rank >= M - N) & (key < NAN_KEY)
    else:
        key = tl.where(j < M, key, -1)
        last = largest(key, N, 31)  # the key of the N-th
        equal, needed = key == last, N - tl.sum((key > last).to(tl.int32), 1)[:, None]
        first = largest(tl.where(equal, j, -1), needed, 10)
        return ((key > last) | (equal & (j >= first))) & (key < NAN_KEY)


@triton.jit
def largest(x, n, BITS: tl.constexpr):
    """The n-th largest number of each row of x int32 [groups, LANES]: [groups, 1] in 0 ... 2 ** BITS - 1, for n < 1 the last."""
    found = tl.max(x * 0, 1)[:, None]
    for bit in range(BITS):
        higher = found | (1 << (BITS - 1 - bit))
        found = tl.where(tl.sum((x >= higher).to(tl.int32), 1)[:, None] >= n, higher, found)
    return found


@triton.jit
def quotient(a, b):
    """a // b of int32, 0 <= a < 2 ** 21, without an integer division: a + 1/2 is further from a multiple of b than what is rounded."""
    return ((a.to(tl.float32) + 0.5) * (1.0 / b.to(tl.float32))).to(tl.int32)


@triton.jit
def kept_of_window(key, near, N: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr):
    """`kept` for key [GROUPS * LANES / 8, 8] in memory order, whole slabs of [M, near]: into rows of groups and back."""
    flat, slab = tl.arange(0, GROUPS * LANES), near * M
    g, j = flat // LANES, flat % LANES
    place = quotient(g, near) * (slab - near) + g + j * near
    group = tl.gather(tl.reshape(key, [GROUPS * LANES]), tl.minimum(place, GROUPS * LANES - 1), 0)
    keep = kept(tl.reshape(group, [GROUPS, LANES]), N, M, LANES).to(tl.int32)
    before = quotient(flat, slab)
    inside = flat - before * slab
    j = quotient(inside, near)
    place = (before * near + inside - j * near) * LANES + j
    keep = tl.gather(tl.reshape(keep, [GROUPS * LANES]), tl.minimum(place, GROUPS * LANES - 1), 0)
    return tl.reshape(keep, key.shape) != 0


@triton.jit
def groups_of(row, first, size, M: tl.constexpr, FORM: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """A chunk of groups: an element to count from, places behind it, which of them there are; in [GROUPS, LANES] a row is a group.

    ROWS: the places are [GROUPS * M / 8, 8] meanwhile, a row a mask byte.
    """
    if FORM == ROWS:
        i, valid = elements_of(size * M, GROUPS * M)
        return first * M, i, valid
    else:
        g, j = tl.arange(0, GROUPS)[:, None], tl.arange(0, LANES)[None, :]
        inner = tl.load(row + PLACE)
        g, near = g + (first % inner).to(tl.int32), inner.to(tl.int32)  # divisions of 64 bits are slow
        i = (g // near).to(tl.int64) * (M * inner) + g % near + j * inner
        if FORM == COLUMNS:
            i = tl.max_contiguous(tl.multiple_of(i, [8, 1]), [8, 1])
        return first // inner * (M * inner), i, (tl.arange(0, GROUPS)[:, None] < size) & (j < M)


@triton.jit
def placed(
    rows, chunks,
    M: tl.constexpr, FORM: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of this program: tensor, row, elements (of ROWS, WINDOWS) or groups, an element to count from, places behind it, which there are."""
    if FORM == WINDOWS:
        tensor, row, window, size = chunk_of(rows, chunks, 1, ALIGNED, WHOLE)
        i, valid = elements_of(size, GROUPS * LANES)
        return tensor, row, size, window * tl.load(row + SPAN), i, valid
    else:
        tensor, row, first, size = chunk_of(rows, chunks, GROUPS, ALIGNED, WHOLE)
        start, i, valid = groups_of(row, first, size, M, FORM, GROUPS, LANES)
        return tensor, row, size * M if FORM == ROWS else size, start, i, valid


@triton.jit
def nm_kernel(
    rows, chunks, rho, inv_scale, found_inf, scratch,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, FORM: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tensor, row, size, start, i, valid = placed(rows, chunks, M, FORM, GROUPS, LANES, WHOLE, ALIGNED)
    if PERTURB:
        w = save(row, start, i, valid, T, MASTERS, ALIGNED)
        u = uphill(w, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, found_inf, T, ALIGNED)
    else:
        u = tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=valid, other=0)
    key = magnitude_key(widen(u))
    if FORM == WINDOWS:
        keep = kept_of_window(key, tl.load(row + PLACE).to(tl.int32), N, M, LANES, GROUPS)
    else:
        keep = tl.reshape(kept(tl.reshape(key, [GROUPS, LANES]), N, M, LANES), valid.shape)
    # Once more: the predicates of `valid` need not live across the ranking, where ptxas would spill them.
    tensor, row, size, start, i, valid = placed(rows, chunks, M, FORM, GROUPS, LANES, WHOLE, ALIGNED)
    keep = keep & valid
    tl.store(column(row, PARAM, start, T, ALIGNED) + i, tl.where(keep | (key == NAN_KEY), u, 0).to(T), mask=valid)
    if FORM == ROWS or FORM == WINDOWS:
        store_bits(row, start, size, keep, GROUPS * LANES)
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


class Layout:
    """How the groups of M of each tensor lie.

    Attributes:
        inner: elements between neighbours along axis 1; 0 where nothing is pruned.
        spans: elements of a window; 0 where a tensor has none.
        forms: of the constants above; None where nothing is pruned.
    """

    def __init__(self, tensors: Sequence[Tensor], prune: Sequence[int], m: int, masters: Sequence[Tensor] = ()) -> None:
        self.m, self.lanes = m, triton.next_power_of_2(m)
        self.inner = [t.stride(1) if own and t.numel() else 0 for t, own in zip(tensors, prune, strict=True)]
        kinds = [Kind(t.dtype, bool(len(masters)) and masters[i].numel() > 0, True) for i, t in enumerate(tensors)]
        groups = {kind: self.groups(kind) for kind in set(kinds)}
        self.spans = [self._span(inner, groups[kind] * m) for inner, kind in zip(self.inner, kinds, strict=True)]
        self.forms = [self._form(i, groups[kind]) for i, kind in enumerate(kinds)]

    def groups(self, kind: Kind) -> int:
        """Of a program."""
        return max(1, kind.tuning.block // self.lanes)

    def _span(self, inner: int, room: int) -> int:
        """The most elements of whole slabs of [M, inner] and of whole mask bytes in `room`."""
        unit = math.lcm(8, self.m * inner)
        return room // unit * unit if inner else 0

    def _form(self, i: int, groups: int) -> str | None:
        if self.inner[i] == 0:
            return None
        if self.inner[i] == 1 and self.lanes == self.m:
            return ROWS.value
        if self.spans[i] > 0:
            return WINDOWS.value
        return COLUMNS.value if self.inner[i] % 8 == 0 and groups % 8 == 0 else SINGLE.value

    def scratch(self, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[list[int], int]:
        """Where the bytes of each tensor begin (-1: it needs none), and how many: one a weight, where mask bytes straddle groups."""
        places, size = [-1] * len(tensors), 0
        for i, t in enumerate(tensors):
            if len(masks) and masks[i].numel() and self.forms[i] in (COLUMNS.value, SINGLE.value):
                places[i] = size
                size += -(-t.numel() // 16) * 16
        return places, size

    def passes(self, table: Table) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Chunks, of elements in windows and else of groups, and the options of their launch."""
        for form in (ROWS.value, WINDOWS.value, COLUMNS.value, SINGLE.value):
            own = {i for i, one in enumerate(self.forms) if one == form}
            windows = form == WINDOWS.value
            sizes = table.sizes if windows else tuple(numel // self.m for numel in table.sizes)

            def units(kind: Kind, i: int, windows: bool = windows) -> int:
                return self.spans[i] if windows else self.groups(kind)

            whole = max(1, 8 // self.m) if form == ROWS.value else 8  # units whose bits are whole mask bytes, or that lie side by side
            for kind, chunks in table.chunks(own.__contains__, sizes, units, whole):
                shape = {"FORM": form, "GROUPS": self.groups(kind), "LANES": self.lanes, "WHOLE": whole}
                options = kind.options | shape | (kind.tuning.roomy if form == COLUMNS.value else {})
                del options["BLOCK"]
                yield chunks, options


def launches(table: Table, layout: Layout, places: list[int], size: int, **constants: Any) -> list[Action]:
    """Prune what has groups, and set the masks right where their bytes straddle groups."""
    scratch = torch.empty(size, dtype=torch.uint8, device=table.device)
    return [
        *(
            launch(nm_kernel, len(chunks), table.rows, chunks, scratch=scratch, M=layout.m, **constants, **options)
            for chunks, options in layout.passes(table)
        ),
        *table.launches(mask_kernel, scratch, among=lambda i: places[i] >= 0),
    ]


def prune_nm_(weights: Sequence[Tensor], masks: Sequence[Tensor], prune: Sequence[int], n: int, m: int) -> None:
    layout = Layout(weights, prune, m)
    places, size = layout.scratch(weights, masks)
    numbers = {PLACE.value: layout.inner, SPAN.value: layout.spans, SCRATCH.value: places}
    table = Table(weights, {PARAM.value: weights, MASK.value: masks}, numbers)
    send(launches(table, layout, places, size, N=n, PERTURB=False, rho=None, inv_scale=None, found_inf=None, RHO_EACH=False))


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
    layout = Layout(params, prune, m, masters)
    places, size = layout.scratch(params, masks)
    pruned_masks = [mask if own else mask[:0] for mask, own in zip(masks, layout.inner, strict=False)]
    numbers = {PLACE.value: layout.inner, SPAN.value: layout.spans, SCRATCH.value: places}
    table = perturb_table(params, grads, saved, pruned_masks, masters, numbers)
    perturbation = {"rho": rho, "inv_scale": inv_scale, "found_inf": found_inf, "RHO_EACH": rho.dim() > 0}
    pruned = launches(table, layout, places, size, N=n, PERTURB=True, **perturbation)
    dense = table.launches(perturb_masked_kernel, among=lambda i: layout.forms[i] is None, **perturbation)
    send([partial(raise_flag, "perturb_nm_", perturbed), *pruned, *dense])
