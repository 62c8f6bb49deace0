// A bracket around the threshold, then the pass over all weights: perturb, save, prune on the guess, mask bits; count what lies above the bracket and
// write down what lies inside.
#include "launch.h"
#include "mask.cuh"
#include "source.cuh"
#include "topk_levels.cuh"
#include "topk_listing.cuh"

namespace cram {
namespace cuda {
namespace {

// Adds what the lanes of a warp have counted: 2^27 each at the most, for 2^40 weights on 32 blocks.
__device__ __forceinline__ void add(unsigned long long* counter, uint32_t own) {
  const uint32_t sum = warp_sum(own);
  if (lane_of() == 0 && sum > 0) atomicAdd(counter, static_cast<unsigned long long>(sum));
}

struct Shared {
  Bracketing bracketing;
  Run run;
  MaskStage mask;
  // Two chunks take turns: while one warp writes down the candidates of a chunk, the others go on to the next.
  uint4 u[2][kThreads * 2];                // of a chunk, as its numbers lie in memory
  alignas(16) uint16_t bits[2][kThreads];  // of the weights of each thread (Levels::sort)
  uint16_t list[kChunk];                   // of a chunk's candidates: the bit of each among all threads' upper bytes
  int32_t total;                           // and `place`: of stream_exactly
  int64_t place;
};

// The exact path, for any chunk: one with cut vectors, fewer weights than others, an Inf or a NaN. again: the fast path has overwritten the weights,
// which are read from where it saved them. By all threads of the block.
template <bool kWrite, class T, class W>
__device__ __forceinline__ void stream_exactly(const PerturbEntry& entry, const TopkMemory& memory, const Perturbation& p, Shared& shared,
                                               uint32_t number, bool again) {
  constexpr int kLanes = Vector<T>::kLanes;
  const Run& run = shared.run;
  T* const param = static_cast<T*>(entry.param);
  const Chunk chunk(param, entry.numel, number);
  MovedVectors<T, W> moved;
  const T* const own = again && entry.saved != nullptr ? static_cast<const T*>(entry.saved) : param;
  const Source<T, W> source(entry, own, p);
  moved.issue(source, own, param, chunk);
  moved.move_exactly(source, param, chunk, p.found_inf);
  uint32_t flags[kVectors<T>], kept[kVectors<T>];
  int32_t count = 0;
  uint32_t nans = 0, above = 0, at_low = 0;
  for_vectors(chunk, param, [&](int j, const auto& span) {
    uint32_t over = 0, inside = 0, nan = 0;
    kept[j] = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int32_t key = moved.key(j, i);
      kept[j] |= (key > run.guess.cut && key != kNanKey ? 1u : 0u) << i;
      over |= (key > run.guess.high ? 1u : 0u) << i;
      inside |= (key > run.guess.low ? 1u : 0u) << i;
      nan |= (key == kNanKey ? 1u : 0u) << i;
      if (run.guess.ties_below && span.has(i) && key == run.guess.low) ++at_low;
    }
    const uint32_t real = span.lanes();  // beyond the end, 0 * an infinite rho is a NaN
    kept[j] &= real;
    flags[j] = inside & ~over & real;
    count += __popc(flags[j]);
    above += __popc(over & real);
    nans += __popc(nan & real);
    if constexpr (kWrite) {
      if (entry.saved != nullptr && !again) store(static_cast<T*>(entry.saved), moved.raw[j], span);
      store(param, pruned(moved.u[j], kept[j]), span);
    }
  });
  if (!run.appends() && threadIdx.x == 0) run.record(memory, number, 0, 0);
  if (entry.set < 0) return;
  SetState& state = memory.sets[entry.set];
  add(&state.nans, nans);
  add(&state.above, above);
  add(&state.at_low, at_low);
  if (kWrite && entry.mask != nullptr) write_mask<T>(chunk, param, entry.mask, kept, shared.mask);
  if (!run.appends()) {
    add(&state.candidates, count);
    return;
  }
  __syncthreads();  // what such a chunk before left in `total` and `place` has been read
  if (threadIdx.x == 0) shared.total = 0;
  __syncthreads();
  const int32_t at = count > 0 ? atomicAdd(&shared.total, count) : 0;
  __syncthreads();
  if (threadIdx.x == 0) shared.place = run.reserve(memory, number, shared.total);
  __syncthreads();
  if (shared.place < 0) return;
  const Source<T, W> written(entry, entry.saved != nullptr ? entry.saved : param, p);
  int64_t next = shared.place + at;
  const int32_t low = run.guess.low, shift = run.shift;
  const bool packed = run.packed;
  uint32_t* const digits = run.digits;
  for_vectors(chunk, param, [&](int j, const auto& span) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const bool candidate = flags[j] >> i & 1;
      bool ignored = false;  // read anew: its registers are needed meanwhile
      const float u = candidate ? written.at(span.first + i, &ignored) : 0.0f;
      tally(digits, (magnitude_key(u) - low - 1) >> shift, candidate);
      if (candidate) write_candidate(memory, next++, u, static_cast<uint32_t>(span.first + i - chunk.begin), packed);
    }
  });
}

