"""Global top-k in one pass (docs/contract.md: Top-k).

Sample a bracket around the threshold, perturb and prune on a guess while writing down what falls into the bracket, select exactly among
those, set right what the guess got wrong. Where the guess fails, the same selection runs over all weights, and they are pruned once more:
that costs time, never exactness. Nothing is read back: the device decides.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Action, launch, send
from .number import NAN_KEY, magnitude_key, rounded, widen
from .perturb import perturb_table, raise_flag, rho_of, save, uphill, weight_at
from .table import MASK, PARAM, PLACE, SAVED, Table, chunk_of, column, constant, elements_of, only, store_bits
from .topk_bracket import (
    ABOVE,
    BASE,
    CAPACITY,
    CUT,
    FALLBACK,
    FIELDS,
    FOUND,
    HIGH,
    LOW,
    NANS,
    NUMEL,
    SAMPLE_BINS,
    STATES,
    STRATA,
    bracket_kernel,
    make_sets,
    sample_kernel,
)  # fmt: skip
from .topk_select import ROUNDS, SEARCH_BINS, count_kernel, narrow_kernel, verify_kernel
from .tuning import records

SETS = 128  # a program of `verify_kernel`


@triton.jit
def prune(row, start, size, i, valid, u, threshold, T: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Store u, stored numbers, where the key is larger than the threshold, else +0, and the mask bits."""
    key = magnitude_key(widen(u))
    keep = valid & (key > threshold) & (key < NAN_KEY)
    tl.store(column(row, PARAM, start, T, ALIGNED) + i, tl.where(keep | (key == NAN_KEY), u, 0).to(T), mask=valid)
    store_bits(row, start, size, keep, BLOCK)


@triton.jit
def stream_kernel(
    rows, chunks, spans, candidates, places, sets, state, rho, inv_scale, found_inf,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The one pass: count what is above the bracket, append the candidates in it; PERTURB: save, move uphill, prune on the guess."""
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    s = tl.load(row + PLACE)
    state, own = state + s * STATES, sets + s * FIELDS
    low, high = tl.load(state + LOW).to(tl.int32), tl.load(state + HIGH).to(tl.int32)
    if PERTURB:
        w = save(row, start, i, valid, T, MASTERS, ALIGNED)
        u = uphill(w, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, found_inf, T, ALIGNED)
        prune(row, start, size, i, valid, u, tl.load(state + CUT).to(tl.int32), T, ALIGNED, BLOCK)
        wide = widen(u)
    else:
        wide = weight_at(row, start, i, valid, PARAM, T, False, ALIGNED)
    key = magnitude_key(wide)
    two = (valid & (key > high)).to(tl.int32) + ((valid & (key == NAN_KEY)).to(tl.int32) << 16)
    two = tl.sum(tl.sum(two, 1), 0)  # both sums at once: a chunk has at most 2 ** 15 elements
    tl.atomic_add(state + ABOVE, (two & 0xFFFF).to(tl.int64), sem="relaxed")
    tl.atomic_add(state + NANS, ((two >> 16) & 0xFFFF).to(tl.int64), sem="relaxed")

    candidate = valid & (key > low) & (key <= high)
    in_row = tl.sum(candidate.to(tl.int32), 1)
    count = tl.sum(in_row, 0)
    found = tl.atomic_add(state + FOUND, count.to(tl.int64), sem="relaxed")
    fits = found + count <= tl.load(own + CAPACITY)
    before = (tl.cumsum(in_row, 0) - in_row)[:, None] + tl.cumsum(candidate.to(tl.int32), 1) - 1
    first = tl.load(own + BASE) + found
    bits = tl.where(key == NAN_KEY, NAN_KEY, wide.to(tl.int32, bitcast=True))
    tl.store(candidates + first + before, bits, mask=only(candidate, fits))
    tl.store(places + first + before, i.to(tl.int16), mask=only(candidate, fits))
    span = spans + tl.program_id(0).to(tl.int64) * 2
    tl.store(span, first)
    tl.store(span + 1, tl.where(fits, count, 0).to(tl.int64))


@triton.jit
def finish_kernel(
    rows, chunks, spans, candidates, places, state, rho, inv_scale,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr, RECORDS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the candidates right; without PERTURB and after a fallback, prune the whole chunk by the threshold."""
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    state = state + tl.load(row + PLACE) * STATES
    threshold = tl.load(state + HIGH).to(tl.int32)
    span = spans + tl.program_id(0).to(tl.int64) * 2
    if not PERTURB:
        i, valid = elements_of(size, BLOCK)
        u = tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=valid, other=0)
        prune(row, start, size, i, valid, u, threshold, T, ALIGNED, BLOCK)
    elif tl.load(state + FALLBACK) != 0:
        i, valid = elements_of(size, BLOCK)
        w = weight_at(row, start, i, valid, SAVED, T, MASTERS, ALIGNED)
        u = uphill(w, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, None, T, ALIGNED)
        prune(row, start, size, i, valid, u, threshold, T, ALIGNED, BLOCK)
    else:
        first, count = tl.load(span), tl.load(span + 1)
        for at in range(0, count, RECORDS):
            fix_up(row, start, candidates + first, places + first, at, count, threshold, T, RECORDS)


