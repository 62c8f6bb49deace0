// A bracket around the threshold, then the pass over all weights: perturb, save, prune on the guess, mask bits; count what lies above the bracket and
// write down what lies inside.
#include "block.cuh"
#include "launch.h"
#include "mask.cuh"
#include "source.cuh"
#include "topk.h"
#include "topk_bracket.cuh"

namespace cram {
namespace cuda {
namespace {

// The counters of one set, kept while a block stays in it: a thread sees one weight in kThreads, so that 32 bits are enough for 2^40.
struct Counts {
  uint32_t above = 0, unlisted = 0, at_low = 0;  // unlisted: candidates that are only counted

  __device__ __forceinline__ void flush(SetState& state) {
    add(&state.above, above);
    add(&state.candidates, unlisted);
    add(&state.at_low, at_low);
  }
  static __device__ __forceinline__ void add(unsigned long long* counter, uint32_t own) {
    const unsigned long long sum = warp_sum(static_cast<unsigned long long>(own));
    if (lane_of() == 0 && sum > 0) atomicAdd(counter, sum);
  }
};

// Bits of the weights of a vector.
struct Bits {
  uint32_t kept = 0, inside = 0;
};

// What a magnitude of T is compared with: it is above level(key) exactly where its own key is above `key`. For 16-bit types a word has the level
// twice, each half biased by 0x8000, so that `level - magnitudes` is a packed comparison: the upper bit of a half is set where that magnitude is
// not above, and no half borrows from the other.
__device__ __forceinline__ float level(int32_t key, float) { return key < 0 ? -1.0f : from_bits(min(key, kInfKey)); }
__device__ __forceinline__ uint32_t level(int32_t key, BFloat16) { return static_cast<uint32_t>(0x8000 + (key >> 16)) * 0x10001u; }
__device__ __forceinline__ uint32_t level(int32_t key, Float16) {
  uint16_t below;
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(below) : "f"(from_bits(key)));
  return static_cast<uint32_t>(0x8000 + (key < 0 ? -1 : key >= kInfKey ? 0x7c00 : static_cast<int>(below))) * 0x10001u;
}

template <class T>
struct Levels {
  decltype(level(0, T{})) low, high, cut;

  __device__ __forceinline__ explicit Levels(const Guess& guess)
      : low(level(guess.low, T{})), high(level(guess.high, T{})), cut(level(guess.cut, T{})) {}

  // The bits of a vector without a NaN. Zeroes what is not kept.
  __device__ __forceinline__ Bits sort(Vector<T>& u) const {
    Bits bits;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = from_bits(u.words[i]), size = fabsf(x);
        const bool kept = size > cut;
        if (size > low && size <= high) bits.inside |= 1u << i;
        if (kept) bits.kept |= 1u << i;
        u.words[i] = kept ? u.words[i] : 0;
      }
    } else {
      uint32_t kept = 0, inside = 0;  // of word w: bits 2 w, and 16 + 2 w
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t size = u.words[w] & 0x7fff7fffu, dropped = cut - size;
        inside |= ((high - size) & ~(low - size) & 0x80008000u) >> (15 - 2 * w);
        kept |= (~dropped & 0x80008000u) >> (15 - 2 * w);
        u.words[w] &= ~__byte_perm(dropped, 0, 0xbb99);  // the sign of each half in all of its bits
      }
      bits.inside = (inside & 0x55) | (inside >> 15 & 0xaa);
      bits.kept = (kept & 0x55) | (kept >> 15 & 0xaa);
    }
    return bits;
  }
};

struct Shared {
  Bracketing bracketing;
  Guess guess;    // of the set: a copy, since the compiler would load the SetState anew after every atomic, which may alias it
  int32_t shift;  // of its candidates' first digit
  MaskStage mask;
  // Two chunks take turns: while one warp writes down the candidates of a chunk, the others go on to the next.
  uint4 u[2][kThreads * 2];  // of a chunk, as its numbers lie in memory
  uint16_t offsets[2][kStaged];
  int32_t count[4];  // of candidates: of the chunk before, of this one, of the next two; cleared one barrier ahead of its use
  int32_t total;     // and `first`: of stream_exactly
  int64_t first;
};

