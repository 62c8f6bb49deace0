// The threshold of each set from its candidates: their first two digits are counted side by side; or the mark that the guess has failed.
#include "block.cuh"
#include "launch.h"
#include "topk.h"

namespace cram {
namespace cuda {
namespace {

// A candidate's key, counted from the low end of the bracket: [0, high - low).
__device__ __forceinline__ int32_t from_low(const SetState& state, int32_t key) { return key - state.low - 1; }

enum class Where { kSettled, kAmongCandidates, kAtLow, kElsewhere };

// Where the k-th largest key is; elsewhere: the guess has failed, as it has where candidates were left out.
__device__ __forceinline__ Where where(const SetState& state) {
  if (state.settled) return Where::kSettled;
  const int64_t rank = state.k - static_cast<int64_t>(state.above), candidates = static_cast<int64_t>(state.candidates);
  if (rank < 1 || (state.append && candidates > state.capacity)) return Where::kElsewhere;
  if (rank <= candidates) return Where::kAmongCandidates;
  return rank <= candidates + static_cast<int64_t>(state.at_low) ? Where::kAtLow : Where::kElsewhere;
}

// The last digit, of `bits` bits, of the candidates whose other digits are `upper`: few sets need it.
__device__ Ranked last_digit(SetState& state, const TopkMemory& memory, int32_t upper, int bits, int64_t rank) {
  for (int i = threadIdx.x; i < kDigitBins; i += kThreads) state.digits[i] = 0;
  __threadfence();
  __syncthreads();
  const int64_t candidates = static_cast<int64_t>(state.candidates);
  for (int64_t i = 0; i < candidates; i += kThreads) {
    const int32_t key = i + threadIdx.x < candidates ? from_low(state, memory.keys[state.first + i + threadIdx.x]) : -1;
    tally(state.digits, key & ((1 << bits) - 1), key >= 0 && key >> bits == upper);
  }
  __threadfence();
  __syncthreads();
  return find_rank<kDigitBins>(state.digits, rank);
}

__global__ void __launch_bounds__(kThreads, kSelectBlocks) select_kernel(const __grid_constant__ SetTable table, const TopkMemory memory) {
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    SetState& state = memory.sets[table.entries[found.entry].index];
    const Where place = where(state);
    if (place != Where::kAmongCandidates || !state.append) {
      if (found.number > 0 || threadIdx.x > 0) continue;
      switch (place) {
        case Where::kSettled:
          state.larger = state.threshold == kKeepAll ? state.numel : 0;
          break;
        case Where::kAmongCandidates:  // which all have the same key
          state.threshold = state.high;
          state.larger = static_cast<int64_t>(state.above);
          break;
        case Where::kAtLow:
          state.threshold = state.low;
          state.larger = static_cast<int64_t>(state.above + state.candidates);
          break;
        case Where::kElsewhere:
          state.fallback = true;
          memory.progress->any_fallback = 1;
      }
      continue;
    }
    const int64_t begin = found.number * kSliceSize, end = min(begin + kSliceSize, static_cast<int64_t>(state.candidates));
    int32_t keys[kSelectAhead];
#pragma unroll
    for (int j = 0; j < kSelectAhead; ++j) {
      const int64_t i = begin + j * kThreads + threadIdx.x;
      keys[j] = i < end ? memory.keys[state.first + i] : kKeepAll;
    }
    const Ranked first = find_rank<kDigitBins>(state.digits, state.k - static_cast<int64_t>(state.above));
    const int shift = state.shift, second_shift = max(shift - 11, 0);
    uint32_t* const digits = state.digits;
#pragma unroll
    for (int j = 0; j < kSelectAhead; ++j) {
      const int32_t key = from_low(state, keys[j]);
      tally(digits + kDigitBins, (key & ((1 << shift) - 1)) >> second_shift, keys[j] != kKeepAll && key >> shift == first.bin);
    }
    if (!is_last(&state.slices_done, 1, static_cast<uint32_t>(state.slices))) continue;
    const Ranked second = find_rank<kDigitBins>(digits + kDigitBins, first.rank);
    int32_t key = (first.bin << (shift - second_shift)) + second.bin;
    int64_t rank = second.rank;
    if (second_shift > 0) {
      const Ranked third = last_digit(state, memory, key, second_shift, rank);
      key = (key << second_shift) + third.bin;
      rank = third.rank;
    }
    if (threadIdx.x > 0) continue;
    state.threshold = state.low + 1 + key;
    state.larger = state.k - rank;
  }
}

}  // namespace

void topk_select(const TopkPlan& plan, const TopkMemory& memory, Stream stream) {
  for (const SetTable& table : plan.slices) launch("top-k, select", select_kernel, tasks_in(table), stream, table, memory);
}

}  // namespace cuda
}  // namespace cram