@triton.jit
def fix_up(row, start, candidates, places, at, count, threshold, T: tl.constexpr, RECORDS: tl.constexpr):
    """RECORDS candidates of a chunk, in the order of their places. The first one in a mask byte sets the bits of all that are in it."""
    j = at + tl.arange(0, RECORDS)
    there = j < count
    bits = tl.load(candidates + j, mask=there, other=0)
    key = bits & 0x7FFFFFFF
    i = tl.load(places + j, mask=there, other=0).to(tl.int32)
    stays = ((key > threshold) & (key < NAN_KEY)) | (key == NAN_KEY)
    tl.store(column(row, PARAM, start, T, False) + i, tl.where(stays, rounded(bits.to(tl.float32, bitcast=True), T), 0).to(T), mask=there)

    before = tl.load(places + j - 1, mask=there & (j > 0), other=-8).to(tl.int32)
    leads = only(there & (before >> 3 != i >> 3), tl.load(row + MASK) != 0)
    byte = column(row, MASK, start // 8, tl.uint8, False) + (i >> 3)
    kept = tl.load(byte, mask=leads, other=0).to(tl.int32)
    for ahead in tl.static_range(8):
        inside = leads & (j + ahead < count)
        other = tl.load(places + j + ahead, mask=inside, other=-8).to(tl.int32)
        other_key = tl.load(candidates + j + ahead, mask=inside, other=0) & 0x7FFFFFFF
        bit = tl.where(inside & (other >> 3 == i >> 3), 1 << (other & 7), 0)
        kept = tl.where((other_key > threshold) & (other_key < NAN_KEY), kept | bit, kept & ~bit)
    tl.store(byte, kept.to(tl.uint8), mask=leads)


def upload_fields(upload: Callable[[Tensor], Tensor], fields: tuple[int, ...]) -> Tensor:
    return upload(torch.tensor(fields, dtype=torch.int64).view(len(fields) // FIELDS.value, FIELDS.value))


def solve(
    table: Table,
    sets: Sequence[int],
    k: Tensor,
    write: bool,
    perturbation: dict[str, Any],
    found_inf: Tensor | None = None,
    perturbed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Thresholds int32 [num_sets] and stats int64 [num_sets, 3]; with `write`, the pruned weights and masks."""
    num_sets, device = k.numel(), k.device
    own = make_sets(table.sizes, tuple(sets), num_sets)
    fields = constant(upload_fields, device, own.fields)
    thresholds = torch.empty(num_sets, dtype=torch.int32, device=device)
    stats = torch.empty(num_sets, 3, dtype=torch.int64, device=device)
    state = torch.zeros(num_sets + 1, STATES.value, dtype=torch.int64, device=device)
    samples = torch.zeros(own.slots, SAMPLE_BINS.value, dtype=torch.int32, device=device)
    histogram = torch.zeros(num_sets + 1, SEARCH_BINS.value, dtype=torch.int64, device=device)  # a fallback counts all weights
    candidates = torch.empty(own.candidates, dtype=torch.int32, device=device)
    places = torch.empty(own.candidates, dtype=torch.int16, device=device)
    served = list(table.chunks(lambda i: perturbation["PERTURB"] or sets[i] >= 0))
    spans = [torch.empty(len(chunks), 2, dtype=torch.int64, device=device) for _, chunks in served]

    def each(kernel: Any, *args: Any, **more: Any) -> list[Action]:
        return [
            launch(
                kernel, len(chunks), table.rows, chunks, span, candidates, *args,
                **(perturbation | kind.options | more),
            )
            for (kind, chunks), span in zip(served, spans, strict=True)
        ]  # fmt: skip

    actions: list[Action] = [] if perturbed is None else [partial(raise_flag, "perturb_topk_", perturbed)]
    for kind, chunks in table.chunks(lambda i: own.strata[i] > 0, own.strata, lambda kind, i: STRATA):
        options = kind.options | {"BLOCK": STRATA, "ALIGNED": False}  # single weights
        actions.append(launch(sample_kernel, len(chunks), table.rows, chunks, fields, histogram=samples, **perturbation, **options))
    actions.append(launch(bracket_kernel, num_sets + 1, fields, k, samples, state, num_sets, num_warps=16, enable_fp_fusion=False))
    actions += each(stream_kernel, places, fields, state, found_inf=found_inf)
    if num_sets > 0:
        actions.append(launch(verify_kernel, -(-num_sets // SETS), fields, k, state, num_sets, SETS=SETS, num_warps=4))
        narrow = launch(narrow_kernel, num_sets, state, histogram, thresholds, stats, num_warps=8)
        actions += [*each(count_kernel, state, histogram=histogram, RECORDS=records()), narrow] * ROUNDS
        if write:
            actions += each(finish_kernel, places, state, RECORDS=records())
    send(actions)
    return thresholds, stats


PRUNE = {"PERTURB": False, "RHO_EACH": False, "rho": None, "inv_scale": None}


def numbers_of(weights: Sequence[Tensor], sets: Sequence[int], num_sets: int) -> dict[int, list[int]]:
    return {PLACE.value: [s if s >= 0 else num_sets for s in sets], NUMEL.value: [w.numel() for w in weights]}


def topk_threshold(weights: Sequence[Tensor], sets: Sequence[int], k: Tensor) -> Tensor:
    table = Table(weights, {PARAM.value: weights}, numbers_of(weights, sets, k.numel()))
    return solve(table, sets, k, False, PRUNE)[0]


def prune_topk_(weights: Sequence[Tensor], masks: Sequence[Tensor], sets: Sequence[int], k: Tensor) -> tuple[Tensor, Tensor]:
    table = Table(weights, {PARAM.value: weights, MASK.value: masks}, numbers_of(weights, sets, k.numel()))
    return solve(table, sets, k, True, PRUNE)


def perturb_topk_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    masks: Sequence[Tensor],
    perturbed: Tensor,
    rho: Tensor,
    sets: Sequence[int],
    k: Tensor,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    own_masks = [mask if s >= 0 else mask[:0] for mask, s in zip(masks, sets, strict=False)]  # of a tensor in no set: left alone
    table = perturb_table(params, grads, saved, own_masks, masters, numbers_of(params, sets, k.numel()))
    perturbation = {"PERTURB": True, "RHO_EACH": rho.dim() > 0, "rho": rho, "inv_scale": inv_scale}
    return solve(table, sets, k, True, perturbation, found_inf, perturbed)
