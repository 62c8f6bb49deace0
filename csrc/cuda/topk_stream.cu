// The pass over all weights: perturb, save, prune on the guess, mask bits; count what lies above the bracket and write down what lies inside.
#include "block.cuh"
#include "launch.h"
#include "mask.cuh"
#include "source.cuh"
#include "topk.h"

namespace cram {
namespace cuda {
namespace {

// The counters of one set, kept while a block stays in it: a thread sees one weight in kThreads, so that 32 bits are enough for 2^40.
struct Counts {
  uint32_t above = 0, nans = 0;

  __device__ __forceinline__ void flush(SetState& state) {
    const int64_t all_above = warp_inclusive_sum(int64_t{above}), all_nans = warp_inclusive_sum(int64_t{nans});
    if (lane_of() == 31 && all_above > 0) atomicAdd(&state.above, static_cast<unsigned long long>(all_above));
    if (lane_of() == 31 && all_nans > 0) atomicAdd(&state.nans, static_cast<unsigned long long>(all_nans));
  }
};

struct Shared {
  MaskStage mask;
  WarpSums<int32_t> counts;
  int64_t first;
};

// The candidates of a chunk, `flags` of this thread's, in the order of its threads: one atomic a chunk gives them their place in the set's list.
template <class T, class W>
__device__ __forceinline__ void append(const MovedVectors<T, W>& moved, const uint32_t (&flags)[kVectors<T>], int32_t inclusive, const Chunk& chunk,
                                       const T* param, SetState& state, const TopkMemory& memory, int64_t record, Shared& shared) {
  int32_t count = 0, total;
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) count += __popc(flags[j]);
  int32_t own = shared.counts.begin(&total) + inclusive - count;
  if (threadIdx.x == 0) shared.first = total > 0 ? static_cast<int64_t>(atomicAdd(&state.candidates, static_cast<unsigned long long>(total))) : 0;
  __syncthreads();
  const int64_t first = shared.first;
  const bool fits = state.append && first + total <= state.capacity;
  if (threadIdx.x == 0) memory.records[record] = {first, fits ? total : 0};
  if (!fits || total == 0) return;
  int32_t* const keys = memory.keys + state.first + first;
  uint16_t* const offsets = memory.offsets + state.first + first;
  for_vectors(chunk, param, [&](int j, const auto& span) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kLanes; ++i) {
      const bool candidate = flags[j] >> i & 1;
      const int32_t key = magnitude_key(moved.u[j][i]);
      tally(state.digits, (key - state.low - 1) >> state.shift, candidate);
      if (!candidate) continue;
      keys[own] = key;
      offsets[own++] = static_cast<uint16_t>(span.first + i - chunk.begin);
    }
  });
}

template <bool kWrite, class T, class W>
__device__ __forceinline__ void stream_chunk(const PerturbEntry& entry, uint32_t number, const TopkMemory& memory, const Perturbation& p,
                                             int64_t record, Counts& counts, bool* nonfinite, Shared& shared) {
  constexpr int kLanes = Vector<T>::kLanes;
  T* const param = static_cast<T*>(entry.param);
  const Chunk chunk(param, entry.numel, number);
  MovedVectors<T, W> moved;
  moved.load(Source<T, W>(entry, param, p), param, chunk, nonfinite);
  const bool dense = entry.set < 0;
  SetState* const state = dense ? nullptr : memory.sets + entry.set;
  const int32_t low = dense ? kNanKey : state->low, high = dense ? kNanKey : state->high, cut = dense ? kKeepAll : state->cut;
  uint32_t flags[kVectors<T>] = {};
  int32_t candidates = 0;
  for_vectors(chunk, param, [&](int j, const Span<kLanes>& span) {
    uint32_t kept = 0, over = 0, inside = 0, nan = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int32_t key = magnitude_key(moved.u[j][i]);
      kept |= (key > cut ? 1u : 0u) << i;
      over |= (key > high ? 1u : 0u) << i;
      inside |= (key > low ? 1u : 0u) << i;
      nan |= (key == kNanKey ? 1u : 0u) << i;
    }
    const uint32_t real = span.lanes();  // beyond the end, 0 * an infinite rho is a NaN
    counts.above += __popc(over & real);
    counts.nans += __popc(nan & real);
    flags[j] = inside & ~over & real;
    candidates += __popc(flags[j]);
    if constexpr (kWrite) {
      kept &= ~nan & real;
      if (entry.saved != nullptr) store(static_cast<T*>(entry.saved), moved.raw[j], span);
      store(param, pruned(moved.raw[j], moved.u[j], kept, true), span);
      shared.mask.put<T>(j, kept);
    }
  });
  if (dense) return;
  const int32_t inclusive = warp_inclusive_sum(candidates);
  shared.counts.put(inclusive);
  __syncthreads();
  if (kWrite && entry.mask != nullptr) shared.mask.write<T>(chunk, param, entry.mask);
  append(moved, flags, inclusive, chunk, param, *state, memory, record, shared);
}

template <bool kWrite>
__global__ void __launch_bounds__(kThreads, 4)
    stream_kernel(const __grid_constant__ PerturbTable table, const TopkMemory memory, const Perturbation p) {
  __shared__ Shared shared;
  if (kWrite && blockIdx.x == 0 && threadIdx.x == 0) *p.perturbed = 1;
  bool nonfinite = false;
  Counts counts;
  int32_t set = -1;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    if (entry.set != set) {
      if (set >= 0) counts.flush(memory.sets[set]);
      counts = {};  // what was counted in dense tensors too
      set = entry.set;
    }
    with_types(entry, [&](auto t, auto w) {
      stream_chunk<kWrite, decltype(t), decltype(w)>(entry, found.number, memory, p, table.tasks_before + task, counts, &nonfinite, shared);
    });
  }
  if (set >= 0) counts.flush(memory.sets[set]);
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

}  // namespace

void topk_stream(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, bool write, Stream stream) {
  for (const PerturbTable& table : plan.chunks)
    launch("top-k, stream", write ? stream_kernel<true> : stream_kernel<false>, tasks_in(table), stream, table, memory, p);
}

}  // namespace cuda
}  // namespace cram
