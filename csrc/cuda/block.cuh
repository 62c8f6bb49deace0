// What the threads of a block do together.
#pragma once

#include "table.h"

namespace cram {
namespace cuda {

constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / 32; }

// The sum over the lanes up to and including this one.
template <class Number>
__device__ __forceinline__ Number warp_inclusive_sum(Number x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Number below = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_of() >= distance) x += below;
  }
  return x;
}

// The sums of the warps, and where a warp begins; a barrier lies between put() and begin().
template <class Number>
struct WarpSums {
  Number sums[kWarps];

  __device__ __forceinline__ void put(Number inclusive) {
    if (lane_of() == 31) sums[warp_of()] = inclusive;
  }
  __device__ __forceinline__ Number begin(Number* total) const {
    Number before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp_of()) before = all;
      all += sums[w];
    }
    *total = all;
    return before;
  }
};

// bins[bin] += 1 for each thread with `counts`; lanes with the same bin add once. All threads of a warp call it.
template <class Count>
__device__ __forceinline__ void tally(Count* bins, int bin, bool counts) {
  if (__ballot_sync(kAllLanes, counts) == 0) return;
  const uint32_t peers = __match_any_sync(kAllLanes, counts ? bin : -1);
  if (counts && lane_of() == __ffs(peers) - 1) atomicAdd(bins + bin, static_cast<Count>(__popc(peers)));
}

struct Ranked {
  int32_t bin;
  int64_t rank;  // within the bin, from its largest, 1-based
};

// The bin that holds the rank-th largest (1-based) number of a histogram; {0, rank - total} where it has fewer numbers. All threads call it; `shared`
// is free again after the next barrier. Reads past the first-level cache: other blocks of this launch may have written the bins.
template <int kBins, class Count>
__device__ __forceinline__ Ranked find_rank(const Count* bins, int64_t rank) {
  constexpr int kOwn = kBins / kThreads;
  __shared__ WarpSums<int64_t> warps;
  __shared__ Ranked found;
  const Count* const own = bins + kBins - (threadIdx.x + 1) * kOwn;  // thread 0 has the largest
  int64_t sum = 0;
#pragma unroll 8
  for (int i = 0; i < kOwn; ++i) sum += __ldcg(own + i);
  const int64_t inclusive = warp_inclusive_sum(sum);
  __syncthreads();
  warps.put(inclusive);
  if (threadIdx.x == 0) found = {0, 0};
  __syncthreads();
  int64_t total;
  int64_t larger = warps.begin(&total) + inclusive - sum;
  if (threadIdx.x == 0 && rank > total) found = {0, rank - total};
  if (rank > larger && rank <= larger + sum) {
    int i = kOwn - 1;
    for (int64_t count; rank > larger + (count = __ldcg(own + i)); --i) larger += count;
    found = {static_cast<int32_t>(own + i - bins), rank - larger};
  }
  __syncthreads();
  return found;
}

// True in all threads of the block that brings *done to `total`: what the others wrote before is visible to it. `own` is this block's share.
__device__ __forceinline__ bool is_last(uint32_t* done, uint32_t own, uint32_t total) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = own > 0 && atomicAdd(done, own) + own == total;
  __syncthreads();
  const bool result = last;
  if (result) __threadfence();
  return result;
}

}  // namespace cuda
}  // namespace cram
