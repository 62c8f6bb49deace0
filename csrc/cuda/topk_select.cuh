// The threshold of each set from its candidates, of which up to three digits are counted; or the mark that the guess has failed.
#pragma once

#include "block.cuh"
#include "topk.h"

namespace cram {
namespace cuda {

enum class Where { kSettled, kAmongCandidates, kAtLow, kElsewhere };

// Where the k-th largest key is; elsewhere: the guess has failed, as it has where candidates were left out.
static __device__ __forceinline__ Where where(const SetState& state) {
  const int64_t rank = state.k - static_cast<int64_t>(state.above), candidates = static_cast<int64_t>(state.candidates);
  const bool left_out = writes_candidates(state.guess) && candidates > state.capacity;
  const bool at_low = rank <= candidates + static_cast<int64_t>(state.at_low);
  if (state.settled) return Where::kSettled;
  if (rank < 1 || left_out) return Where::kElsewhere;
  if (rank <= candidates) return Where::kAmongCandidates;
  return at_low ? Where::kAtLow : Where::kElsewhere;
}

static __device__ __forceinline__ bool has_failed(const SetState& state) { return where(state) == Where::kElsewhere; }

// The threshold of a set whose guess held, when it is known. A block that waits has no claim.
static __device__ __forceinline__ int32_t wait_for_threshold(const SetState& state) {
  int32_t threshold;
  while ((threshold = seen(state.threshold)) == kUnknown) {
  }
  return threshold;
}

struct Results {
  int32_t* thresholds;  // [num_sets]
  int64_t* stats;       // [num_sets, 3]; optional: topk_threshold reports none

  // larger: keys above the threshold. By one thread.
  __device__ __forceinline__ void write(const SetState& state, int64_t set, int32_t threshold, int64_t larger, bool fallback) const {
    thresholds[set] = threshold;
    if (stats == nullptr) return;
    stats[3 * set] = threshold == kNanKey ? 0 : larger - static_cast<int64_t>(state.nans);
    stats[3 * set + 1] = static_cast<int64_t>(state.candidates);
    stats[3 * set + 2] = fallback;
  }
};

constexpr uint32_t kNoCandidate = 0xffffffffu;

// A candidate's key, counted from the low end of the bracket: [0, high - low).
static __device__ __forceinline__ int32_t from_low(const SetState& state, uint32_t candidate) {
  return key_of(candidate, packs(state.key_step)) - state.guess.low - 1;
}

// The last digit, of `bits` bits, of the candidates whose other digits are `upper`: few sets need it.
static __device__ __forceinline__ Ranked last_digit(SetState& state, const TopkMemory& memory, int32_t upper, int bits, int64_t rank) {
  for (int i = threadIdx.x; i < kDigitBins; i += kThreads) state.digits[i] = 0;
  __threadfence();
  __syncthreads();
  const int64_t candidates = static_cast<int64_t>(state.candidates);
  for (int64_t i = 0; i < candidates; i += kThreads) {
    const int32_t key = i + threadIdx.x < candidates ? from_low(state, memory.candidates[state.first + i + threadIdx.x]) : -1;
    tally(state.digits, key & ((1 << bits) - 1), key >= 0 && key >> bits == upper);
  }
  __threadfence();
  __syncthreads();
  return find_rank<kDigitBins>(state.digits, rank);
}

// Whether no two keys of the set have the same digits above the last `below` bits.
static __device__ __forceinline__ bool tells_apart(const SetState& state, int below) { return 1 << below <= state.key_step; }

// Whether slice 0 alone finds the threshold, from what `stream` has counted.
static __device__ __forceinline__ bool needs_no_candidates(const SetState& state) { return tells_apart(state, first_shift(state.guess)); }

// Looks at a slice of a set's candidates, where that is needed; the block that looks at the last one finds the threshold, which is returned; else
// kUnknown. All threads of a block.
static __device__ __forceinline__ int32_t select(const TopkMemory& memory, uint32_t slice, const Results& results) {
  const int32_t set = last_at_most(memory.num_sets, slice, [&](int32_t s) { return memory.sets[s].slices_before; });
  SetState& state = memory.sets[set];
  const uint32_t number = slice - state.slices_before;
  const auto found = [&](int32_t threshold, int64_t larger) {
    if (threadIdx.x == 0) {
      atomicExch(&state.threshold, threshold);
      results.write(state, set, threshold, larger, false);
    }
    return threshold;
  };
  const int64_t above = static_cast<int64_t>(state.above), candidates = static_cast<int64_t>(state.candidates);
  const Where place = where(state);
  if (place != Where::kAmongCandidates || !writes_candidates(state.guess)) {
    if (number > 0 || place == Where::kElsewhere) return kUnknown;
    if (place == Where::kSettled) return found(state.guess.low, state.guess.low == kKeepAll ? state.numel : 0);
    if (place == Where::kAmongCandidates) return found(state.guess.high, above);  // which all have the same key
    return found(state.guess.low, above + candidates);
  }
  const int shift = first_shift(state.guess), second_shift = max(shift - 11, 0);
  const bool one_digit = needs_no_candidates(state);
  if (one_digit && number > 0) return kUnknown;
  const uint32_t* const listed = memory.candidates + state.first;
  uint32_t own[kSelectAhead];
#pragma unroll
  for (int j = 0; j < kSelectAhead; ++j) {
    const int64_t i = number * kSliceSize + j * kThreads + threadIdx.x;
    own[j] = i < candidates && !one_digit ? listed[i] : kNoCandidate;
  }
  Ranked digit = find_rank<kDigitBins>(state.digits, state.k - above);
  int32_t key = digit.bin;
  int below = shift;  // bits that are not known
  if (!one_digit) {
#pragma unroll
    for (int j = 0; j < kSelectAhead; ++j) {
      const int32_t place = from_low(state, own[j]);
      tally(state.digits + kDigitBins, (place & ((1 << shift) - 1)) >> second_shift, own[j] != kNoCandidate && place >> shift == key);
    }
    if (!is_last(&state.slices_done, 1, max(1u, slices_of(state.capacity)))) return kUnknown;
    digit = find_rank<kDigitBins>(state.digits + kDigitBins, digit.rank);
    key = (key << (shift - second_shift)) + digit.bin;
    below = second_shift;
    if (!tells_apart(state, below)) {
      digit = last_digit(state, memory, key, below, digit.rank);
      key = (key << below) + digit.bin;
      below = 0;
    }
  }
  // The one key that has these digits.
  return found((state.guess.low + (key << below) + state.key_step) & -state.key_step, state.k - digit.rank);
}

}  // namespace cuda
}  // namespace cram
