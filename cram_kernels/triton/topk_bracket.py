"""Top-k, the guess: a stratified sample of single weights, and the keys between which the threshold lies, but for bad luck."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from .number import KEEP_ALL, NAN_KEY, magnitude_key, widen
from .perturb import rho_of, uphill, weight_at
from .table import NUMBER, PARAM, PLACE, chunk_of, only

DIRECT = 16384  # sets up to this size: every weight is a candidate
SAMPLE = 65536  # weights of a set, about, and at most an eighth
STRATA = 1024  # sample elements a program
DEVIATIONS = tl.constexpr(4.0)  # half width of the bracket: the guess fails about once in 16,000 steps
SAMPLE_BINS = tl.constexpr(1 << 14)  # by exponent and 6 bits of mantissa
BIN_SHIFT = tl.constexpr(17)
HALF_BIN = tl.constexpr(1 << 16)
DRAWN = tl.constexpr(1024)  # keys of the sample that are kept, to find one that many weights share
TIED = tl.constexpr(32)  # shared by one weight in so many: more than candidates have room for would be twice as many
NUMEL = NUMBER  # of the tensor

# What is known of a set beforehand, int64.
SET_NUMEL = tl.constexpr(0)
STRATUM = tl.constexpr(1)  # weights, of which one is looked at; 0: no sample
SLOT = tl.constexpr(2)  # its histogram of samples
BASE = tl.constexpr(3)  # its first place among the candidates
CAPACITY = tl.constexpr(4)  # and the number of places
FIELDS = tl.constexpr(5)

# What is found out about a set, int64, 0 at the start.
LOW = tl.constexpr(0)  # the threshold's key is in (LOW, HIGH], in the end HIGH
HIGH = tl.constexpr(1)
CUT = tl.constexpr(2)  # the guess that weights are pruned on
ABOVE = tl.constexpr(3)  # weights with a key above HIGH
NANS = tl.constexpr(4)
FOUND = tl.constexpr(5)  # candidates, with a key in the first (LOW, HIGH] that is no TIE
RANK = tl.constexpr(6)  # of the threshold among the keys in (LOW, HIGH], the largest being 1; 0: nobody has looked yet
FALLBACK = tl.constexpr(7)
TIE = tl.constexpr(8)  # and the one behind it: keys in (LOW, HIGH] that many weights share; these are counted, not written down
TIES = tl.constexpr(10)  # and the one behind it: weights with such a key
DONE = tl.constexpr(12)  # weights whose keys are counted in this round
STATES = tl.constexpr(14)


class Sets(NamedTuple):
    """The selection sets of a call. One more, the last, holds the tensors that are in none; its k is larger than its size."""

    fields: tuple[int, ...]  # [sets + 1, FIELDS]
    strata: tuple[int, ...]  # of each tensor: sample elements
    slots: int
    candidates: int


@functools.lru_cache(maxsize=64)
def make_sets(sizes: tuple[int, ...], sets: tuple[int, ...], num_sets: int) -> Sets:
    numels = [0] * (num_sets + 1)
    for size, s in zip(sizes, sets, strict=True):
        if s >= 0:
            numels[s] += size
    fields, slots, base = [], 0, 0
    for numel in numels:
        direct = numel <= DIRECT
        stratum = 0 if direct else max(8, -(-numel // SAMPLE))
        capacity = numel if direct else numel // 16
        fields += [numel, stratum, slots, base, capacity]
        slots += not direct
        base += capacity
    strata = tuple(
        samples(size, fields[s * FIELDS.value + STRATUM.value], i) if s >= 0 else 0
        for i, (size, s) in enumerate(zip(sizes, sets, strict=True))
    )
    return Sets(tuple(fields), strata, slots, base)


def samples(size: int, stratum: int, i: int) -> int:
    """Strata of tensor i that are looked at. A last one that is shorter is, with the probability of its share, by a hash of i."""
    if stratum == 0:
        return 0
    chance = (i * 0x9E3779B1 % 2**32) / 2**32
    return size // stratum + (chance < size % stratum / stratum)


@triton.jit
def scramble(x):
    """A hash of uint32 (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def sample_kernel(
    rows, chunks, sets, rho, inv_scale, histogram, drawn,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the keys of one weight a stratum, at a hashed place, and draw some of them. A chunk is strata of one tensor."""
    tensor, row, first, size = chunk_of(rows, chunks, BLOCK, False)
    own = sets + tl.load(row + PLACE) * FIELDS
    stratum = tl.load(own + STRATUM)
    lane = tl.arange(0, BLOCK)
    begin = (first + lane) * stratum
    length = tl.maximum(tl.minimum(stratum, tl.load(row + NUMEL) - begin), 1)
    hash = scramble((first + lane + tensor * 0x10001).to(tl.uint32))
    i = begin + hash.to(tl.int64) % length
    valid = lane < size
    w = weight_at(row, 0, i, valid, PARAM, T, MASTERS, False)
    if PERTURB:
        w = widen(uphill(w, row, 0, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, None, T, False))
    key, slot = magnitude_key(w), tl.load(own + SLOT)
    tl.atomic_add(histogram + slot * SAMPLE_BINS + (key >> BIN_SHIFT), 1, mask=valid, sem="relaxed")
    lot = scramble(hash + 1)  # of the keys that come to a place the highest lot stays, in whatever order
    place = drawn + slot * DRAWN + (lot % DRAWN).to(tl.int64)
    tl.atomic_max(place, ((lot // DRAWN).to(tl.int64) << 32) + key + 1, mask=valid, sem="relaxed")


@triton.jit
def bin_at(larger, position):
    """The bin of the sample at a position, the largest being 0; `larger`: of each bin, the samples in the bins above it."""
    return tl.sum((larger > position).to(tl.int32), 0).to(tl.int64)


@triton.jit
def tied_in(drawn, bin):
    """The key of a bin that many weights share, of most of its keys that were drawn (-1: none); KEEP_ALL if there is none."""
    inside, bits = (drawn >> BIN_SHIFT) == bin, tl.arange(0, 32)
    ones = tl.sum(tl.where(inside[:, None], (drawn[:, None] >> bits[None, :]) & 1, 0), 0)
    key = tl.sum(tl.where(ones * 2 > tl.sum(inside.to(tl.int32), 0), 1 << bits, 0), 0)
    share = tl.sum((inside & (drawn == key)).to(tl.int32), 0) * TIED
    return tl.where(share >= tl.sum((drawn >= 0).to(tl.int32), 0), key, KEEP_ALL).to(tl.int64)


@triton.jit
def bracket_kernel(sets, k, histogram, drawn, state, thresholds, stats, num_sets):
    """LOW, HIGH, CUT and TIE of each set. A threshold that no weight decides needs no candidates: LOW = HIGH."""
    s = tl.program_id(0).to(tl.int64)
    own, state = sets + s * FIELDS, state + s * STATES
    rank, numel = tl.load(k + s, mask=s < num_sets, other=1), tl.load(own + SET_NUMEL)
    low, high = tl.full([], KEEP_ALL, tl.int64), tl.full([], NAN_KEY, tl.int64)
    cut, tie, other_tie = low, low, low
    if tl.load(own + STRATUM) > 0:
        slot = tl.load(own + SLOT)
        count = tl.load(histogram + slot * SAMPLE_BINS + tl.arange(0, SAMPLE_BINS))
        total = tl.sum(count, 0)
        larger = total - tl.cumsum(count, 0)
        share = rank.to(tl.float32) / numel.to(tl.float32)
        middle = share * total.to(tl.float32)
        width = DEVIATIONS * tl.sqrt(tl.maximum(middle * (1 - share), 0.0)) + 1
        upper, lower = tl.floor(middle - width).to(tl.int32) - 1, tl.ceil(middle + width).to(tl.int32)
        guess = tl.minimum(tl.maximum(middle.to(tl.int32) - 1, 0), total - 1)
        upper_bin, lower_bin = bin_at(larger, tl.maximum(upper, 0)), bin_at(larger, tl.minimum(lower, total - 1))
        bin = bin_at(larger, guess)
        keys = (tl.load(drawn + slot * DRAWN + tl.arange(0, DRAWN)) & 0xFFFFFFFF).to(tl.int32) - 1
        # A key between the ends is shared by fewer weights than lie between them, which are not many.
        tie, other_tie = tied_in(keys, upper_bin), tied_in(keys, lower_bin)
        tied = tl.where(bin == upper_bin, tie, tl.where(bin == lower_bin, other_tie, KEEP_ALL))
        cut = tl.where(tied >= 0, tied, (bin << BIN_SHIFT) + HALF_BIN)
        other_tie = tl.where(other_tie == tie, KEEP_ALL, other_tie)
        if upper >= 0:
            high = tl.minimum(high, ((upper_bin + 1) << BIN_SHIFT) - 1)
        if lower < total:
            low = (lower_bin << BIN_SHIFT) - 1
    none, all = rank < 1, rank > numel
    low = tl.where(none, NAN_KEY, tl.where(all, KEEP_ALL, low))
    high = tl.where(none, NAN_KEY, tl.where(all, KEEP_ALL, high))
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + CUT, tl.minimum(tl.maximum(cut, low), high))
    tl.store(state + TIE, tl.where(low < high, tie, KEEP_ALL))  # KEEP_ALL: none
    tl.store(state + TIE + 1, tl.where(low < high, other_tie, KEEP_ALL))
    real = s < num_sets  # what is reported where the set has no weights
    tl.store(thresholds + s, high.to(tl.int32), mask=real)
    tl.store(stats + s * 3 + tl.arange(0, 4), tl.zeros([4], tl.int64), mask=only(tl.arange(0, 4) < 3, real))
