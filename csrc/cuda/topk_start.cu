// Sets up the selection sets in the workspace, and looks at some keys of each.
#include "launch.h"
#include "source.cuh"
#include "topk.h"
#include "topk_bracket.cuh"

namespace cram {
namespace cuda {
namespace {

__device__ __forceinline__ void set_up(const SetEntry& set, int64_t index, const TopkMemory& memory, unsigned char* tallies, const int64_t* k) {
  SetState state = {};
  state.k = k[index];
  state.capacity = set.capacity;
  state.key_step = set.key_step;
  state.threshold = kUnknown;
  state.settled = state.k < 1 || state.k > set.numel;
  state.samples = set.samples;
  state.sample_slices_before = set.sample_slices_before;
  state.slices_before = set.slices_before;
  state.numel = set.numel;
  state.first = set.first;
  state.digits = reinterpret_cast<uint32_t*>(tallies + set.tallies);
  state.sampled = state.digits + 2 * kDigitBins;
  state.sampled_groups = state.sampled + kSampleBins;
  state.radix = reinterpret_cast<unsigned long long*>(state.sampled);
  if (state.settled) {
    const int32_t threshold = state.k < 1 ? kNanKey : kKeepAll;
    state.guess = {threshold, threshold, threshold, false};
  } else {
    state.ranks = ranks_of(state.k, set.numel, set.samples);
    state.guess = {kKeepAll, kNanKey, kKeepAll, false};
  }
  if (state.settled || set.samples == 0) state.guess_words = words_of(state.guess);
  memory.sets[index] = state;
}

// Elements at a hashed place of each of `samples` equal strata of a set: task t of a tensor has kThreads of those that may lie in it.
__device__ __forceinline__ void sample(const SampledEntry& entry, uint32_t task, const TopkMemory& memory, const Perturbation& p) {
  const int64_t numel = entry.set_numel, samples = entry.samples;
  const int64_t j = entry.extra * samples / numel + static_cast<int64_t>(task) * kThreads + threadIdx.x;
  if (j >= samples) return;
  const int64_t low = j * numel / samples, high = (j + 1) * numel / samples;
  const int64_t place = low + static_cast<int64_t>(scramble(j) % static_cast<uint64_t>(high - low)) - entry.extra;
  if (place < 0 || place >= entry.numel) return;
  with_types(entry, [&](auto t, auto w) {
    bool ignored = false;
    const int32_t key = magnitude_key(Source<decltype(t), decltype(w)>(entry, entry.param, p).at(place, &ignored));
    memory.samples[entry.sample_slices_before * kSliceSize + j] = static_cast<uint16_t>(bin_of(key));
  });
}

__global__ void __launch_bounds__(kThreads)
    start_kernel(const __grid_constant__ StartTable table, const TopkMemory memory, unsigned char* tallies, const int64_t* k, const Perturbation p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *memory.progress = {};
  const uint32_t samples = table.sample_tasks(), tasks = samples + table.set_tasks();
  for (uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    if (task < samples) {
      const Task found = find(table.num_tensors, task, [&](int i) { return table.tensors()[i].end; });
      sample(table.tensors()[found.entry], found.number, memory, p);
      continue;
    }
    const Task found = find(table.num_sets, task - samples, [&](int i) { return table.sets()[i].end; });
    const SetEntry& set = table.sets()[found.entry];
    const int64_t begin = found.number * kClearBytes, end = min(begin + kClearBytes, tally_bytes(set.samples));
    for (int64_t i = begin + threadIdx.x * 16; i < end; i += kThreads * 16) *reinterpret_cast<uint4*>(tallies + set.tallies + i) = uint4{};
    if (found.number == 0 && threadIdx.x == 0) set_up(set, table.sets_before + found.entry, memory, tallies, k);
  }
}

}  // namespace

void topk_start(const TopkPlan& plan, const TopkMemory& memory, unsigned char* tallies, const int64_t* k, const Perturbation& p, Stream stream) {
  for (const StartTable& table : plan.starts)
    launch("top-k, start", start_kernel, int64_t{table.sample_tasks()} + table.set_tasks(), stream, table, memory, tallies, k, p);
}

}  // namespace cuda
}  // namespace cram
