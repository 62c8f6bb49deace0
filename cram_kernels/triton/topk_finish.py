"""Top-k, the last pass: what the guess got wrong is set right, and weights are pruned by a threshold that is known."""

import triton
import triton.language as tl

from .number import NAN_KEY, magnitude_key, rounded, widen
from .perturb import rho_of, uphill, weight_at
from .table import MASK, PARAM, PLACE, SAVED, chunk_at, chunk_of, column, elements_of, group_of, store_bits
from .topk_bracket import CUT, FALLBACK, HIGH, STATES, TIE


@triton.jit
def store_pruned(row, start, i, valid, u, key, threshold, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Store u, stored numbers with these keys, where the key is larger than the threshold or of a NaN, else +0; returns where."""
    stays = key > tl.minimum(threshold, NAN_KEY - 1)
    tl.store(column(row, PARAM, start, T, ALIGNED) + i, tl.where(stays, u, 0).to(T), mask=valid)
    return stays


@triton.jit
def prune(row, start, size, i, valid, u, threshold, T: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Weights u, stored numbers, and the mask bits."""
    key = magnitude_key(widen(u))
    stays = store_pruned(row, start, i, valid, u, key, threshold, T, ALIGNED)
    store_bits(row, start, size, valid & stays & (key < NAN_KEY), BLOCK)


@triton.jit
def prune_kernel(
    rows, chunks, state,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Prune the weights as they are by the threshold."""
    _tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    u = tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=valid, other=0)
    threshold = tl.load(state + tl.load(row + PLACE) * STATES + HIGH).to(tl.int32)
    prune(row, start, size, i, valid, u, threshold, T, ALIGNED, BLOCK)


@triton.jit(do_not_specialize=["number"])
def finish_kernel(
    rows, chunks, spans, candidates, places, state, rho, inv_scale, number,
    RHO_EACH: tl.constexpr, GROUP: tl.constexpr, RECORDS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the candidates right that the guess got wrong; where it got others wrong, too, prune the whole chunk once more."""
    chunk, there, row, s = group_of(rows, chunks, number, GROUP)
    own = state + s * STATES
    anew = there & is_wrong(own, there)
    threshold, cut = tl.load(own + HIGH, mask=there, other=0).to(tl.int32), tl.load(own + CUT, mask=there, other=0).to(tl.int32)
    span = spans + chunk * 2
    fixed = there & (anew.to(tl.int32) == 0) & (threshold != cut)
    first, count = tl.load(span, mask=fixed, other=0)[:, None], tl.load(span + 1, mask=fixed, other=0).to(tl.int32)
    start = tl.load(chunks + chunk * 3 + 1, mask=there, other=0).to(tl.int64) * BLOCK
    param = tl.load(row + PARAM, mask=there, other=0).to(tl.pointer_type(T)) + start
    address = tl.load(row + MASK, mask=there, other=0)
    mask = address.to(tl.pointer_type(tl.uint8)) + start // 8
    for at in range(0, tl.max(count, 0), RECORDS):
        j = at + tl.arange(0, RECORDS)[None, :]
        inside = j < count[:, None]
        fix_up(
            param[:, None], mask[:, None], inside, inside & (address != 0)[:, None], candidates + (first + j), places + (first + j),
            j, count[:, None], threshold[:, None], cut[:, None], T,
        )  # fmt: skip
    if tl.max(anew.to(tl.int32), 0) != 0:
        begin = tl.program_id(0) * GROUP
        for one in range(begin, tl.minimum(begin + GROUP, number)):
            prune_anew(rows, chunks, one, state, rho, inv_scale, RHO_EACH, T, MASTERS, ALIGNED, BLOCK)


@triton.jit
def is_wrong(state, there):
    """Whether the guess was wrong about more weights of a set than the candidates that are written down."""
    threshold, cut = tl.load(state + HIGH, mask=there, other=0), tl.load(state + CUT, mask=there, other=0)
    wrong = tl.load(state + FALLBACK, mask=there, other=0) != 0
    for which in tl.static_range(2):
        tie = tl.load(state + TIE + which, mask=there, other=0)
        wrong = wrong | ((tie >= 0) & ((tie > threshold) != (tie > cut)))
    return wrong


@triton.jit
def fix_up(param, mask, there, masked, candidates, places, j, count, threshold, cut, T: tl.constexpr):
    """Candidates of several chunks, of each in the order of their places. The first in a mask byte turns over the bits of all in it."""
    bits, i = tl.load(candidates, mask=there, other=0), tl.load(places, mask=there, other=0).to(tl.int32)
    key = bits & 0x7FFFFFFF
    stays, wrong = key > threshold, there & is_between(key, threshold, cut)
    tl.store(param + i, tl.where(stays, rounded(bits.to(tl.float32, bitcast=True), T), 0).to(T), mask=wrong)

    before = tl.load(places - 1, mask=there & (j > 0), other=-8).to(tl.int32)
    leads = masked & (before >> 3 != i >> 3)
    turned = tl.where(wrong, 1 << (i & 7), 0)
    ahead = 1
    going = leads & (j + ahead < count)
    while tl.max(tl.max(going.to(tl.int32), 1), 0) != 0:
        other = tl.load(places + ahead, mask=going, other=-8).to(tl.int32)
        going = going & (other >> 3 == i >> 3)
        key = tl.load(candidates + ahead, mask=going, other=0) & 0x7FFFFFFF
        turned |= tl.where(going & is_between(key, threshold, cut), 1 << (other & 7), 0)
        ahead += 1
        going = going & (j + ahead < count)
    leads = leads & (turned != 0)
    kept = tl.load(mask + (i >> 3), mask=leads, other=0).to(tl.int32)
    tl.store(mask + (i >> 3), (kept ^ turned).to(tl.uint8), mask=leads)


@triton.jit
def is_between(key, threshold, cut):
    """Whether pruning at one key and at the other differ."""
    return ((key > threshold) != (key > cut)) & (key < NAN_KEY)


@triton.jit
def prune_anew(
    rows, chunks, index, state, rho, inv_scale,
    RHO_EACH: tl.constexpr, T: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of a set that the guess was wrong about."""
    tensor, row, start, size = chunk_at(rows, chunks, tl.cast(index, tl.int64), BLOCK, ALIGNED)
    state = state + tl.load(row + PLACE) * STATES
    if is_wrong(state, True):
        i, valid = elements_of(size, BLOCK)
        w = weight_at(row, start, i, valid, SAVED, T, MASTERS, ALIGNED)
        u = uphill(w, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, None, T, ALIGNED)
        prune(row, start, size, i, valid, u, tl.load(state + HIGH).to(tl.int32), T, ALIGNED, BLOCK)
