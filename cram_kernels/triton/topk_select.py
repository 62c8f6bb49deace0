"""Top-k, the exact selection: whether the guess held, and a search for the threshold's key, 11 bits a round."""

import triton
import triton.language as tl

from .number import NAN_KEY, magnitude_key, widen
from .perturb import rho_of, uphill, weight_at
from .table import PARAM, PLACE, SAVED, chunk_of, elements_of
from .topk_bracket import ABOVE, CAPACITY, FALLBACK, FIELDS, FOUND, HIGH, LOW, NANS, RANK, STATES
from .topk_histogram import count_bins

SEARCH_BITS = tl.constexpr(11)
SEARCH_BINS = tl.constexpr(1 << SEARCH_BITS.value)
ROUNDS = 3  # of 11 bits: every key


@triton.jit
def verify_kernel(sets, k, state, num_sets, SETS: tl.constexpr):
    """Where the threshold is outside the bracket, or its candidates too many for their place, all weights are candidates."""
    s = tl.program_id(0).to(tl.int64) * SETS + tl.arange(0, SETS)
    there = s < num_sets
    own = state + s * STATES
    low, high = tl.load(own + LOW, mask=there, other=0), tl.load(own + HIGH, mask=there, other=0)
    above, found = tl.load(own + ABOVE, mask=there, other=0), tl.load(own + FOUND, mask=there, other=0)
    wanted = tl.load(k + s, mask=there, other=0)
    rank = wanted - above
    lost = (rank < 1) | (rank > found) | (found > tl.load(sets + s * FIELDS + CAPACITY, mask=there, other=0))
    fallback = there & (low < high) & lost
    tl.store(own + RANK, tl.where(fallback, wanted, rank), mask=there)
    tl.store(own + LOW, -1, mask=fallback)
    tl.store(own + HIGH, NAN_KEY, mask=fallback)
    tl.store(own + ABOVE, 0, mask=fallback)
    tl.store(own + FALLBACK, 1, mask=fallback)


@triton.jit
def shift_of(width):
    """The bits by which offsets in [0, width) are shifted to be bin numbers. width: int64."""
    return tl.sum((tl.full([32], SEARCH_BINS, tl.int64) << tl.arange(0, 32) < width).to(tl.int32), 0)


@triton.jit
def count_kernel(
    rows, chunks, spans, candidates, state, rho, inv_scale, histogram,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr, RECORDS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A histogram of the keys in (LOW, HIGH] of each set: of its candidates, or of all weights."""
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    s = tl.load(row + PLACE)
    state, histogram = state + s * STATES, histogram + s * SEARCH_BINS
    low, high = tl.load(state + LOW).to(tl.int32), tl.load(state + HIGH).to(tl.int32)
    shift = shift_of(high.to(tl.int64) - low)
    if tl.load(state + FALLBACK) != 0:
        i, valid = elements_of(size, BLOCK)
        u = weight_at(row, start, i, valid, SAVED if PERTURB else PARAM, T, MASTERS, ALIGNED)
        if PERTURB:
            u = widen(uphill(u, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, None, T, ALIGNED))
        key = tl.reshape(magnitude_key(u), [BLOCK])
        inside = tl.reshape(valid, [BLOCK]) & (key > low) & (key <= high)
        count_bins(histogram, (key - low - 1) >> shift, inside, SEARCH_BINS)
    else:
        span = spans + tl.program_id(0).to(tl.int64) * 2
        first, count = tl.load(span), tl.load(span + 1)
        for at in range(0, count, RECORDS):
            j = at + tl.arange(0, RECORDS)
            key = tl.load(candidates + first + j, mask=j < count, other=0) & 0x7FFFFFFF
            inside = (j < count) & (key > low) & (key <= high)
            one = tl.full([RECORDS], 1, histogram.dtype.element_ty)
            tl.atomic_add(histogram + ((key - low - 1) >> shift), one, mask=inside, sem="relaxed")


@triton.jit
def narrow_kernel(state, histogram, thresholds, stats):
    """One round for each set: (LOW, HIGH] becomes the bin that the threshold is in. After the last one HIGH is the threshold."""
    s = tl.program_id(0).to(tl.int64)
    state = state + s * STATES
    bins = histogram + s * SEARCH_BINS + tl.arange(0, SEARCH_BINS)
    count = tl.load(bins)
    tl.store(bins, tl.zeros_like(count))
    low, high, rank = tl.load(state + LOW), tl.load(state + HIGH), tl.load(state + RANK)
    shift = shift_of(high - low)
    larger = tl.sum(count, 0) - tl.cumsum(count, 0)
    hit = (larger < rank) & (rank <= larger + count)
    low += tl.sum(tl.where(hit, tl.arange(0, SEARCH_BINS), 0), 0).to(tl.int64) << shift
    high = tl.minimum(high, low + (tl.full([], 1, tl.int64) << shift))
    passed = tl.sum(tl.where(hit, larger, 0), 0).to(tl.int64)
    above = tl.load(state + ABOVE) + passed
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + RANK, rank - passed)
    tl.store(state + ABOVE, above)
    tl.store(thresholds + s, high.to(tl.int32))
    tl.store(stats + s * 3, tl.where(high == NAN_KEY, 0, above - tl.load(state + NANS)))
    tl.store(stats + s * 3 + 1, tl.load(state + FOUND))
    tl.store(stats + s * 3 + 2, tl.load(state + FALLBACK))
