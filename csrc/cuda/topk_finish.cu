// The threshold of each set. Sets right what the guess got wrong, the candidates between it and the threshold. Where a guess has failed: the
// threshold from all keys, digit after digit, and all weights anew. Results.
#include "launch.h"
#include "mask.cuh"
#include "topk_fallback.cuh"

namespace cram {
namespace cuda {
namespace {

// ---- Where the guess held ----

// The weights that change sides in the chunks of a warp, a few of each.
struct Moves {
  static constexpr int kRoom = 160;
  uint32_t flips[kPiece * kChunk / 32];  // mask bits to turn over; clear between two lists
  uint32_t places[kRoom];                // number among the warp's chunks * kChunk + offset in it
};

// kPiece chunks from `begin` on, a warp's, whose candidates are thought of as one list.
struct Piece {
  static constexpr int kAhead = Moves::kRoom / 32;

  // Of chunk c, in lane c < kPiece.
  CandidateRecord record = {};
  int end = 0;                // of its candidates in the list
  int32_t low = 0, high = 0;  // the keys that change sides: low < key <= high
  bool keep = false;

  // Of the candidates that lie 32 apart, from where load() was asked to begin.
  int32_t key[kAhead];
  uint16_t offset[kAhead];

  __device__ __forceinline__ Piece(const TopkMemory& memory, int64_t begin) {
    if (lane_of() < kPiece && begin + lane_of() < memory.num_chunks) record = memory.records[begin + lane_of()];
  }
  // When the records are there.
  __device__ __forceinline__ void begin_list(const TopkMemory& memory) {
    end = warp_inclusive_sum(static_cast<int>(record.count));
    load(memory, 0);
  }

  __device__ __forceinline__ int total() const { return __shfl_sync(kAllLanes, end, kPiece - 1); }

  __device__ __forceinline__ void load(const TopkMemory& memory, int from) {
    const int64_t first = static_cast<int64_t>(record.first) - (end - static_cast<int>(record.count));
    const int size = total();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = from + j * 32 + lane_of();
      const int64_t at = __shfl_sync(kAllLanes, first, chunk_of(i)) + i;
      key[j] = i < size ? memory.keys[at] : kNanKey;
      offset[j] = i < size ? memory.offsets[at] : 0;
    }
  }

  // The chunk of candidate i of the list. By a warp.
  __device__ __forceinline__ int chunk_of(int i) const {
    int chunk = 0;
#pragma unroll
    for (int c = 0; c < kPiece - 1; ++c) chunk += i >= __shfl_sync(kAllLanes, end, c) ? 1 : 0;
    return chunk;
  }

  // Waits for the thresholds. By a warp.
  __device__ __forceinline__ void settle(const TopkMemory& memory) {
    if (record.count == 0) return;
    const SetState& state = memory.sets[record.set];
    if (has_failed(state)) return;
    const int32_t threshold = wait_for_threshold(state), cut = state.guess.cut;
    low = min(cut, threshold), high = max(cut, threshold);
    keep = threshold < cut;
  }
};

// Moves `count` weights, and clears their flips. By a warp.
__device__ __forceinline__ void apply(const TopkMemory& memory, const Perturbation& p, const Piece& piece, int64_t begin, int count, Moves& moves) {
  for (int i = lane_of(); i < count; i += 32) atomicXor(moves.flips + moves.places[i] / 32, 1u << (moves.places[i] % 32));
  __syncwarp();
  for (int first = 0; first < count; first += 32) {
    const bool mine = first + lane_of() < count;
    const uint32_t place = mine ? moves.places[first + lane_of()] : 0;
    const int chunk = static_cast<int>(place / kChunk), offset = static_cast<int>(place % kChunk);
    const StreamedTensor& tensor = memory.tensors[__shfl_sync(kAllLanes, piece.record.tensor, chunk)];
    const bool keep = __shfl_sync(kAllLanes, static_cast<int>(piece.keep), chunk) != 0;
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

// By a warp.
__device__ __forceinline__ void fix_up(const TopkMemory& memory, const Perturbation& p, Piece& piece, int64_t begin, Moves& moves) {
  piece.settle(memory);
  __syncwarp();
  const int total = piece.total();
  for (int from = 0; from < total; from += Moves::kRoom) {
    if (from > 0) piece.load(memory, from);
    int count = 0;
#pragma unroll
    for (int j = 0; j < Piece::kAhead; ++j) {
      const int32_t key = piece.key[j], chunk = piece.chunk_of(from + j * 32 + lane_of());
      const int32_t low = __shfl_sync(kAllLanes, piece.low, chunk), high = __shfl_sync(kAllLanes, piece.high, chunk);
      const bool moves_over = key > low && key <= high && key != kNanKey;
      const uint32_t all = __ballot_sync(kAllLanes, moves_over);
      if (moves_over) moves.places[count + __popc(all & ((1u << lane_of()) - 1))] = static_cast<uint32_t>(chunk * kChunk + piece.offset[j]);
      count += __popc(all);
    }
    __syncwarp();
    apply(memory, p, piece, begin, count, moves);
  }
}

// perturb_topk_: `stream` has written every weight, pruned at `cut`. A set whose guess held needs only its candidates between cut and threshold,
// some chunks a warp; one whose guess failed is written anew. prune_topk_: nothing has been written yet, and every set is. topk_threshold: nothing
// is.
__global__ void __launch_bounds__(kThreads, kFinishBlocks)
    finish_kernel(const TopkMemory memory, const Perturbation p, const TopkMode mode, const Results results) {
  __shared__ union {
    Moves moves[kWarps];
    Fallback fallback;
  } shared;
  Claims claims(&memory.progress->slices);
  const int64_t apart = int64_t{gridDim.x} * kPiece;  // pieces of the warps of a block
  int64_t begin = warp_of() * apart + blockIdx.x * kPiece;
  const bool fixes = mode == TopkMode::kPerturb;
  Piece piece(memory, fixes ? begin : memory.num_chunks);
  bool failed = false;
  for (int32_t s = threadIdx.x; s < memory.num_sets; s += kThreads) failed |= has_failed(memory.sets[s]);
  piece.begin_list(memory);  // its candidates are on their way while thresholds are found
  claims.work(memory.slices, [&](uint32_t slice) { select(memory, slice, results); });
  if (fixes) {
    Moves& moves = shared.moves[warp_of()];
    for (int i = lane_of(); i < kPiece * kChunk / 32; i += 32) moves.flips[i] = 0;
    __syncwarp();
    while (begin < memory.num_chunks) {
      fix_up(memory, p, piece, begin, moves);
      begin += kWarps * apart;
      piece = Piece(memory, begin);
      piece.begin_list(memory);
    }
  }
  const bool any_failed = __syncthreads_or(failed);
  if (any_failed || mode == TopkMode::kPrune) shared.fallback.run(memory, p, mode, any_failed ? 0 : kPasses, results);
}

}  // namespace

void topk_finish(const TopkMemory& memory, const Perturbation& p, TopkMode mode, int32_t* thresholds, int64_t* stats, Stream stream) {
  const int64_t pieces = (memory.num_chunks + kPiece - 1) / kPiece;
  launch("top-k, finish", finish_kernel, std::max(pieces, int64_t{memory.slices}), stream, memory, p, mode, Results{thresholds, stats});
}

}  // namespace cuda
}  // namespace cram
