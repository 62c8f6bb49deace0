"""Top-k, the exact selection: whether the guess held, and a search for the threshold's key, 11 bits a round."""

import triton
import triton.language as tl

from .number import NAN_KEY, magnitude_key, widen
from .perturb import rho_of, uphill, weight_at
from .table import PARAM, PLACE, SAVED, chunk_at, elements_of, group_of
from .topk_bracket import ABOVE, CAPACITY, DONE, FALLBACK, FIELDS, FOUND, HIGH, LOW, NANS, RANK, SET_NUMEL, STATES, TIE, TIES
from .topk_histogram import count_bins

SEARCH_BITS = tl.constexpr(11)
SEARCH_BINS = tl.constexpr(1 << SEARCH_BITS.value)
ROUNDS = 3  # of 11 bits: every key


@triton.jit
def shift_of(width):
    """The bits by which offsets in [0, width) are shifted to be bin numbers. width: int64, of one set or of several."""
    shift = (width * 0).to(tl.int32)
    for bits in tl.static_range(32 - SEARCH_BITS):
        shift += (width > (SEARCH_BINS << bits)).to(tl.int32)
    return shift


@triton.jit
def bounds(own, state, k, s, there):
    """LOW, HIGH, RANK, FALLBACK of sets s. The first round, RANK still being 0, judges the guess: where the
    threshold is outside the bracket, or its candidates too many for their place, all weights are candidates."""
    low, high = tl.load(state + LOW, mask=there, other=0), tl.load(state + HIGH, mask=there, other=0)
    rank, fallback = tl.load(state + RANK, mask=there, other=1), tl.load(state + FALLBACK, mask=there, other=0)
    wanted, above = tl.load(k + s, mask=there, other=0), tl.load(state + ABOVE, mask=there, other=0)
    found = tl.load(state + FOUND, mask=there, other=0)
    ties = tl.load(state + TIES, mask=there, other=0) + tl.load(state + TIES + 1, mask=there, other=0)
    first = rank == 0
    inside = wanted - above
    fits = (inside >= 1) & (inside <= found + ties) & (found <= tl.load(own + CAPACITY, mask=there, other=0))
    lost = first & (low < high) & (fits == 0)
    return (
        tl.where(lost, -1, low),
        tl.where(lost, NAN_KEY, high),
        tl.where(first, tl.where(lost, wanted, inside), rank),
        tl.where(lost, 1, fallback),
    )


@triton.jit
def is_open(state, low, high, there):
    """Whether a round changes anything: the first does of every set, since it judges the guess and reports."""
    return there & ((tl.load(state + RANK, mask=there, other=1) == 0) | (high - low > 1))


@triton.jit(do_not_specialize=["number"])
def count_kernel(
    rows, chunks, spans, candidates, sets, k, state, rho, inv_scale, histogram, thresholds, stats, number, num_sets,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr, GROUP: tl.constexpr, RECORDS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A round: a histogram of the keys in (LOW, HIGH] of each set, of its candidates or of all weights. The last program of a set to come
    here narrows it."""
    chunk, there, _row, s = group_of(rows, chunks, number, GROUP)
    there = there & (s < num_sets)
    own, own_state = sets + s * FIELDS, state + s * STATES
    low, high, _rank, fallback = bounds(own, own_state, k, s, there)
    there = is_open(own_state, low, high, there)
    if tl.max(there.to(tl.int32), 0) != 0:
        count_candidates(spans, candidates, histogram + s * SEARCH_BINS, low, high, there & (fallback == 0), GROUP, RECORDS)
        if tl.max((there & (fallback != 0)).to(tl.int32), 0) != 0:
            first = tl.program_id(0) * GROUP
            for one in range(first, tl.minimum(first + GROUP, number)):
                count_weights(
                    rows, chunks, one, sets, k, state, rho, inv_scale, histogram, num_sets, PERTURB, RHO_EACH, T, MASTERS, ALIGNED, BLOCK
                )
        tl.debug_barrier()  # what this program has counted comes before its ticket
        g = tl.arange(0, GROUP)
        same = (s[:, None] == s[None, :]) & (there.to(tl.int32)[None, :] != 0)
        leads = there & (tl.min(tl.where(same, g[None, :], GROUP), 1) == g)
        size = tl.load(chunks + chunk * 3 + 2, mask=there, other=0)
        passed = tl.sum(tl.where(same, size[None, :], 0), 1).to(tl.int64)
        tickets = tl.atomic_add(own_state + DONE, passed, mask=leads, sem="acq_rel")
        last = leads & (tickets + passed == tl.load(own + SET_NUMEL, mask=leads, other=0))
        while tl.max(last.to(tl.int32), 0) != 0:
            tl.debug_barrier()  # what the others have counted is seen by all threads
            counted = tl.min(tl.where(last, s, num_sets), 0)
            narrow(sets, k, state, histogram, thresholds, stats, counted)
            last = last & (s != counted)


@triton.jit
def count_candidates(spans, candidates, bins, low, high, there, GROUP: tl.constexpr, RECORDS: tl.constexpr):
    """bins: of each of the program's chunks."""
    shift, low, high = shift_of(high - low)[:, None], low.to(tl.int32)[:, None], high.to(tl.int32)[:, None]
    span = spans + (tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)) * 2
    first, count = tl.load(span, mask=there, other=0), tl.load(span + 1, mask=there, other=0).to(tl.int32)
    for at in range(0, tl.max(count, 0), RECORDS):
        j = at + tl.arange(0, RECORDS)[None, :]
        inside = j < count[:, None]
        key = tl.load(candidates + (first[:, None] + j), mask=inside, other=0) & 0x7FFFFFFF
        inside = inside & (key > low) & (key <= high)
        one = tl.full([GROUP, RECORDS], 1, bins.dtype.element_ty)
        tl.atomic_add(bins[:, None] + ((key - low - 1) >> shift), one, mask=inside, sem="relaxed")