// The fast path, for chunks from `number` on, full ones of whole vectors: one barrier each. Returns the first of which some u may not be finite, else
// the last one's successor. turn: of the block, counted in such chunks. at_low: of this thread. By all threads of the block.
template <bool kWrite, class T, class W>
__device__ __forceinline__ uint32_t stream_full(const PerturbEntry& entry, const TopkMemory& memory, const Perturbation& p, Shared& shared,
                                                uint32_t number, uint32_t& turn, uint32_t& at_low) {
  Run& run = shared.run;
  T* const param = static_cast<T*>(entry.param);
  T* const saved = static_cast<T*>(entry.saved);
  const Source<T, W> source(entry, param, p);
  const Levels<T> levels(run.guess);
  const uint32_t end = run.full;
  const bool appends = run.appends(), ties_below = run.guess.ties_below;
  for (; number < end; ++number) {
    const FullChunk chunk(number);
    MovedVectors<T, W> moved;
    moved.issue(source, param, param, chunk);
    const uint32_t stage = turn % 2;
    const bool finite = moved.move(source);
    uint32_t bits = 0;
    for_vectors(chunk, param, [&](int j, const auto& span) {
      if (appends) shared.u[stage][j * kThreads + threadIdx.x] = words_of(moved.u[j]);
      Vector<T> out = moved.u[j];
      bits |= levels.sort(j, out);
      if constexpr (kWrite) {
        if (saved != nullptr) store(saved, moved.raw[j], span);
        store(param, out, span);
      }
    });
    shared.bits[stage][threadIdx.x] = static_cast<uint16_t>(bits);
    uint32_t ties = 0;
    if (ties_below) {
#pragma unroll
      for (int j = 0; j < kVectors<T>; ++j)
#pragma unroll
        for (int i = 0; i < Vector<T>::kLanes; ++i) ties += moved.key(j, i) == run.guess.low ? 1 : 0;
    }
    const bool exactly = __syncthreads_or(!finite), mine = warp_of() == turn % kWarps;
    ++turn;
    if (exactly) break;
    at_low += ties;
    if (mine) Listing<T>::write(memory, run, number, kWrite ? entry.mask : nullptr, shared.bits[stage], shared.u[stage], shared.list);
  }
  return number;
}

template <bool kWrite, class T, class W>
__device__ __forceinline__ void stream(const PerturbEntry& entry, const TopkMemory& memory, const Perturbation& p, Shared& shared, uint32_t& turn,
                                       uint32_t& at_low) {
  const Run& run = shared.run;
  for (uint32_t number = run.begin; number < run.end; ++number) {
    const bool fast = number < run.full;
    if (fast) number = stream_full<kWrite, T, W>(entry, memory, p, shared, number, turn, at_low);
    if (number == run.end) return;
    stream_exactly<kWrite, T, W>(entry, memory, p, shared, number, number < run.full);
  }
}

