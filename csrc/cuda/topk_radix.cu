// Digit after digit of the threshold from all keys of the sets whose guess has failed. Where none has, every block leaves at once.
#include "launch.h"
#include "topk_digits.cuh"

namespace cram {
namespace cuda {
namespace {

// The keys of a set that a block has counted so far.
struct RadixBins {
  uint32_t counts[kDigitBins];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kDigitBins; i += kThreads) counts[i] = 0;
    __syncthreads();
  }
  __device__ void flush(unsigned long long* bins) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDigitBins; i += kThreads) {
      if (counts[i] > 0) atomicAdd(bins + i, static_cast<unsigned long long>(counts[i]));
      counts[i] = 0;
    }
    __syncthreads();
  }
};

template <int kPass>
__global__ void __launch_bounds__(kThreads, kRadixBlocks)
    radix_kernel(const __grid_constant__ PerturbTable table, const TopkMemory memory, const Perturbation p, const bool from_saved) {
  if (*memory.any_fallback == 0) return;
  __shared__ RadixBins bins;
  bins.clear();
  int32_t set = -1, prefix = 0;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    if (entry.set < 0 || !memory.sets[entry.set].fallback) continue;
    if (entry.set != set) {
      if (set >= 0) bins.flush(memory.sets[set].radix + kPass * kDigitBins);
      set = entry.set;
      prefix = digits_before(memory.sets[set], kPass).bin;
    }
    with_types(entry, [&](auto t, auto w) {
      using T = decltype(t);
      const T* const weights = static_cast<const T*>(from_saved ? entry.saved : entry.param);
      const Source<T, decltype(w)> source(entry, weights, p);
      const Chunk chunk(entry.param, entry.numel, found.number);
      for_vectors(chunk, static_cast<const T*>(entry.param), [&](int, const auto& span) {
        auto u = load_floats(source.weights, span);
        bool ignored = false;
        source.move(u, span, &ignored);
#pragma unroll
        for (int i = 0; i < Vector<T>::kLanes; ++i) {
          const int32_t key = magnitude_key(u[i]);
          if (span.has(i) && key / (digit_mask(kPass) + 1) >> digit_shift(kPass) == prefix)
            atomicAdd(bins.counts + (key >> digit_shift(kPass) & digit_mask(kPass)), 1u);
        }
      });
    });
  }
  if (set >= 0) bins.flush(memory.sets[set].radix + kPass * kDigitBins);
}

}  // namespace

void topk_radix(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, bool from_saved, Stream stream) {
  for (auto kernel : {radix_kernel<0>, radix_kernel<1>, radix_kernel<2>})
    for (const PerturbTable& table : plan.chunks) launch("top-k, radix", kernel, tasks_in(table), stream, table, memory, p, from_saved);
}

}  // namespace cuda
}  // namespace cram