@triton.jit
def count_weights(
    rows, chunks, index, sets, k, state, rho, inv_scale, histogram, num_sets,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr, T: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All weights of a chunk whose set has fallen back."""
    tensor, row, start, size = chunk_at(rows, chunks, tl.cast(index, tl.int64), BLOCK, ALIGNED)
    s = tl.load(row + PLACE)
    there = s < num_sets
    own_state = state + s * STATES
    low, high, _rank, fallback = bounds(sets + s * FIELDS, own_state, k, s, there)
    if is_open(own_state, low, high, there) & (fallback != 0):
        i, valid = elements_of(size, BLOCK)
        u = weight_at(row, start, i, valid, SAVED if PERTURB else PARAM, T, MASTERS, ALIGNED)
        if PERTURB:
            u = widen(uphill(u, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, None, T, ALIGNED))
        key = tl.reshape(magnitude_key(u), [BLOCK])
        below, last = low.to(tl.int32), high.to(tl.int32)
        inside = tl.reshape(valid, [BLOCK]) & (key > below) & (key <= last)
        count_bins(histogram + s * SEARCH_BINS, (key - below - 1) >> shift_of(high - low), inside, SEARCH_BINS)


@triton.jit(noinline=True)  # in place, its registers would add to those of `count_kernel`, which spills then
def narrow(sets, k, state, histogram, thresholds, stats, s):
    """A round for a set whose keys are counted: (LOW, HIGH] becomes the threshold's bin. After the last one HIGH is the threshold."""
    own, state, bins = sets + s * FIELDS, state + s * STATES, tl.arange(0, SEARCH_BINS)
    low, high, rank, fallback = bounds(own, state, k, s, True)
    above = tl.load(state + ABOVE)
    shift = shift_of(high - low)
    place = histogram + s * SEARCH_BINS + bins
    count = tl.load(place)
    tl.store(place, tl.zeros_like(count))
    for which in tl.static_range(2):
        tie = tl.load(state + TIE + which)
        counted = (fallback == 0) & (tie > low) & (tie <= high)
        tied = tl.where(counted, (tie - low - 1) >> shift, -1)
        count += tl.where(bins == tied, tl.load(state + TIES + which), 0)
    larger = tl.sum(count, 0) - tl.cumsum(count, 0)
    hit = (larger < rank) & (rank <= larger + count)
    above = tl.where(fallback == tl.load(state + FALLBACK), above, 0)
    low += tl.sum(tl.where(hit, bins, 0), 0).to(tl.int64) << shift
    high = tl.minimum(high, low + (tl.full([], 1, tl.int64) << shift))
    passed = tl.sum(tl.where(hit, larger, 0), 0)
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + RANK, tl.maximum(rank - passed, 1))
    tl.store(state + ABOVE, above + passed)
    tl.store(state + FALLBACK, fallback)
    tl.store(state + DONE, 0)
    tl.store(thresholds + s, high.to(tl.int32))
    tl.store(stats + s * 3, tl.where(high == NAN_KEY, 0, above + passed - tl.load(state + NANS)))
    tl.store(stats + s * 3 + 1, tl.load(state + FOUND))
    tl.store(stats + s * 3 + 2, fallback)