// What a block works on.
struct Work {
  const PerturbEntry& entry;
  uint32_t number;  // of the chunk in its tensor
  int64_t number_of_all;
  int32_t tensor;  // of those that are streamed
  const Guess& guess;
  const int32_t& shift;
  const TopkMemory& memory;
  const Perturbation& p;

  __device__ __forceinline__ SetState& state() const { return memory.sets[entry.set]; }
  __device__ __forceinline__ bool appends() const { return writes_candidates(guess); }
  __device__ __forceinline__ void record(int64_t first, int32_t count) const {
    memory.records[number_of_all] = {static_cast<uint64_t>(first), static_cast<uint64_t>(count), tensor, entry.set};
  }
};

// The place of a chunk's candidates among those of all sets; -1: there is no room. By one thread.
__device__ __forceinline__ int64_t reserve(const Work& work, int32_t total) {
  SetState& state = work.state();
  const int64_t place = total > 0 ? static_cast<int64_t>(atomicAdd(&state.candidates, static_cast<unsigned long long>(total))) : 0;
  const int64_t first = state.first + place;
  const bool fits = place + total <= state.capacity;
  work.record(first, fits ? total : 0);
  return fits ? first : -1;
}

// Writes down the candidates of a chunk: `total` places in u. By a warp.
template <class T>
__device__ __forceinline__ void write_down(const Work& work, int32_t total, const T* u, const uint16_t* offsets) {
  int64_t first = 0;
  if (lane_of() == 0) first = reserve(work, total);
  first = __shfl_sync(kAllLanes, first, 0);
  if (first < 0) return;
  const int32_t low = work.guess.low, shift = work.shift;
  uint32_t* const digits = work.state().digits;
  for (int32_t begin = 0; begin < total; begin += 32) {
    const int32_t i = begin + lane_of();
    const uint16_t offset = i < total ? offsets[i] : 0;
    const int32_t key = magnitude_key(widen(u[offset]));
    tally(digits, (key - low - 1) >> shift, i < total);
    if (i >= total) continue;
    work.memory.keys[first + i] = key;
    work.memory.offsets[first + i] = offset;
  }
}

