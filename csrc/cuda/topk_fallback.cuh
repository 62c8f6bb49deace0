// Where a guess has failed: three passes that count the digits of all keys of the set, then one that writes its weights anew.
// The passes are one after the other within a launch. Blocks claim pieces of work in order, those of a pass after all of the pass before, and wait
// until that is done: again for blocks that run (Claims).
#pragma once

#include "block.cuh"
#include "mask.cuh"
#include "source.cuh"
#include "topk.h"
#include "topk_select.cuh"

namespace cram {
namespace cuda {

CRAM_HOST_DEVICE constexpr int digit_shift(int pass) { return 20 - 10 * pass; }
CRAM_HOST_DEVICE constexpr int digit_bits(int pass) { return pass == 0 ? 11 : 10; }

// The digits of the threshold that the passes before `pass` have found, and the rank that is left. All threads of a block.
static __device__ Ranked digits_before(const SetState& state, int pass) {
  Ranked found = {0, state.k, 0};
  for (int before = 0; before < pass; ++before) {
    const Ranked digit = find_rank<kDigitBins>(state.radix + before * kDigitBins, found.rank);
    found = {found.bin << 10 | digit.bin, digit.rank, digit.count};
  }
  return found;
}

// Of a set whose guess has failed. All threads of a block.
static __device__ __forceinline__ Ranked threshold_of_all(const SetState& state) { return digits_before(state, kPasses); }

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
    const Lanes<kLanes> u = source.of(span);
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

// In shared memory.
class Fallback {
 public:
  // From pass `first` on: kPasses writes alone, for the sets that want it. All threads of the block.
  __device__ __forceinline__ void run(const TopkMemory& memory, const Perturbation& p, TopkMode mode, int first, const Results& results) {
    __syncthreads();  // the memory was another's
    clear();
    for (;;) {
      if (threadIdx.x == 0) {
        const uint32_t pieces = max(1u, static_cast<uint32_t>((memory.num_chunks + kPiece - 1) / kPiece));
        const uint32_t claimed = atomicAdd(&memory.progress->claimed, 1u), before = claimed / pieces;  // passes
        pieces_ = pieces, piece_ = claimed % pieces, pass_ = first + static_cast<int>(before);
        while (pass_ <= kPasses && seen(memory.progress->done) < before * pieces) {
        }
        __threadfence();
      }
      __syncthreads();
      const int pass = pass_;
      if (pass > kPasses) return;
      const int64_t begin = piece_ * int64_t{kPiece}, end = min(begin + kPiece, memory.num_chunks);
      if (pass < kPasses) {
        count(memory, p, mode, begin, end, pass);
      } else {
        report(memory, results, static_cast<int32_t>(piece_), static_cast<int32_t>(pieces_));
        if (mode != TopkMode::kThreshold) write(memory, p, mode, begin, end);
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(&memory.progress->done, 1u);
    }
  }

 private:
  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kDigitBins; i += kThreads) counts_[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void flush(unsigned long long* bins) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDigitBins; i += kThreads) {
      if (counts_[i] > 0) atomicAdd(bins + i, static_cast<unsigned long long>(counts_[i]));
      counts_[i] = 0;
    }
    __syncthreads();
  }

  // Of the sets first, first + step, ... whose guess has failed.
  __device__ __forceinline__ static void report(const TopkMemory& memory, const Results& results, int32_t first, int32_t step) {
    for (int32_t s = first; s < memory.num_sets; s += step) {
      const SetState& state = memory.sets[s];
      if (!has_failed(state)) continue;
      const Ranked found = threshold_of_all(state);
      if (threadIdx.x == 0) results.write(state, s, found.bin, state.k - found.rank, true);
    }
  }

  // f(entry, number of the chunk in its tensor) for the chunks that are a set's.
  template <class Function>
  __device__ __forceinline__ static void for_chunks(const TopkMemory& memory, int64_t begin, int64_t end, Function f) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const CandidateRecord record = memory.records[chunk];
      const StreamedTensor& tensor = memory.tensors[record.tensor];
      if (record.set >= 0) f(tensor.entry, static_cast<uint32_t>(chunk - tensor.first));
    }
  }

  __device__ __forceinline__ void count(const TopkMemory& memory, const Perturbation& p, TopkMode mode, int64_t begin, int64_t end, int pass) {
    const int shift = digit_shift(pass), bits = digit_bits(pass);
    int32_t set = -1, prefix = 0;
    for_chunks(memory, begin, end, [&](const PerturbEntry& entry, uint32_t number) {
      if (!has_failed(memory.sets[entry.set])) return;
      if (entry.set != set) {
        if (set >= 0) flush(memory.sets[set].radix + pass * kDigitBins);
        set = entry.set;
        prefix = digits_before(memory.sets[set], pass).bin;
      }
      with_types(entry, [&](auto t, auto w) {
        using T = decltype(t);
        const T* const weights = static_cast<const T*>(mode == TopkMode::kPerturb ? entry.saved : entry.param);
        const Source<T, decltype(w)> source(entry, weights, p);
        const Chunk chunk(entry.param, entry.numel, number);
        for_vectors(chunk, static_cast<const T*>(entry.param), [&](int, const auto& span) {
          const auto u = source.of(span);
#pragma unroll
          for (int i = 0; i < Vector<T>::kLanes; ++i) {
            const int32_t key = magnitude_key(u[i]);
            if (span.has(i) && key >> shift >> bits == prefix) atomicAdd(counts_ + (key >> shift & ((1 << bits) - 1)), 1u);
          }
        });
      });
    });
    if (set >= 0) flush(memory.sets[set].radix + pass * kDigitBins);
  }

  __device__ __forceinline__ void write(const TopkMemory& memory, const Perturbation& p, TopkMode mode, int64_t begin, int64_t end) {
    int32_t set = -1, threshold = 0;
    for_chunks(memory, begin, end, [&](const PerturbEntry& entry, uint32_t number) {
      const SetState& state = memory.sets[entry.set];
      const bool failed = has_failed(state);
      if (mode == TopkMode::kPerturb && !failed) return;
      if (entry.set != set) {
        set = entry.set;
        threshold = failed ? threshold_of_all(state).bin : wait_for_threshold(state);
      }
      with_types(entry, [&](auto t, auto w) { rewrite<decltype(t), decltype(w)>(entry, number, threshold, p, mask_); });
    });
  }

  uint32_t pieces_, piece_;  // of each pass; the one that this block has claimed
  int pass_;
  uint32_t counts_[kDigitBins];  // of the keys of a set that this block has counted so far, by digit
  MaskStage mask_;
};

}  // namespace cuda
}  // namespace cram
