// The threshold of each set from its candidates: their first two digits are counted side by side; or the mark that the guess has failed.
#include "block.cuh"
#include "launch.h"
#include "topk.h"

namespace cram {
namespace cuda {
namespace {

// Candidate i of a set without what all candidates have in common: [0, high - low).
__device__ __forceinline__ int32_t candidate(const SetState& state, const TopkMemory& memory, int64_t i) {
  return memory.keys[state.first + i] - state.low - 1;
}

// Whether the rank lies among the candidates, and all of them are there.
__device__ __forceinline__ bool guess_holds(const SetState& state) {
  const int64_t rank = state.k - static_cast<int64_t>(state.above), candidates = static_cast<int64_t>(state.candidates);
  return rank >= 1 && rank <= candidates && (!state.append || candidates <= state.capacity);
}

// The last digit, of `bits` bits, of the candidates whose other digits are `upper`: few sets need it.
__device__ Ranked last_digit(SetState& state, const TopkMemory& memory, int32_t upper, int bits, int64_t rank) {
  for (int i = threadIdx.x; i < kDigitBins; i += kThreads) state.digits[i] = 0;
  __threadfence();
  __syncthreads();
  const int64_t candidates = static_cast<int64_t>(state.candidates);
  for (int64_t i = 0; i < candidates; i += kThreads) {
    const int32_t key = i + threadIdx.x < candidates ? candidate(state, memory, i + threadIdx.x) : -1;
    tally(state.digits, key & ((1 << bits) - 1), key >= 0 && key >> bits == upper);
  }
  __threadfence();
  __syncthreads();
  return find_rank<kDigitBins>(state.digits, rank);
}

__global__ void __launch_bounds__(kThreads, 4) select_kernel(const __grid_constant__ SetTable table, const TopkMemory memory) {
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    SetState& state = memory.sets[table.entries[found.entry].index];
    const bool settled = state.settled, holds = !settled && guess_holds(state);
    if (!holds || !state.append) {
      if (found.number > 0 || threadIdx.x > 0) continue;
      if (settled) {
        state.larger = state.threshold == kKeepAll ? state.numel : 0;
      } else if (holds) {
        state.threshold = state.high;
        state.larger = static_cast<int64_t>(state.above);
      } else {
        state.fallback = true;
        *memory.any_fallback = 1;
      }
      continue;
    }
    const Ranked first = find_rank<kDigitBins>(state.digits, state.k - static_cast<int64_t>(state.above));
    const int second_shift = max(state.shift - 11, 0);
    const int64_t begin = found.number * kSliceSize, end = min(begin + kSliceSize, static_cast<int64_t>(state.candidates));
    for (int64_t i = begin; i < end; i += kThreads) {
      const int32_t key = i + threadIdx.x < end ? candidate(state, memory, i + threadIdx.x) : -1;
      const bool in_bin = key >= 0 && key >> state.shift == first.bin;
      tally(state.digits + kDigitBins, (key & ((1 << state.shift) - 1)) >> second_shift, in_bin);
    }
    if (!is_last(&state.slices_done, 1, static_cast<uint32_t>(state.slices))) continue;
    const Ranked second = find_rank<kDigitBins>(state.digits + kDigitBins, first.rank);
    int32_t key = (first.bin << (state.shift - second_shift)) + second.bin;
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
