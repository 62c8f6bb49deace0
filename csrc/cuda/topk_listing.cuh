// What a block of top-k's stream works on, and how it writes down the candidates of a chunk.
#pragma once

#include "block.cuh"
#include "topk.h"
#include "topk_bracket.cuh"
#include "vector.cuh"

namespace cram {
namespace cuda {

// What a block works on, in shared memory: registers are scarce, and the compiler would load a SetState anew after every atomic, which may alias it.
struct Run {
  // Neighbouring chunks of a tensor, [begin, end); those below `full` have kChunk weights and whole vectors.
  uint32_t begin, end, full;
  int64_t before;  // the number of the tensor's chunk 0 among all chunks
  int32_t tensor;  // of those that are streamed

  // The tensor's set, and what the block has counted there: weights above the bracket, candidates that are only counted.
  int32_t set;  // -1: none
  Guess guess;
  int32_t shift;  // of its candidates' first digit
  int64_t first, capacity;
  bool packed;  // its candidates
  uint32_t* digits;
  unsigned long long above, unlisted;

  // These by one thread.
  __device__ __forceinline__ void enter(const TopkMemory& memory, int32_t entered) {
    set = entered;
    above = unlisted = 0;
    guess = {kNanKey, kNanKey, kKeepAll, false};  // outside of all sets all is kept
    if (set < 0) return;
    const SetState& state = memory.sets[set];
    first = state.first, capacity = state.capacity, packed = packs(state.key_step), digits = state.digits;
    guess = wait_for_guess(state);
    shift = first_shift(guess);
  }
  __device__ __forceinline__ void leave(const TopkMemory& memory) const {
    if (set < 0) return;
    if (above > 0) atomicAdd(&memory.sets[set].above, above);
    if (unlisted > 0) atomicAdd(&memory.sets[set].candidates, unlisted);
  }
  __device__ __forceinline__ void set_out(const PerturbTable& table, const Task& task, uint32_t count, uint32_t place) {
    const PerturbEntry& entry = table.entries[task.entry];
    begin = task.number, end = task.number + count;
    const bool whole = entry.whole && reinterpret_cast<uintptr_t>(entry.mask) % 4 == 0;  // it is written by words
    full = whole ? min(end, static_cast<uint32_t>(entry.numel / kChunk)) : 0;
    before = table.tasks_before + place - task.number;
    tensor = table.entries_before + task.entry;
  }

  __device__ __forceinline__ bool appends() const { return writes_candidates(guess); }
  __device__ __forceinline__ void record(const TopkMemory& memory, uint32_t number, int64_t place, int32_t count) const {
    memory.records[before + number] = {static_cast<uint64_t>(place), static_cast<uint64_t>(count), static_cast<uint32_t>(tensor), packed, set};
  }
  // The place of a chunk's candidates among those of all sets; -1: there is no room.
  __device__ __forceinline__ int64_t reserve(const TopkMemory& memory, uint32_t number, int32_t total) const {
    unsigned long long* const candidates = &memory.sets[set].candidates;
    const int64_t place = total > 0 ? static_cast<int64_t>(atomicAdd(candidates, static_cast<unsigned long long>(total))) : 0;
    const bool fits = place + total <= capacity;
    record(memory, number, first + place, fits ? total : 0);
    return fits ? first + place : -1;
  }
};

// Writes down a candidate: u, in the place `offset` of its chunk.
static __device__ __forceinline__ void write_candidate(const TopkMemory& memory, int64_t at, float u, uint32_t offset, bool packed) {
  const uint32_t key = static_cast<uint32_t>(magnitude_key(u)), sign = to_bits(u) & 0x80000000u;
  memory.candidates[at] = key | sign | (packed ? offset : 0u);
  if (!packed) memory.offsets[at] = static_cast<uint16_t>(offset);
}

// What is left to do of a chunk in shared memory, by the one warp whose turn it is: its bits of the mask, if there is one, and its candidates.
template <class T>
class Listing {
 public:
  static __device__ __forceinline__ void write(const TopkMemory& memory, Run& run, uint32_t number, uint8_t* mask, const uint16_t* bits,
                                               const uint4* u, uint16_t* list) {
    uint32_t inside[kGroups];
    int count = 0, above = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {  // four threads' bits at a time
      const int group = g * 32 + lane_of();
      const uint2 words = reinterpret_cast<const uint2*>(bits)[group];
      const uint32_t kept = __byte_perm(words.x, words.y, 0x6420);
      inside[g] = __byte_perm(words.x, words.y, 0x7531);
      count += __popc(inside[g]);
      above += __popc(kept & ~inside[g]);  // low <= cut <= high
      if (mask != nullptr) write_mask(kept, mask + int64_t{number} * (kChunk / 8), group);
    }
    const int end = warp_inclusive_sum(count), total = __shfl_sync(kAllLanes, end, 31);
    const uint32_t all_above = warp_sum(static_cast<uint32_t>(above));
    const bool appends = run.appends();
    int64_t first = -1;
    if (lane_of() == 0) {  // no other warp adds until the next barrier
      run.above += all_above;
      if (appends)
        first = run.reserve(memory, number, total);
      else
        run.unlisted += static_cast<uint32_t>(total), run.record(memory, number, 0, 0);
    }
    if (!appends) return;
    int at = end - count;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll 1
      for (uint32_t left = inside[g]; left != 0; left &= left - 1) list[at++] = static_cast<uint16_t>((g * 32 + lane_of()) * 32 + __ffs(left) - 1);
    __syncwarp();
    first = __shfl_sync(kAllLanes, first, 0);
    if (first < 0) return;
    const int32_t low = run.guess.low, shift = run.shift;
    const bool packed = run.packed;
    uint32_t* const digits = run.digits;
#pragma unroll 1
    for (int32_t begin = 0; begin < total; begin += 32) {
      const int32_t i = begin + lane_of();
      const int offset = i < total ? offset_of(list[i]) : 0;
      const float own = widen(reinterpret_cast<const T*>(u)[offset]);
      tally(digits, (magnitude_key(own) - low - 1) >> shift, i < total);
      if (i < total) write_candidate(memory, first + i, own, static_cast<uint32_t>(offset), packed);
    }
  }

 private:
  static constexpr int kGroups = kThreads / 128;

  // Of float32, a thread has four bits of each of its two vectors, half a byte of the mask.
  static __device__ __forceinline__ void write_mask(uint32_t kept, uint8_t* mask, int group) {
    if constexpr (sizeof(T) == 2) {
      reinterpret_cast<uint32_t*>(mask)[group] = kept;
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t halves = kept >> (4 * j) & 0x0f0f0f0fu;
        reinterpret_cast<uint16_t*>(mask)[j * (kThreads / 4) + group] = static_cast<uint16_t>(__byte_perm(halves | halves >> 4, 0, 0x4420));
      }
    }
  }

  // Where the weight of a bit lies in the chunk.
  static __device__ __forceinline__ int offset_of(int bit) {
    return sizeof(T) == 2 ? bit : (bit >> 2 & 1) * (4 * kThreads) + (bit >> 3) * 4 + (bit & 3);
  }
};

}  // namespace cuda
}  // namespace cram
