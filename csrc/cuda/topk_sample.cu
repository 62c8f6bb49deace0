// The selection sets in the workspace, and a bracket around the k-th largest key of each, from a histogram of a sample.
#include "block.cuh"
#include "launch.h"
#include "source.cuh"
#include "topk.h"

namespace cram {
namespace cuda {
namespace {

// Bins are 2^16 keys wide: 0.1 % of the weights or so. Zero, the most frequent of ties, has its own.
__device__ __forceinline__ int bin_of(int32_t key) { return key == 0 ? 0 : 1 + (key >> 16); }
__device__ __forceinline__ int32_t below_bin(int bin) { return bin == 0 ? kKeepAll : max(((bin - 1) << 16) - 1, 0); }
__device__ __forceinline__ int32_t top_of_bin(int bin, int32_t key_step) {
  return bin == 0 ? 0 : min(((bin - 1) << 16) + (1 << 16) - key_step, kNanKey);
}

__device__ __forceinline__ void set_bracket(SetState& state, int32_t low, int32_t high, int32_t cut) {
  state.low = low;
  state.high = high;
  state.cut = cut;
  state.append = writes_candidates(low, high);
  state.shift = 0;
  while ((high - low - 1) >> state.shift >= kDigitBins) ++state.shift;
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ SetTable table, const TopkMemory memory, unsigned char* tallies, const int64_t* k) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *memory.progress = {};
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const SetEntry& set = table.entries[found.entry];
    const int64_t begin = found.number * kClearBytes, end = min(begin + kClearBytes, tally_bytes(set.samples));
    for (int64_t i = begin + threadIdx.x * 16; i < end; i += kThreads * 16) *reinterpret_cast<uint4*>(tallies + set.tallies + i) = uint4{};
    if (found.number > 0 || threadIdx.x > 0) continue;
    SetState state = {};
    state.numel = set.numel;
    state.k = k[set.index];
    state.samples = set.samples;
    state.key_step = set.key_step;
    state.first = set.first;
    state.capacity = set.capacity;
    state.slices = set.slices;
    state.digits = reinterpret_cast<uint32_t*>(tallies + set.tallies);
    state.sampled = state.digits + 2 * kDigitBins;
    state.sampled_groups = state.sampled + kSampleBins;
    state.radix = reinterpret_cast<unsigned long long*>(state.sampled);
    state.settled = state.k < 1 || state.k > state.numel;
    const int32_t threshold = state.k < 1 ? kNanKey : kKeepAll;
    if (state.settled)
      set_bracket(state, threshold, threshold, threshold);
    else
      set_bracket(state, kKeepAll, kNanKey, kKeepAll);
    state.threshold = threshold;
    memory.sets[set.index] = state;
  }
}

struct Brackets {
  uint32_t groups[kSampleGroups];  // of this block's samples
  RankedBins<kSampleBins, uint32_t> sampled;
  Ranked ends[3];
};

// The keys between which the k-th largest lies, but for bad luck. All threads of a block; a warp finds one rank.
__device__ void bracket(SetState& state, Brackets& shared) {
  const double share = static_cast<double>(state.k) / static_cast<double>(state.numel);
  const double rank = share * state.samples;
  const double width = kDeviations * sqrt(rank * (1 - share)) + 1;
  const int64_t upper = static_cast<int64_t>(floor(rank - width)), lower = static_cast<int64_t>(ceil(rank + width)) + 1;
  const int64_t middle = min(max(static_cast<int64_t>(rank + 0.5), int64_t{1}), int64_t{state.samples});
  shared.sampled.take(state.sampled_groups);
  __syncthreads();
  static_assert(kWarps >= 3, "a warp a rank");
  if (warp_of() < 3) {
    const Ranked found = shared.sampled.find(state.sampled, warp_of() == 0 ? upper : warp_of() == 1 ? lower : middle);
    if (lane_of() == 0) shared.ends[warp_of()] = found;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 3 * kDigitBins; i += kThreads) state.radix[i] = 0;  // `sampled` is read
  if (threadIdx.x > 0) return;
  const int32_t key_step = state.key_step;
  // A bin of a single key that many weights share reaches over an end of the bracket: they are counted, not written down.
  const auto tied = [&](const Ranked& end) { return (end.bin == 0 || key_step == 1 << 16) && end.count >= state.samples / kTied; };
  const bool has_upper = upper >= 1, has_lower = lower <= state.samples;
  const int32_t cut_low = below_bin(shared.ends[2].bin), cut_high = top_of_bin(shared.ends[2].bin, key_step);
  if (has_upper && tied(shared.ends[0]) && shared.ends[2].bin == shared.ends[0].bin) {  // it is the threshold
    set_bracket(state, cut_high - 1, cut_high, cut_high);
    return;
  }
  int32_t low = has_lower ? below_bin(shared.ends[1].bin) : kKeepAll, high = has_upper ? top_of_bin(shared.ends[0].bin, key_step) : kNanKey;
  if (has_upper && tied(shared.ends[0])) high -= key_step;
  if (has_lower && tied(shared.ends[1]) && shared.ends[1].bin != shared.ends[0].bin) {
    low = top_of_bin(shared.ends[1].bin, key_step);
    state.ties_below = true;
  }
  set_bracket(state, low, high, high - low > 1 ? min(max(cut_low / 2 + cut_high / 2, low), high) : high);
}

// Elements at a hashed place of each of state.samples equal strata of a set: task t of a tensor has kThreads of those that may lie in it.
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ PerturbTable table, const TopkMemory memory, const Perturbation p) {
  __shared__ Brackets shared;
  for (int g = threadIdx.x; g < kSampleGroups; g += kThreads) shared.groups[g] = 0;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    SetState& state = memory.sets[entry.set];
    const int64_t numel = state.numel, samples = state.samples;
    const int64_t j = entry.extra * samples / numel + found.number * kThreads + threadIdx.x;
    const int64_t low = j * numel / samples, high = (j + 1) * numel / samples;
    const int64_t place = low + static_cast<int64_t>(scramble(j) % static_cast<uint64_t>(high - low)) - entry.extra;
    const bool mine = j < samples && place >= 0 && place < entry.numel;
    int bin = 0;
    if (mine) {
      with_types(entry, [&](auto t, auto w) {
        bool ignored = false;
        bin = bin_of(magnitude_key(Source<decltype(t), decltype(w)>(entry, entry.param, p).at(place, &ignored)));
      });
    }
    __syncthreads();  // the groups are clear
    tally(state.sampled, bin, mine);
    tally(shared.groups, bin / kGroupBins, mine);
    __syncthreads();
    for (int g = threadIdx.x; g < kSampleGroups; g += kThreads) {
      if (shared.groups[g] > 0) atomicAdd(state.sampled_groups + g, shared.groups[g]);
      shared.groups[g] = 0;
    }
    if (is_last(&state.samples_done, __syncthreads_count(mine), static_cast<uint32_t>(samples)) && !state.settled) bracket(state, shared);
  }
}

}  // namespace

void topk_prepare(const TopkPlan& plan, const TopkMemory& memory, unsigned char* tallies, const int64_t* k, Stream stream) {
  for (const SetTable& table : plan.sets) launch("top-k, prepare", prepare_kernel, tasks_in(table), stream, table, memory, tallies, k);
}

void topk_sample(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, Stream stream) {
  for (const PerturbTable& table : plan.samples)
    if (table.count > 0) launch("top-k, sample", sample_kernel, tasks_in(table), stream, table, memory, p);
}

}  // namespace cuda
}  // namespace cram
