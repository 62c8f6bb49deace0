// Sets right what the guess got wrong, the candidates between it and the threshold. Where a guess has failed: the threshold from all keys, digit after
// digit, and all weights anew. Results.
#include "launch.h"
#include "mask.cuh"
#include "topk_fallback.cuh"

namespace cram {
namespace cuda {
namespace {

// ---- Where the guess held ----

// The weights that change sides in the chunks of a warp, a few of each.
struct Moves {
  static constexpr int kRoom = 128;
  uint32_t flips[kPiece * kChunk / 32];  // mask bits to turn over; clear between two lists
  uint32_t places[kRoom];                // number among the warp's chunks * kChunk + offset in it
};

// What lane c < kPiece of a warp knows of its chunk c.
struct Fix {
  CandidateRecord record = {};
  int64_t first = 0;               // of its candidates among those of all sets
  int32_t low = 0, high = 0;       // the keys that change sides: low < key <= high
  bool keep = false;

  __device__ Fix() = default;
  __device__ __forceinline__ Fix(const TopkMemory& memory, int64_t chunk) : record(memory.records[chunk]) {
    const int32_t set = memory.tensors[record.tensor].entry.set;
    if (record.count == 0) return;
    const SetState& state = memory.sets[set];
    first = state.first + record.first;
    low = min(state.cut, state.threshold), high = max(state.cut, state.threshold);
    keep = state.threshold < state.cut;
    if (state.fallback || low == high) record.count = 0;
  }
};

// Moves `count` weights, and clears their flips. By a warp.
__device__ __forceinline__ void apply(const TopkMemory& memory, const Perturbation& p, const Fix& fix, int64_t begin, int count, Moves& moves) {
  for (int i = lane_of(); i < count; i += 32) atomicXor(moves.flips + moves.places[i] / 32, 1u << (moves.places[i] % 32));
  __syncwarp();
  for (int first = 0; first < count; first += 32) {
    const bool mine = first + lane_of() < count;
    const uint32_t place = mine ? moves.places[first + lane_of()] : 0;
    const int chunk = static_cast<int>(place / kChunk), offset = static_cast<int>(place % kChunk);
    const StreamedTensor& tensor = memory.tensors[__shfl_sync(kAllLanes, fix.record.tensor, chunk)];
    const bool keep = __shfl_sync(kAllLanes, static_cast<int>(fix.keep), chunk) != 0;
    if (mine) {
      const PerturbEntry& entry = tensor.entry;
      const int64_t at = (begin + chunk - tensor.first) * chunk_size(aligned(entry.param)) + offset;
      // The first that comes turns over all bits of a byte.
      const uint32_t shift = place % 32 / 8 * 8, turned = atomicAnd(moves.flips + place / 32, ~(0xffu << shift)) >> shift & 0xffu;
      uint8_t* const mask = entry.mask != nullptr && turned != 0 ? entry.mask + at / 8 : nullptr;
      const uint32_t before = mask != nullptr ? *mask : 0;
      with_types(entry, [&](auto t, auto w) {
        using T = decltype(t);
        bool ignored = false;
        static_cast<T*>(entry.param)[at] = narrowed(keep ? Source<T, decltype(w)>(entry, entry.saved, p).at(at, &ignored) : 0.0f, T{});
      });
      if (mask != nullptr) *mask = static_cast<uint8_t>(before ^ turned);
    }
    __syncwarp();
  }
}

// kPiece chunks from `begin` on, whose candidates are thought of as one list. By a warp.
__device__ __forceinline__ void fix_up(const TopkMemory& memory, const Perturbation& p, int64_t begin, Moves& moves) {
  constexpr int kAhead = Moves::kRoom / 32;
  const bool exists = lane_of() < kPiece && begin + lane_of() < memory.num_chunks;
  const Fix fix = exists ? Fix(memory, begin + lane_of()) : Fix();
  const int end = warp_inclusive_sum(fix.record.count), total = __shfl_sync(kAllLanes, end, kPiece - 1);
  for (int from = 0; from < total; from += Moves::kRoom) {
    int32_t key[kAhead], chunk[kAhead];
    uint16_t offset[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = from + j * 32 + lane_of();
      chunk[j] = 0;
#pragma unroll
      for (int c = 0; c < kPiece - 1; ++c) chunk[j] += i >= __shfl_sync(kAllLanes, end, c) ? 1 : 0;
      const int64_t at = __shfl_sync(kAllLanes, fix.first - (end - fix.record.count), chunk[j]) + i;
      key[j] = i < total ? memory.keys[at] : kNanKey;
      offset[j] = i < total ? memory.offsets[at] : 0;
    }
    int count = 0;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int32_t low = __shfl_sync(kAllLanes, fix.low, chunk[j]), high = __shfl_sync(kAllLanes, fix.high, chunk[j]);
      const bool moves_over = key[j] > low && key[j] <= high && key[j] != kNanKey;
      const uint32_t all = __ballot_sync(kAllLanes, moves_over);
      if (moves_over) moves.places[count + __popc(all & ((1u << lane_of()) - 1))] = static_cast<uint32_t>(chunk[j] * kChunk + offset[j]);
      count += __popc(all);
    }
    __syncwarp();
    apply(memory, p, fix, begin, count, moves);
  }
}

// ---- Results ----

struct Results {
  int32_t* thresholds;  // [num_sets]
  int64_t* stats;       // [num_sets, 3]; optional
  int64_t num_sets;
};

// Of the sets first, first + step, ... whose guess has failed, or of those whose guess held. All threads of a block.
__device__ __forceinline__ void report(const TopkMemory& memory, const Results& results, int64_t first, int64_t step, bool fallback) {
  for (int64_t s = first; s < results.num_sets; s += step) {
    const SetState& state = memory.sets[s];
    if (state.fallback != fallback) continue;
    const Threshold threshold = threshold_of(state);
    if (threadIdx.x > 0) continue;
    results.thresholds[s] = threshold.key;
    if (results.stats == nullptr) continue;  // topk_threshold reports none
    results.stats[3 * s] = threshold.key == kNanKey ? 0 : threshold.larger - static_cast<int64_t>(state.nans);
    results.stats[3 * s + 1] = static_cast<int64_t>(state.candidates);
    results.stats[3 * s + 2] = state.fallback;
  }
}

// perturb_topk_: `stream` has written every weight, pruned at `cut`. A set whose guess held needs only its candidates between cut and threshold,
// some chunks a warp; one whose guess failed is written anew. prune_topk_: nothing has been written yet, and every set is. topk_threshold: nothing is.
__global__ void __launch_bounds__(kThreads, kFinishBlocks)
    finish_kernel(const TopkMemory memory, const Perturbation p, const TopkMode mode, const Results results) {
  __shared__ union {
    Moves moves[kWarps];
    Fallback fallback;
  } shared;
  const bool any_fallback = memory.progress->any_fallback != 0;
  report(memory, results, blockIdx.x, gridDim.x, false);
  if (mode == TopkMode::kPerturb) {
    Moves& moves = shared.moves[warp_of()];
    for (int i = lane_of(); i < kPiece * kChunk / 32; i += 32) moves.flips[i] = 0;
    __syncwarp();
    for (int64_t begin = (static_cast<int64_t>(warp_of()) * gridDim.x + blockIdx.x) * kPiece; begin < memory.num_chunks;
         begin += static_cast<int64_t>(gridDim.x) * kWarps * kPiece)
      fix_up(memory, p, begin, moves);
  }
  if (!any_fallback && mode != TopkMode::kPrune) return;
  shared.fallback.run(memory, p, mode, any_fallback ? 0 : kPasses,
                      [&](int64_t piece, int64_t pieces) { report(memory, results, piece, pieces, true); });
}

}  // namespace

void topk_finish(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, TopkMode mode, int32_t* thresholds, int64_t* stats,
                 Stream stream) {
  const Results results = {thresholds, stats, plan.num_sets};
  launch("top-k, finish", finish_kernel, std::max((plan.num_chunks + kPiece - 1) / kPiece, plan.num_sets), stream, memory, p, mode, results);
}

}  // namespace cuda
}  // namespace cram
