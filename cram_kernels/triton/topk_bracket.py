"""Top-k, the guess: a stratified sample of single weights, and the keys between which the threshold lies, but for bad luck."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from .number import KEEP_ALL, NAN_KEY, magnitude_key, widen
from .perturb import rho_of, uphill, weight_at
from .table import NUMBER, PARAM, PLACE, chunk_of

DIRECT = 16384  # sets up to this size: every weight is a candidate
SAMPLE = 65536  # weights of a set, about, and at most an eighth
STRATA = 1024  # sample elements a program
DEVIATIONS = tl.constexpr(4.0)  # half width of the bracket: the guess fails about once in 16,000 steps
SAMPLE_BINS = tl.constexpr(1 << 14)  # by exponent and 6 bits of mantissa
BIN_SHIFT = tl.constexpr(17)
HALF_BIN = tl.constexpr(1 << 16)
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
FOUND = tl.constexpr(5)  # candidates, with a key in the first (LOW, HIGH]
RANK = tl.constexpr(6)  # of the threshold among the keys in (LOW, HIGH], the largest being 1
FALLBACK = tl.constexpr(7)
STATES = tl.constexpr(8)


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
    rows, chunks, sets, rho, inv_scale, histogram,
    PERTURB: tl.constexpr, RHO_EACH: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the keys of one weight a stratum, at a hashed place. A chunk is strata of one tensor."""
    tensor, row, first, size = chunk_of(rows, chunks, BLOCK, False)
    own = sets + tl.load(row + PLACE) * FIELDS
    stratum = tl.load(own + STRATUM)
    lane = tl.arange(0, BLOCK)
    begin = (first + lane) * stratum
    length = tl.maximum(tl.minimum(stratum, tl.load(row + NUMEL) - begin), 1)
    i = begin + scramble((first + lane + tensor * 0x10001).to(tl.uint32)).to(tl.int64) % length
    valid = lane < size
    w = weight_at(row, 0, i, valid, PARAM, T, MASTERS, False)
    if PERTURB:
        w = widen(uphill(w, row, 0, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, None, T, False))
    bin = magnitude_key(w) >> BIN_SHIFT
    tl.atomic_add(histogram + tl.load(own + SLOT) * SAMPLE_BINS + bin, 1, mask=valid, sem="relaxed")


@triton.jit
def bin_at(larger, position):
    """The bin of the sample at a position, the largest being 0; `larger`: of each bin, the samples in the bins above it."""
    return tl.sum((larger > position).to(tl.int32), 0).to(tl.int64)


@triton.jit
def bracket_kernel(sets, k, histogram, state, num_sets):
    """LOW, HIGH and CUT of each set. A threshold that no weight decides needs no candidates: LOW = HIGH."""
    s = tl.program_id(0).to(tl.int64)
    own, state = sets + s * FIELDS, state + s * STATES
    rank, numel = tl.load(k + s, mask=s < num_sets, other=1), tl.load(own + SET_NUMEL)
    low, high = tl.full([], KEEP_ALL, tl.int64), tl.full([], NAN_KEY, tl.int64)
    cut = low
    if tl.load(own + STRATUM) > 0:
        count = tl.load(histogram + tl.load(own + SLOT) * SAMPLE_BINS + tl.arange(0, SAMPLE_BINS))
        total = tl.sum(count, 0)
        larger = total - tl.cumsum(count, 0)
        share = rank.to(tl.float32) / numel.to(tl.float32)
        middle = share * total.to(tl.float32)
        width = DEVIATIONS * tl.sqrt(tl.maximum(middle * (1 - share), 0.0)) + 1
        upper, lower = tl.floor(middle - width).to(tl.int32) - 1, tl.ceil(middle + width).to(tl.int32)
        if upper >= 0:
            high = tl.minimum(high, ((bin_at(larger, upper) + 1) << BIN_SHIFT) - 1)
        if lower < total:
            low = (bin_at(larger, lower) << BIN_SHIFT) - 1
        guess = tl.minimum(tl.maximum(middle.to(tl.int32) - 1, 0), total - 1)
        cut = (bin_at(larger, guess) << BIN_SHIFT) + HALF_BIN
    none, all = rank < 1, rank > numel
    low = tl.where(none, NAN_KEY, tl.where(all, KEEP_ALL, low))
    high = tl.where(none, NAN_KEY, tl.where(all, KEEP_ALL, high))
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + CUT, tl.minimum(tl.maximum(cut, low), high))
