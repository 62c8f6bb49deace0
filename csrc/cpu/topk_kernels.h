// The passes of a top-k. Included by kernels_impl.h.
#pragma once

#include "batch.h"
#include "blocks.h"

namespace cram {
namespace CRAM_ISA {

// Writes the weights in `lanes` down as candidates; bits(lane): of u, in its own type. Two at least are written, whatever the lanes: with a
// per cent or two of candidates that is nearly always all of them, and no branch is guessed wrong.
template <class U>
CRAM_INLINE int64_t append(Candidates found, int64_t count, uint64_t lanes, int64_t offset, U bits) {
  const int64_t end = count + __builtin_popcountll(lanes);
  const auto take = [&]() CRAM_INLINE_LAMBDA {
    const int lane = __builtin_ctzll(lanes | (lanes == 0));
    found.bits[count] = static_cast<int32_t>(bits(lane));
    found.offsets[count++] = static_cast<uint16_t>(offset + lane);
    lanes &= lanes - 1;
  };
  take();
  take();
  while (count < end) take();
  return end;
}

CRAM_INLINE uint32_t float_bits(int32_t bits, float) { return bits; }
template <class T>
CRAM_INLINE uint32_t float_bits(int32_t bits, T) {
  return to_bits(cram::widen(T{static_cast<uint16_t>(bits)}));
}

template <class T, class W>
CRAM_INLINE void topk_stream_as(const Source& source, int64_t begin, int64_t end, const Bracket& bracket, void* out, void* saved, uint8_t* mask,
                                Candidates found, Counts& counts) {
  const I low(bracket.low), high(bracket.high), tie_low(bracket.tie_low), tie_high(bracket.tie_high), cut(bracket.cut), largest(kInfKey);
  const bool append_them = bracket.append, has_ties = bracket.has_ties();
  int64_t above = 0, at_high = 0, candidates = 0, at_low = 0, nans = 0;
  Uphill<T, W> source_u(source);
  const auto note = [&](uint64_t candidate, int64_t first, auto bits) CRAM_INLINE_LAMBDA {
    candidates = append_them ? append(found, candidates, candidate, first - begin, bits) : candidates + __builtin_popcountll(candidate);
  };
  const auto block = [&](int64_t i, auto lanes, F u) CRAM_INLINE_LAMBDA {
    const I key = magnitude_key(u);
    const Bits real = lanes_below(lanes);
    const Bits nan = greater_bits(key, largest) & real;  // beyond the end, 0 * an infinite rho is one
    const Bits over = greater_bits(key, high) & real, over_tie_high = greater_bits(key, tie_high) & real;
    const Bits over_tie_low = greater_bits(key, tie_low) & real, over_low = greater_bits(key, low) & real;
    const Bits kept = greater_bits(key, cut) & ~nan & real;
    above += __builtin_popcount(over);
    at_high += __builtin_popcount(over_tie_high & ~over);
    at_low += __builtin_popcount(over_low & ~over_tie_low);
    nans += __builtin_popcount(nan);
    note(over_tie_low & ~over_tie_high, i, [&](int lane) CRAM_INLINE_LAMBDA { return source_u.one(i + lane); });
    if (out != nullptr) {
      write<T>(source, i, lanes, u, kept | nan, out, saved);
      if (mask != nullptr) store_bits(mask, i, kept, lanes);
    }
  };
  const auto batch_low = broadcast_key<T>(bracket.low), batch_high = broadcast_key<T>(bracket.high), batch_cut = broadcast_key<T>(bracket.cut);
  const auto batch_tie_low = broadcast_key<T>(bracket.tie_low), batch_tie_high = broadcast_key<T>(bracket.tie_high);
  int64_t i = begin;
  for (; i + kBatch <= end; i += kBatch) {
    Batch<T> u;
    if (__builtin_expect(!source_u.batch(i, u), 0)) {
      for_u<T, W>(source, i, i + kBatch, &counts.nonfinite, block);
      continue;
    }
    const Batch<T> keys = keys_of(u);
    const uint64_t over = greater_bits<T>(keys, batch_high);
    above += __builtin_popcountll(over);
    uint64_t over_tie_high = over, over_tie_low = greater_bits<T>(keys, batch_tie_low);
    if (__builtin_expect(has_ties, 0)) {
      over_tie_high = greater_bits<T>(keys, batch_tie_high);
      at_high += __builtin_popcountll(over_tie_high & ~over);
      at_low += __builtin_popcountll(greater_bits<T>(keys, batch_low) & ~over_tie_low);
    }
    const uint64_t candidate = over_tie_low & ~over_tie_high;
    if constexpr (sizeof(T) == 2) {
      uint16_t bits[kBatch];
      memcpy(bits, &u, sizeof bits);
      note(candidate, i, [&](int lane) CRAM_INLINE_LAMBDA { return bits[lane]; });
    } else {
      note(candidate, i, [&](int lane) CRAM_INLINE_LAMBDA { return source_u.one(i + lane); });
    }
    if (out != nullptr) {
      const uint64_t kept = greater_bits<T>(keys, batch_cut);
      write(source, static_cast<T*>(out) + i, saved == nullptr ? nullptr : static_cast<T*>(saved) + i, u, kept);
      if (mask != nullptr) store_bits64(mask, i, kept);
    }
  }
  for_u<T, W>(source, i, end, &counts.nonfinite, block);
  if (sizeof(T) == 2 && append_them)
    for (int64_t j = 0; j < candidates; ++j) found.bits[j] = static_cast<int32_t>(float_bits(found.bits[j], T{}));
  if (source_u.nonfinite()) counts.nonfinite = true;
  counts.above += above;
  counts.at_high += at_high;
  counts.at_low += at_low;
  counts.candidates += candidates;
  counts.nans += nans;
}

static void topk_stream(Source source, DType dtype, int64_t begin, int64_t end, const Bracket& bracket, void* out, void* saved, uint8_t* mask,
                        Candidates found, Counts& counts) {
  with_types(dtype, source.master, [&](auto t, auto w) CRAM_INLINE_LAMBDA {
    topk_stream_as<decltype(t), decltype(w)>(source, begin, end, bracket, out, saved, mask, found, counts);
  });
}

static int64_t topk_apply(Source source, DType dtype, int64_t begin, int64_t end, int32_t threshold, void* out, uint8_t* mask) {
  const I cut(threshold), largest(kInfKey);
  int64_t total = 0;
  with_u(source, dtype, begin, end, nullptr, [&](auto t, int64_t i, auto lanes, F u) CRAM_INLINE_LAMBDA {
    const I key = magnitude_key(u);
    const Bits nan = greater_bits(key, largest);
    const Bits kept = greater_bits(key, cut) & ~nan & lanes_below(lanes);
    total += __builtin_popcount(kept);
    write<decltype(t)>(source, i, lanes, u, kept | nan, out, nullptr);
    if (mask != nullptr) store_bits(mask, i, kept, lanes);
  });
  return total;
}

// Data of few values would add one to the same bin again and again, each addition waiting for the one before: the two commonest digits of a
// block, as a rule, are counted whole.
static void topk_histogram(Source source, DType dtype, int64_t begin, int64_t end, int shift, int num_bins, int prefix_shift, int32_t prefix,
                           int64_t* bins) {
  with_u(source, dtype, begin, end, nullptr, [&](auto, int64_t, auto lanes, F u) CRAM_INLINE_LAMBDA {
    const I key = magnitude_key(u), digit = both(shifted(key, shift), I(num_bins - 1));
    int32_t digits[kBlock];
    store(digits, digit);
    Bits left = equal_bits(shifted(key, prefix_shift), I(prefix)) & lanes_below(lanes);
    for (int turn = 0; turn < 2 && left != 0; ++turn) {
      const int32_t common = digits[__builtin_ctz(left)];
      const Bits same = equal_bits(digit, I(common)) & left;
      bins[common] += __builtin_popcount(same);
      left &= ~same;
    }
    for (; left != 0; left &= left - 1) ++bins[digits[__builtin_ctz(left)]];
  });
}

}  // namespace CRAM_ISA
}  // namespace cram
