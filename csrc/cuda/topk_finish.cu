// Sets right what the guess got wrong, the candidates between it and the threshold; writes anew the sets whose guess has failed; results.
#include "launch.h"
#include "mask.cuh"
#include "topk_digits.cuh"

namespace cram {
namespace cuda {
namespace {

struct Threshold {
  int32_t key;
  int64_t larger;  // keys above
};

// All threads of a block.
__device__ __forceinline__ Threshold threshold_of(const SetState& state) {
  if (!state.fallback) return {state.threshold, state.larger};
  const Ranked found = digits_before(state, kPasses);
  return {found.bin, state.k - found.rank};
}

// Mask bits to turn over in the chunk of a warp.
struct Flips {
  uint32_t words[kWarps][kChunk / 32];
};

// By a warp: a chunk has some thirty candidates, and those between cut and threshold change sides.
template <class T, class W>
__device__ __forceinline__ void fix_up(const PerturbEntry& entry, uint32_t number, const SetState& state, const CandidateRecord& record,
                                       const TopkMemory& memory, const Perturbation& p, uint32_t* flips) {
  T* const param = static_cast<T*>(entry.param);
  const Chunk chunk(param, entry.numel, number);
  const Source<T, W> source(entry, entry.saved, p);
  const int32_t low = min(state.cut, state.threshold), high = max(state.cut, state.threshold);
  const bool keep = state.threshold < state.cut;
  for (int b = lane_of(); b < kChunk / 32; b += 32) flips[b] = 0;
  __syncwarp();
  for (int j = lane_of(); j < record.count; j += 32) {
    const int64_t at = state.first + record.first + j;
    const int32_t key = memory.keys[at];
    if (key <= low || key > high || key == kNanKey) continue;
    const int offset = memory.offsets[at];
    const int64_t i = chunk.begin + offset;
    bool ignored = false;
    param[i] = narrowed(keep ? source.at(i, &ignored) : 0.0f, T{});
    atomicXor(flips + offset / 32, 1u << (offset % 32));
  }
  __syncwarp();
  if (entry.mask == nullptr) return;
  for (int b = lane_of(); b < kChunk / 8; b += 32) {
    const uint8_t turned = static_cast<uint8_t>(flips[b / 4] >> (b % 4 * 8));
    if (turned != 0) entry.mask[chunk.begin / 8 + b] ^= turned;
  }
  __syncwarp();  // the warp's next chunk begins with new flips
}

// What is written for a vector: u, or the weights' own bits where they did not move; +0 where `kept` has no bit, but a NaN stays.
template <class T, int kLanes>
__device__ __forceinline__ Vector<T> pruned(Vector<T> raw, const Lanes<kLanes>& u, uint32_t kept, bool moves) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if ((kept >> i & 1) == 0 && u[i] == u[i])
      raw.set(i, T{});
    else if (moves)
      raw.set(i, narrowed(u[i], T{}));
  }
  return raw;
}

template <class T, class W>
__device__ __forceinline__ void rewrite(const PerturbEntry& entry, uint32_t number, int32_t threshold, const Perturbation& p, MaskStage& mask) {
  constexpr int kLanes = Vector<T>::kLanes;
  T* const param = static_cast<T*>(entry.param);
  const Chunk chunk(param, entry.numel, number);
  const Source<T, W> source(entry, entry.saved != nullptr ? entry.saved : param, p);
  for_vectors(chunk, param, [&](int j, const Span<kLanes>& span) {
    Lanes<kLanes> u = load_floats(source.weights, span);
    bool ignored = false;
    source.move(u, span, &ignored);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int32_t key = magnitude_key(u[i]);
      kept |= (key > threshold && key != kNanKey ? 1u : 0u) << i;
    }
    store(param, pruned(load(param, span), u, kept, entry.grad != nullptr), span);
    mask.put<T>(j, kept & span.lanes());
  });
  __syncthreads();
  if (entry.mask != nullptr) mask.write<T>(chunk, param, entry.mask);
  __syncthreads();
}

struct Results {
  int32_t* thresholds;  // [num_sets]
  int64_t* stats;       // [num_sets, 3]; optional
  int64_t num_sets;
};

__device__ __forceinline__ void report(const TopkMemory& memory, const Results& results) {
  for (int64_t s = blockIdx.x; s < results.num_sets; s += gridDim.x) {
    const SetState& state = memory.sets[s];
    const Threshold threshold = threshold_of(state);
    if (threadIdx.x > 0) continue;
    results.thresholds[s] = threshold.key;
    if (results.stats == nullptr) continue;  // topk_threshold reports none
    results.stats[3 * s] = threshold.key == kNanKey ? 0 : threshold.larger - static_cast<int64_t>(state.nans);
    results.stats[3 * s + 1] = static_cast<int64_t>(state.candidates);
    results.stats[3 * s + 2] = state.fallback;
  }
}

// Two modes. provisional (perturb_topk_): `stream` has written every weight, pruned at `cut`. A set whose guess held needs only its candidates
// between cut and threshold, a warp a chunk (fix_up); a set whose guess failed is written anew, a block a chunk (rewrite). Not provisional
// (prune_topk_): nothing has been written yet, and every set is (rewrite).
__global__ void __launch_bounds__(kThreads, kFinishBlocks)
    finish_kernel(const __grid_constant__ PerturbTable table, const TopkMemory memory, const Perturbation p, const bool provisional,
                  const Results results) {
  __shared__ Flips flips;
  __shared__ MaskStage mask;
  report(memory, results);
  if (provisional) {
    for (uint32_t task = blockIdx.x * kWarps + warp_of(); task < tasks_in(table); task += gridDim.x * kWarps) {
      const Task found = find(table, task);
      const PerturbEntry& entry = table.entries[found.entry];
      if (entry.set < 0) continue;
      const SetState& state = memory.sets[entry.set];
      const CandidateRecord& record = memory.records[table.tasks_before + task];
      if (state.fallback || state.threshold == state.cut || record.count == 0) continue;
      with_types(entry,
                 [&](auto t, auto w) { fix_up<decltype(t), decltype(w)>(entry, found.number, state, record, memory, p, flips.words[warp_of()]); });
    }
    if (*memory.any_fallback == 0) return;
  }
  int32_t set = -1;
  Threshold threshold = {};
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    if (entry.set < 0 || (provisional && !memory.sets[entry.set].fallback)) continue;
    if (entry.set != set) {
      set = entry.set;
      threshold = threshold_of(memory.sets[set]);
    }
    with_types(entry, [&](auto t, auto w) { rewrite<decltype(t), decltype(w)>(entry, found.number, threshold.key, p, mask); });
  }
}

}  // namespace

void topk_finish(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, TopkMode mode, int32_t* thresholds, int64_t* stats,
                 Stream stream) {
  const PerturbTable nothing = {};
  for (const PerturbTable& table : plan.chunks) {
    const bool first = table.tasks_before == 0;
    if (!first && mode == TopkMode::kThreshold) continue;
    const Results results = {thresholds, stats, first ? plan.num_sets : 0};
    const int64_t tasks = mode == TopkMode::kThreshold ? 0 : tasks_in(table);
    launch("top-k, finish", finish_kernel, std::max(tasks, results.num_sets), stream, mode == TopkMode::kThreshold ? nothing : table, memory, p,
           mode == TopkMode::kPerturb, results);
  }
}

}  // namespace cuda
}  // namespace cram
