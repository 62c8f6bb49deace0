// The norm of all gradients, summed in float64 in the order of docs/contract.md: Norm. One warp folds a chunk of 1024 elements in its registers.
#include "../restore.h"
#include "launch.h"
#include "launchers.h"
#include "vector.cuh"

namespace cram {
namespace cuda {
namespace {

constexpr int64_t kNormChunk = 1024;
constexpr int kWarps = kThreads / 32;

struct NormEntry {
  const void* grad;
  int64_t numel;
  DType dtype;
};

using NormTable = Table<NormEntry>;

int64_t norm_chunks(int64_t numel) { return (numel + kNormChunk - 1) / kNormChunk; }

// Folds x[0 .. n) of this thread: the second half onto the first until one is left. n: a power of two.
template <int n>
__device__ __forceinline__ void fold(double* x) {
#pragma unroll
  for (int half = n / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] = __dadd_rn(x[i], x[i + half]);
}

// Lane l of the warp has the vectors l, l + 32, ... of the chunk, so that a fold pairs, in this order, vectors of a lane, lanes, elements of a
// vector.
template <class T>
__device__ __forceinline__ double chunk_sum(const T* grad, int64_t numel, int64_t chunk, float inv_scale, bool scaled) {
  constexpr int kLanes = Vector<T>::kLanes, kVectors = kNormChunk / 32 / kLanes;
  const int lane = threadIdx.x % 32;
  const int64_t begin = chunk * kNormChunk;
  const int size = static_cast<int>(min(kNormChunk, numel - begin));
  Lanes<kLanes> g[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int first = (j * 32 + lane) * kLanes;
    g[j] = load_floats(grad, Span<kLanes>{begin + first, 0, max(0, min(kLanes, size - first))});
  }
  double sums[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    double x[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const bool exists = (j * 32 + lane) * kLanes + i < size;
      const double value = exists ? unscaled(g[j][i], inv_scale, scaled) : 0.0f;
      x[j] = __dmul_rn(value, value);
    }
    fold<kVectors>(x);
    sums[i] = x[0];
#pragma unroll
    for (int half = 16; half > 0; half /= 2) sums[i] = __dadd_rn(sums[i], __shfl_down_sync(~0u, sums[i], half));
  }
  fold<kLanes>(sums);
  return sums[0];
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormTable table, const float* inv_scale, double* sums) {
  const bool scaled = inv_scale != nullptr;
  const float factor = scaled ? *inv_scale : 1;
  for (uint32_t task = blockIdx.x * kWarps + threadIdx.x / 32; task < tasks_in(table); task += gridDim.x * kWarps) {
    const Task found = find(table, task);
    const NormEntry& entry = table.entries[found.entry];
    const double sum = with_number_types(entry.dtype, false, [&](auto t, auto) {
      return chunk_sum(static_cast<const decltype(t)*>(entry.grad), entry.numel, found.number, factor, scaled);
    });
    if (threadIdx.x % 32 == 0) sums[table.tasks_before + task] = sum;
  }
}

// One block: folds the sums of n chunks, thought to be followed by zeros up to `size`, a power of two.
__global__ void __launch_bounds__(1024) norm_finish_kernel(double* sums, int64_t n, int64_t size, float* result) {
  for (int64_t half = size / 2; half > 0; half /= 2) {
    for (int64_t i = threadIdx.x; i < half && i + half < n; i += blockDim.x) sums[i] = __dadd_rn(sums[i], sums[i + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) *result = canonical(__double2float_rn(n > 0 ? __dsqrt_rn(sums[0]) : 0.0));
}

}  // namespace
}  // namespace cuda

void GradNorm::run(const cuda::Context& c) {
  using namespace cuda;
  const auto tables = make_tables<NormEntry>(
      items.size(), [&](size_t i) { return NormEntry{items[i].grad, items[i].numel, items[i].dtype}; },
      [&](size_t i) { return norm_chunks(items[i].numel); });
  const int64_t n = tables.back().tasks_before + tasks_in(tables.back());
  double* const sums = static_cast<double*>(c.allocate(n * sizeof(double)));
  for (const NormTable& table : tables) {
    const int64_t chunks = tasks_in(table);
    launch(kName, norm_kernel, (chunks + kWarps - 1) / kWarps, c.stream, table, inv_scale, sums);
  }
  int64_t size = 1;
  while (size < n) size *= 2;
  norm_finish_kernel<<<1, 1024, 0, c.stream>>>(sums, n, size, norm);
  require_success(cudaGetLastError(), kName);
}

}  // namespace cram
