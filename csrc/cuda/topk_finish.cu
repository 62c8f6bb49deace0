// The threshold of each set. Sets right what the guess got wrong, the candidates between it and the threshold. Where a guess has failed: the
// threshold from all keys, digit after digit, and all weights anew. Results.
#include "launch.h"
#include "mask.cuh"
#include "topk_fallback.cuh"

namespace cram {
namespace cuda {
namespace {

// ---- Where the guess held ----

// What changes in a chunk, in shared memory.
struct Change {
  int32_t low, high;   // the keys that change sides: low < key <= high
  bool keep, packed;   // keep: they come back, else they go
  DType dtype;
  void* param;
  uint8_t* mask;       // optional
  int64_t begin;       // the place of the chunk's first weight
  int64_t mask_words;  // that lie within the mask, if it begins with a word
};

// kPiece chunks from `begin` on, a warp's, whose candidates are thought of as one list.
struct Piece {
  static constexpr int kAhead = 5;

  // Of chunk c, in lane c < kPiece.
  CandidateRecord record = {};
  StreamedTensor tensor;
  int end = 0;  // of its candidates in the list

  // Of the candidates that lie 32 apart, from where load() was asked to begin.
  uint32_t candidate[kAhead];
  uint16_t offset[kAhead];

  __device__ __forceinline__ Piece(const TopkMemory& memory, int64_t begin) {
    if (lane_of() < kPiece && begin + lane_of() < memory.num_chunks) record = memory.records[begin + lane_of()];
  }
  // When the records are there.
  __device__ __forceinline__ void begin_list(const TopkMemory& memory) {
    if (record.count > 0) tensor = memory.tensors[record.tensor];
    end = warp_inclusive_sum(static_cast<int>(record.count));
    load(memory, 0);
  }

  __device__ __forceinline__ int total() const { return __shfl_sync(kAllLanes, end, kPiece - 1); }

  __device__ __forceinline__ void load(const TopkMemory& memory, int from) {
    const int64_t first = static_cast<int64_t>(record.first) - (end - static_cast<int>(record.count));
    const int size = total();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = from + j * 32 + lane_of(), chunk = chunk_of(i);
      const int64_t at = __shfl_sync(kAllLanes, first, chunk) + i;
      const bool packed = __shfl_sync(kAllLanes, static_cast<int>(record.packed), chunk) != 0;
      candidate[j] = i < size ? memory.candidates[at] : kNanKey;
      offset[j] = i < size && !packed ? memory.offsets[at] : 0;
    }
  }

  // The chunk of candidate i of the list. By a warp.
  __device__ __forceinline__ int chunk_of(int i) const {
    int chunk = 0;
#pragma unroll
    for (int c = 0; c < kPiece - 1; ++c) chunk += i >= __shfl_sync(kAllLanes, end, c) ? 1 : 0;
    return chunk;
  }

  // Of this lane's chunk, number `chunk` among all. own: the threshold, if this block has found it for itself; else it is waited for.
  __device__ __forceinline__ Change settle(const TopkMemory& memory, int64_t chunk, int32_t own) const {
    Change change = {};
    if (record.count == 0) return change;
    const SetState& state = memory.sets[record.set];
    if (has_failed(state)) return change;
    const PerturbEntry& entry = tensor.entry;
    change.packed = record.packed;
    change.dtype = static_cast<DType>(entry.dtype);
    change.param = entry.param;
    change.mask = entry.mask;
    change.begin = (chunk - tensor.first) * chunk_size(aligned(entry.param));
    if (entry.mask != nullptr && reinterpret_cast<uintptr_t>(entry.mask) % 4 == 0) change.mask_words = (entry.numel + 7) / 32;
    const int32_t threshold = own != kUnknown ? own : wait_for_threshold(state), cut = state.guess.cut;
    change.low = min(cut, threshold), change.high = max(cut, threshold);
    change.keep = threshold < cut;
    return change;
  }
};

// *word ^= bits, for which nothing waits. The address is said to be global, which nvcc cannot know of one from shared memory.
__device__ __forceinline__ void turn_over(uint32_t* word, uint32_t bits) {
  asm volatile("red.global.xor.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "r"(bits) : "memory");
}

// Nothing is loaded once the threshold is known, but bytes of a mask that are not within a word of it. By a warp.
__device__ __forceinline__ void fix_up(const TopkMemory& memory, Piece& piece, int64_t begin, int32_t own, Change (&changes)[kPiece]) {
  __syncwarp();  // those of the piece before have been read
  if (lane_of() < kPiece) changes[lane_of()] = piece.settle(memory, begin + lane_of(), own);
  __syncwarp();
  const int total = piece.total();
  for (int from = 0; from < total; from += Piece::kAhead * 32) {
    if (from > 0) piece.load(memory, from);
#pragma unroll
    for (int j = 0; j < Piece::kAhead; ++j) {
      const uint32_t candidate = piece.candidate[j];
      const Change& change = changes[piece.chunk_of(from + j * 32 + lane_of())];
      const int32_t key = key_of(candidate, change.packed);
      const bool moves = key > change.low && key <= change.high && key != kNanKey;
      const int64_t at = change.begin + (change.packed ? candidate & 0xffffu : piece.offset[j]);
      const bool in_word = at / 32 < change.mask_words, in_byte = moves && !in_word && change.mask != nullptr;
      if (moves) {
        const float u = from_bits(static_cast<uint32_t>(key) | (candidate & 0x80000000u));
        with_number_types(change.dtype, false, [&](auto t, auto) {
          using T = decltype(t);
          static_cast<T*>(change.param)[at] = narrowed(change.keep ? u : 0.0f, T{});
        });
        if (in_word) turn_over(reinterpret_cast<uint32_t*>(change.mask) + at / 32, 1u << (at % 32));
      }
      const uint32_t by_bytes = __ballot_sync(kAllLanes, in_byte);
      if (in_byte) {  // one lane for each byte, which belongs to one chunk
        uint8_t* const byte = change.mask + at / 8;
        const uint32_t peers = __match_any_sync(by_bytes, reinterpret_cast<unsigned long long>(byte));
        const uint32_t turned = __reduce_or_sync(peers, 1u << (at % 8));
        if (lane_of() == __ffs(peers) - 1) *byte = static_cast<uint8_t>(*byte ^ turned);
      }
      __syncwarp();
    }
  }
}

// perturb_topk_: `stream` has written every weight, pruned at `cut`. A set whose guess held needs only its candidates between cut and threshold,
// some chunks a warp; one whose guess failed is written anew. prune_topk_: nothing has been written yet, and every set is. topk_threshold: nothing
// is.
__global__ void __launch_bounds__(kThreads, kFinishBlocks)
    finish_kernel(const TopkMemory memory, const Perturbation p, const TopkMode mode, const Results results) {
  __shared__ union {
    Change changes[kWarps][kPiece];
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
  // Of one set of 16 bits every block finds the threshold for itself, which is quicker than to wait for another; all write the same results.
  int32_t own = kUnknown;
  if (memory.num_sets == 1 && needs_no_candidates(memory.sets[0]))
    own = select(memory, 0, results);
  else
    claims.work(memory.slices, [&](uint32_t slice) { select(memory, slice, results); });
  if (fixes) {
    while (begin < memory.num_chunks) {
      fix_up(memory, piece, begin, own, shared.changes[warp_of()]);
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