// The exact path, for any chunk: one with cut vectors, an Inf, a NaN, or more candidates than the list in shared memory has room for. again: the
// fast path has overwritten the weights, which are read from where it saved them. By all threads of the block.
template <bool kWrite, class T, class W>
__device__ __forceinline__ void stream_exactly(const Work& work, bool again, Counts& counts, Shared& shared) {
  constexpr int kLanes = Vector<T>::kLanes;
  const PerturbEntry& entry = work.entry;
  T* const param = static_cast<T*>(entry.param);
  const Chunk chunk(param, entry.numel, work.number);
  MovedVectors<T, W> moved;
  const T* const own = again && entry.saved != nullptr ? static_cast<const T*>(entry.saved) : param;
  const Source<T, W> source(entry, own, work.p);
  moved.issue(source, own, param, chunk);
  moved.move_exactly(source, param, chunk, work.p.found_inf);
  uint32_t flags[kVectors<T>], kept[kVectors<T>];
  int32_t count = 0;
  uint32_t nans = 0;
  for_vectors(chunk, param, [&](int j, const auto& span) {
    uint32_t over = 0, inside = 0, nan = 0;
    kept[j] = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int32_t key = moved.key(j, i);
      kept[j] |= (key > work.guess.cut && key != kNanKey ? 1u : 0u) << i;
      over |= (key > work.guess.high ? 1u : 0u) << i;
      inside |= (key > work.guess.low ? 1u : 0u) << i;
      nan |= (key == kNanKey ? 1u : 0u) << i;
      if (work.guess.ties_below && span.has(i) && key == work.guess.low) ++counts.at_low;
    }
    const uint32_t real = span.lanes();  // beyond the end, 0 * an infinite rho is a NaN
    kept[j] &= real;
    flags[j] = inside & ~over & real;
    count += __popc(flags[j]);
    counts.above += __popc(over & real);
    nans += __popc(nan & real);
    if constexpr (kWrite) {
      if (entry.saved != nullptr && !again) store(static_cast<T*>(entry.saved), moved.raw[j], span);
      store(param, pruned(moved.u[j], kept[j]), span);
    }
  });
  if (entry.set < 0) return;
  if (nans > 0) atomicAdd(&work.state().nans, static_cast<unsigned long long>(nans));
  if (kWrite && entry.mask != nullptr) write_mask<T>(chunk, param, entry.mask, kept, shared.mask);
  if (!work.appends()) {
    counts.unlisted += count;
    return;
  }
  __syncthreads();  // what such a chunk before left in `total` and `first` has been read
  if (threadIdx.x == 0) shared.total = 0;
  __syncthreads();
  int32_t at = count > 0 ? atomicAdd(&shared.total, count) : 0;
  __syncthreads();
  if (threadIdx.x == 0) shared.first = reserve(work, shared.total);
  __syncthreads();
  const int64_t first = shared.first;
  if (first < 0) return;
  const Source<T, W> written(entry, entry.saved != nullptr ? entry.saved : param, work.p);
  int32_t* const keys = work.memory.keys + first;
  uint16_t* const offsets = work.memory.offsets + first;
  const int32_t low = work.guess.low, shift = work.shift;
  uint32_t* const digits = work.state().digits;
  for_vectors(chunk, param, [&](int j, const auto& span) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const bool candidate = flags[j] >> i & 1;
      bool ignored = false;  // read anew: its registers are needed meanwhile
      const int32_t key = candidate ? magnitude_key(written.at(span.first + i, &ignored)) : 0;
      tally(digits, (key - low - 1) >> shift, candidate);
      if (!candidate) continue;
      keys[at] = key;
      offsets[at++] = static_cast<uint16_t>(span.first + i - chunk.begin);
    }
  });
}

// The fast path, for a chunk whose vectors are whole: one barrier. False: some u may not be finite, or there are too many candidates, and
// stream_exactly must go over the chunk again. By all threads of the block.
template <bool kWrite, class T, class W>
__device__ __forceinline__ bool stream_whole(const Work& work, uint32_t turn, Counts& counts, Shared& shared) {
  constexpr int kLanes = Vector<T>::kLanes;
  const PerturbEntry& entry = work.entry;
  T* const param = static_cast<T*>(entry.param);
  const WholeChunk chunk(param, entry.numel, work.number);
  const uint32_t stage = turn % 2, counter = turn % 4;
  MovedVectors<T, W> moved;
  const Source<T, W> source(entry, param, work.p);
  moved.issue(source, param, param, chunk);
  const bool finite = moved.move(source);
  const Levels<T> levels(work.guess);
  uint32_t flags[kVectors<T>], kept[kVectors<T>], above = 0, at_low = 0;
  int32_t count = 0;
  for_vectors(chunk, param, [&](int j, const auto& span) {
    Vector<T> out = moved.u[j];
    const Bits bits = levels.sort(out);
    kept[j] = bits.kept & span.lanes();
    flags[j] = bits.inside & span.lanes();
    count += __popc(flags[j]);
    above += __popc(kept[j] & ~flags[j]);  // low <= cut <= high
    if constexpr (kWrite) {
      if (entry.saved != nullptr) store(static_cast<T*>(entry.saved), moved.raw[j], span);
      store(param, out, span);
    }
  });
  if (kWrite && entry.mask != nullptr) write_mask<T>(chunk, param, entry.mask, kept);
  if (work.guess.ties_below) {
    for_vectors(chunk, param, [&](int j, const auto& span) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) at_low += span.exists && moved.key(j, i) == work.guess.low ? 1 : 0;
    });
  }
  const bool appends = work.appends();
  if (appends) {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) shared.u[stage][j * kThreads + threadIdx.x] = words_of(moved.u[j]);
    uint32_t left = flags[0];
    if constexpr (kVectors<T> == 2) left |= flags[1] << kLanes;
    if (left != 0) {
      int32_t at = atomicAdd(&shared.count[counter], count);
      for (; left != 0; left &= left - 1) {
        const int i = __ffs(left) - 1, place = (i / kLanes * kThreads + static_cast<int>(threadIdx.x)) * kLanes + i % kLanes;
        if (at < kStaged) shared.offsets[stage][at++] = static_cast<uint16_t>(place);
      }
    }
  }
  const bool exactly = __syncthreads_or(!finite);
  const int32_t total = shared.count[counter];
  if (threadIdx.x == 0) shared.count[(counter + 2) % 4] = 0;
  if (exactly || total > kStaged) return false;
  counts.above += above;
  counts.at_low += at_low;
  if (!appends)
    counts.unlisted += count;
  else if (warp_of() == turn % kWarps)
    write_down(work, total, reinterpret_cast<const T*>(shared.u[stage]), shared.offsets[stage]);
  return true;
}

