// How many keys of each set have which digit, under a prefix: what several ranks add up to find a threshold over all of them.
#include "launch.h"
#include "source.cuh"

namespace cram {
namespace cuda {
namespace {

constexpr int kSharedBits = 11;  // digits up to this are counted within a block first

struct Digit {
  const int64_t* prefix;  // [num_sets]
  int shift, bits;

  __device__ bool counts(int32_t key, int64_t before) const { return key >> (shift + bits) == before; }
  __device__ int of(int32_t key) const { return key >> shift & ((1 << bits) - 1); }
};

template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const __grid_constant__ PerturbTable table, const Perturbation p, const Digit digit, unsigned long long* const bins) {
  __shared__ uint32_t counted[kShared ? 1 << kSharedBits : 1];
  const int size = 1 << digit.bits;
  const auto flush = [&](int32_t set) {  // by all threads; leaves `counted` clear
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      if (set >= 0 && counted[i] > 0) atomicAdd(bins + (static_cast<int64_t>(set) << digit.bits) + i, static_cast<unsigned long long>(counted[i]));
      counted[i] = 0;
    }
    __syncthreads();
  };
  if constexpr (kShared) {
    for (int i = threadIdx.x; i < size; i += kThreads) counted[i] = 0;
    __syncthreads();
  }
  int32_t set = -1;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    if (entry.set != set) {
      if constexpr (kShared) flush(set);
      set = entry.set;
    }
    const int64_t before = digit.prefix[set];
    with_chunks(entry, found.number, [&](auto t, auto w, const auto& chunk) {
      using T = decltype(t);
      const T* const weights = static_cast<const T*>(entry.param);
      const Source<T, decltype(w)> source(entry, weights, p);
      for_vectors(chunk, weights, [&](int, const auto& span) {
        const auto u = source.of(span);
#pragma unroll
        for (int i = 0; i < Vector<T>::kLanes; ++i) {
          const int32_t key = magnitude_key(u[i]);
          if (!span.has(i) || !digit.counts(key, before)) continue;
          if constexpr (kShared)
            atomicAdd(counted + digit.of(key), 1u);
          else
            atomicAdd(bins + (static_cast<int64_t>(set) << digit.bits) + digit.of(key), 1ull);
        }
      });
    });
  }
  if constexpr (kShared) flush(set);
}

}  // namespace
}  // namespace cuda

void TopkHistogram::run(const cuda::Context& c) {
  using namespace cuda;
  cuda::Perturbation p;
  p.rho = rho.values;
  p.rho_per_tensor = rho.each;
  p.inv_scale = inv_scale;
  const Digit digit = {prefix, static_cast<int>(shift), static_cast<int>(bits)};
  const auto tables = make_tables<PerturbEntry>(
      items.size(), [&](size_t i) { return perturb_entry(items[i], i); },
      [&](size_t i) { return items[i].set < 0 ? 0 : chunks_of(items[i].param, items[i].numel); });
  const auto kernel = bits <= kSharedBits ? histogram_kernel<true> : histogram_kernel<false>;
  for (const PerturbTable& table : tables)
    if (tasks_in(table) > 0) launch(kName, kernel, tasks_in(table), c.stream, table, p, digit, reinterpret_cast<unsigned long long*>(bins));
}

}  // namespace cram
