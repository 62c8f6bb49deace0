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
from .number import INF_KEY, NAN_KEY, magnitude_key, rounded, widen
from .perturb import gradient_at, note_bad, perturb_table, raise_flag, rho_of, save, weight_at
from .table import MASK, PARAM, PLACE, Table, chunk_of, constant, store_bytes
from .topk_bracket import (
    ABOVE,
    BASE,
    CAPACITY,
    CUT,
    DRAWN,
    FIELDS,
    FOUND,
    HIGH,
    LOW,
    NANS,
    NUMEL,
    SAMPLE_BINS,
    STATES,
    STRATA,
    TIE,
    TIES,
    bracket_kernel,
    make_sets,
    sample_kernel,
)  # fmt: skip
from .topk_finish import finish_kernel, prune_kernel, store_pruned
from .topk_select import ROUNDS, SEARCH_BINS, count_kernel
from .tuning import group

NOWHERE = tl.constexpr(-2)  # the key of what is beyond the chunk


@triton.jit
def stream_kernel(
    rows, chunks, spans, candidates, places, sets, state, rho, inv_scale, found_inf,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The one pass: count what is above the bracket, write down the candidates in it; PERTURB: save, move uphill, prune on the guess."""
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    LANES: tl.constexpr = 16 // (T.primitive_bitwidth // 8)  # of a row, which a thread loads as a whole: rows need no exchange then
    lane, first_of_row = tl.arange(0, LANES)[None, :], tl.arange(0, BLOCK // LANES) * LANES
    i = first_of_row[:, None] + lane
    valid = i < size
    if ALIGNED:  # whole rows
        valid = first_of_row[:, None] + lane * 0 < size
    s = tl.load(row + PLACE)
    state, own = state + s * STATES, sets + s * FIELDS
    low, high = tl.load(state + LOW).to(tl.int32), tl.load(state + HIGH).to(tl.int32)
    tie, other_tie = tl.load(state + TIE).to(tl.int32), tl.load(state + TIE + 1).to(tl.int32)
    if PERTURB:
        g = gradient_at(row, start, i, valid, inv_scale, T, ALIGNED)  # on its way before the first store
        w = save(row, start, i, valid, T, MASTERS, ALIGNED)
        u = rounded(w + rho_of(tensor, rho, RHO_EACH) * g, T)
        bits = widen(u).to(tl.int32, bitcast=True)
        key = bits & 0x7FFFFFFF  # every NaN is the canonical one
    else:
        key = magnitude_key(weight_at(row, start, i, valid, PARAM, T, False, ALIGNED))
        bits = key
    if not ALIGNED:
        key = tl.where(valid, key, NOWHERE)

    # Of a row, in bits: which are candidates (0-7), how many are (8-11), how many are above the bracket (12-15), how many are ties
    # (16-19 and 20-23), which stay (24-31). Bits of candidates are added up: of the only one in a row they are what is wanted.
    listed = (key > low) & (key <= high) & (key != tie) & (key != other_tie)
    word = tl.where(key == tie, 1 << 16, tl.where(key == other_tie, 1 << 20, 0))
    word = tl.where(listed, (1 << lane) + (1 << 8), tl.where(key > high, 1 << 12, word))
    if PERTURB:
        stays = store_pruned(row, start, i, valid, u, key, tl.load(state + CUT).to(tl.int32), T, ALIGNED)
        word += tl.where(stays, 1 << (lane + 24), 0)
    word, bits_of_row, odd = tl.sum(word, 1), tl.sum(tl.where(listed, bits, 0), 1), tl.max(key, 1) >= INF_KEY
    if ALIGNED:
        word, odd = tl.where(first_of_row < size, word, 0), odd & (first_of_row < size)
    left, in_row, above = word & 255, (word >> 8) & 15, (word >> 12) & 15
    if PERTURB:
        store_bytes(row, start, size, bytes_of((word >> 24) & 255, LANES, BLOCK), BLOCK)
    two = tl.sum(in_row + (above << 16), 0)  # both sums at once: a chunk has at most 2 ** 15 elements
    crowded = tl.max(in_row + tl.where(odd, 256, 0), 0)
    count = (two & 0xFFFF).to(tl.int64)
    found = tl.atomic_add(state + FOUND, count, sem="relaxed")
    tl.atomic_add(state + ABOVE, ((two >> 16) & 0xFFFF).to(tl.int64), sem="relaxed")
    if (tie >= 0) | (other_tie >= 0):
        ties = tl.sum(((word >> 16) & 15) + ((word >> 4) & 0xF0000), 0)
        tl.atomic_add(state + TIES, (ties & 0xFFFF).to(tl.int64), sem="relaxed")
        tl.atomic_add(state + TIES + 1, ((ties >> 16) & 0xFFFF).to(tl.int64), sem="relaxed")
    if crowded >= 256:  # infinities or NaNs
        nan = valid & (key == NAN_KEY)
        tl.atomic_add(state + NANS, tl.sum(tl.sum(nan.to(tl.int32), 1), 0).to(tl.int64), sem="relaxed")
        crowded = tl.max(in_row, 0)
        if PERTURB:
            kept = tl.sum((valid & stays & (key < NAN_KEY)).to(tl.int32) << lane, 1)
            store_bytes(row, start, size, bytes_of(kept, LANES, BLOCK), BLOCK)
            if found_inf is not None:
                note_bad(found_inf, valid, g)

    fits = found + count <= tl.load(own + CAPACITY)
    first = tl.load(own + BASE) + found
    span = spans + tl.program_id(0).to(tl.int64) * 2
    tl.store(span, first)
    tl.store(span + 1, tl.where(fits, count, 0))
    at, left = tl.cumsum(in_row, 0) - in_row, tl.where(fits, left, 0)
    while crowded > 1:  # the first candidate of each row that has several left
        lowest = left & -left
        here, several = lane_of(lowest), left != lowest
        own_bits = tl.sum(tl.where(lane == here[:, None], bits, 0), 1)
        tl.store(candidates + first + at, own_bits, mask=several)
        tl.store(places + first + at, (first_of_row + here).to(tl.int16), mask=several)
        bits_of_row = tl.where(several, bits_of_row - own_bits, bits_of_row)
        left, at = tl.where(several, left - lowest, left), tl.where(several, at + 1, at)
        crowded -= 1
    tl.store(candidates + first + at, bits_of_row, mask=left != 0)
    tl.store(places + first + at, (first_of_row + lane_of(left)).to(tl.int16), mask=left != 0)


@triton.jit
def bytes_of(bits, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Of the bits of rows of LANES weights those of 8: int32 [BLOCK / 8]."""
    if LANES < 8:
        place = tl.arange(0, 8 // LANES)[None, :] * LANES
        bits = tl.sum(tl.reshape(bits, [BLOCK // 8, 8 // LANES]) << place, 1)
    return bits


@triton.jit
def lane_of(bit):
    """The place of the only bit of a byte."""
    return ((bit & 0xAA) != 0).to(tl.int32) + ((bit & 0xCC) != 0).to(tl.int32) * 2 + ((bit & 0xF0) != 0).to(tl.int32) * 4


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
    # What is zero at the start. A fallback counts all weights: in int64.
    shapes = [
        (num_sets + 1, STATES.value),
        (num_sets + 1, SEARCH_BINS.value),
        (own.slots, DRAWN.value),
        (own.slots, SAMPLE_BINS.value // 2),
    ]
    sizes = [rows * columns for rows, columns in shapes]
    zeros = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
    state, histogram, drawn, samples = (part.view(shape) for part, shape in zip(zeros, shapes, strict=True))
    samples = samples.view(torch.int32)
    candidates = torch.empty(own.candidates, dtype=torch.int32, device=device)
    places = torch.empty(own.candidates, dtype=torch.int16, device=device)
    served = list(table.chunks(lambda i: perturbation["PERTURB"] or sets[i] >= 0))
    spans = [torch.empty(len(chunks), 2, dtype=torch.int64, device=device) for _, chunks in served]

    def each(kernel: Any, **more: Any) -> list[Action]:
        """A pass over the chunks, one a program or a GROUP."""
        of_one = more.get("GROUP", 1)
        passes: list[Action] = []
        for (kind, chunks), span in zip(served, spans, strict=True):
            given = kind.options | more
            if of_one > 1:
                given["number"] = len(chunks)
                given.pop("maxnreg", None)  # programs are few, and narrowing takes more registers
            passes.append(launch(kernel, -(-len(chunks) // of_one), table.rows, chunks, span, candidates, state=state, **given))
        return passes

    actions: list[Action] = [] if perturbed is None else [partial(raise_flag, "perturb_topk_", perturbed)]
    for kind, chunks in table.chunks(lambda i: own.strata[i] > 0, own.strata, lambda kind, i: STRATA, 1):
        options = perturbation | kind.options | {"BLOCK": STRATA, "ALIGNED": False}  # single weights
        actions.append(launch(sample_kernel, len(chunks), table.rows, chunks, fields, histogram=samples, drawn=drawn, **options))
    options = {"num_warps": 16, "enable_fp_fusion": False}
    actions.append(launch(bracket_kernel, num_sets + 1, fields, k, samples, drawn, state, thresholds, stats, num_sets, **options))
    actions += each(stream_kernel, places=places, sets=fields, found_inf=found_inf, **perturbation)
    if num_sets > 0:
        results = {"histogram": histogram, "thresholds": thresholds, "stats": stats}
        actions += each(count_kernel, sets=fields, k=k, num_sets=num_sets, **results, **perturbation, **group()) * ROUNDS
    if num_sets > 0 and write and perturbation["PERTURB"]:
        moves = {name: value for name, value in perturbation.items() if name != "PERTURB"}
        actions += each(finish_kernel, places=places, **moves, **group())
    elif num_sets > 0 and write:
        actions += table.launches(prune_kernel, state, among=lambda i: sets[i] >= 0)
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