template <bool kWrite>
__global__ void __launch_bounds__(kThreads, kStreamBlocks)
    stream_kernel(const __grid_constant__ PerturbTable table, const TopkMemory memory, const Perturbation p) {
  __shared__ Shared shared;
  Claims claims(&memory.progress->sample_slices);
  if (threadIdx.x < 4) shared.count[threadIdx.x] = 0;
  __syncthreads();
  if (kWrite && blockIdx.x == 0 && threadIdx.x == 0) *p.perturbed = 1;
  for (int i = blockIdx.x; i < table.count; i += gridDim.x)  // for `finish`
    if (threadIdx.x == 0) memory.tensors[table.entries_before + i] = {table.entries[i], table.tasks_before + (i > 0 ? table.ends[i - 1] : 0)};
  Counts counts;
  int32_t set = -2;
  uint32_t turn = 0;  // of the block, counted in chunks of whole vectors
  for_own_tasks(table, [&](const PerturbEntry& entry, const Task& task, uint32_t place) {
    claims.work(memory.sample_slices, [&](uint32_t slice) { shared.bracketing.run(memory, slice); });  // before the first chunk
    if (entry.set != set) {
      if (set >= 0) counts.flush(memory.sets[set]);
      counts = {};  // what was counted in dense tensors too
      set = entry.set;
      __syncthreads();
      if (threadIdx.x == 0) {
        shared.guess = set >= 0 ? wait_for_guess(memory.sets[set]) : Guess{kNanKey, kNanKey, kKeepAll, false};  // outside of all sets all is kept
        shared.shift = first_shift(shared.guess);
      }
      __syncthreads();
    }
    const Work work = {entry, task.number, table.tasks_before + place, table.entries_before + task.entry, shared.guess, shared.shift, memory, p};
    if (!work.appends() && threadIdx.x == 0) work.record(0, 0);
    with_types(entry, [&](auto t, auto w) {
      using T = decltype(t);
      using W = decltype(w);
      if (!entry.whole || !stream_whole<kWrite, T, W>(work, turn++, counts, shared)) stream_exactly<kWrite, T, W>(work, entry.whole, counts, shared);
    });
  });
  if (set >= 0) counts.flush(memory.sets[set]);
}

}  // namespace

void topk_stream(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, bool write, Stream stream) {
  for (const PerturbTable& table : plan.chunks)
    launch("top-k, stream", write ? stream_kernel<true> : stream_kernel<false>, tasks_in(table), stream, table, memory, p);
}

}  // namespace cuda
}  // namespace cram