// Has the first weights and gradients of a block, `bytes` or so, brought into the second-level cache, where they wait for the bracket as it does.
__device__ __forceinline__ void prefetch_first(const PerturbTable& table, int64_t bytes) {
  constexpr int kLine = 128;
  for_own_runs(table, [&](const PerturbEntry& entry, const Task& task, uint32_t count, uint32_t) {
    const int size = entry.dtype == static_cast<uint32_t>(DType::kFloat32) ? 4 : 2;
    const int width = size * (entry.grad != nullptr ? 2 : 1) + (entry.master != nullptr ? 4 : 0);
    const int64_t begin = int64_t{task.number} * kChunk;
    const int64_t weights = max(min(min(int64_t{count} * kChunk, entry.numel - begin), bytes / width), int64_t{0});
    bytes -= weights * width;
    const auto fetch = [&](const void* p, int of_weight) {
      if (p == nullptr) return;
      const char* const first = static_cast<const char*>(p) + begin * of_weight;
      for (int at = threadIdx.x * kLine; at < weights * of_weight; at += kThreads * kLine)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(first + at)));
    };
    fetch(entry.param, size);
    fetch(entry.grad, size);
    fetch(entry.master, 4);
  });
}

template <bool kWrite>
__global__ void __launch_bounds__(kThreads, kStreamBlocks)
    stream_kernel(const __grid_constant__ PerturbTable table, const TopkMemory memory, const Perturbation p, const int64_t prefetched) {
  __shared__ Shared shared;
  Claims claims(&memory.progress->sample_slices);
  if (prefetched > 0) prefetch_first(table, prefetched / gridDim.x);
  if (kWrite && blockIdx.x == 0 && threadIdx.x == 0) *p.perturbed = 1;
  for (int i = blockIdx.x; i < table.count; i += gridDim.x)  // for `finish`
    if (threadIdx.x == 0) memory.tensors[table.entries_before + i] = {table.entries[i], table.tasks_before + (i > 0 ? table.ends[i - 1] : 0)};
  claims.work(memory.sample_slices, [&](uint32_t slice) { shared.bracketing.run(memory, slice); });
  constexpr int32_t kNoSet = -2;
  int32_t set = kNoSet;
  uint32_t turn = 0, at_low = 0;
  const auto leave = [&] {
    if (set >= 0 && shared.run.guess.ties_below) add(&memory.sets[set].at_low, at_low);
    at_low = 0;
    __syncthreads();
    if (threadIdx.x == 0) shared.run.leave(memory);
  };
  for_own_runs(table, [&](const PerturbEntry& entry, const Task& task, uint32_t count, uint32_t place) {
    if (set != entry.set && set != kNoSet) leave();
    __syncthreads();
    if (threadIdx.x == 0) {
      if (set != entry.set) shared.run.enter(memory, entry.set);
      shared.run.set_out(table, task, count, place);
    }
    __syncthreads();
    set = entry.set;
    with_types(entry, [&](auto t, auto w) { stream<kWrite, decltype(t), decltype(w)>(entry, memory, p, shared, turn, at_low); });
  });
  if (set != kNoSet) leave();
}

}  // namespace

void topk_stream(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, bool write, Stream stream) {
  int64_t prefetched = second_level_cache("top-k, stream") / kPrefetchedShare;  // by the first launch, which waits for the brackets
  for (const PerturbTable& table : plan.chunks) {
    launch("top-k, stream", write ? stream_kernel<true> : stream_kernel<false>, tasks_in(table), stream, table, memory, p, prefetched);
    prefetched = 0;
  }
}

}  // namespace cuda
}  // namespace cram
