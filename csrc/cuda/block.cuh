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

// bins[bin] += 1 for each thread with `counts`; lanes with the same bin add once. All threads of a warp call it.
template <class Count>
__device__ __forceinline__ void tally(Count* bins, int bin, bool counts) {
  if (__ballot_sync(kAllLanes, counts) == 0) return;
  const uint32_t peers = __match_any_sync(kAllLanes, counts ? bin : -1);
  if (counts && lane_of() == __ffs(peers) - 1) atomicAdd(bins + bin, static_cast<Count>(__popc(peers)));
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t x) { return __reduce_add_sync(kAllLanes, x); }
__device__ __forceinline__ unsigned long long warp_sum(unsigned long long x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The last of n numbers, each at least as large as the one before, that is at most `wanted`, as the first is. All lanes of a warp.
template <class NumberAt>
__device__ __forceinline__ int32_t last_at_most(int32_t n, uint32_t wanted, NumberAt number) {
  int32_t low = 0;
  while (n > 1) {
    const int32_t step = (n + 31) / 32, own = lane_of() * step;
    const int32_t found = __popc(__ballot_sync(kAllLanes, own < n && number(low + own) <= wanted)) - 1;
    low += found * step;
    n = min(step, n - found * step);
  }
  return low;
}

struct Ranked {
  int32_t bin;
  int64_t rank;   // within the bin, from its largest, 1-based
  int64_t count;  // in the bin
};

// Finds numbers by rank in a histogram of kBins counts in global memory: count() or take() first, then after a barrier find(), by whole warps. What
// is read is coalesced, and past the first-level cache: other blocks of this launch may have written the bins.
template <int kBins, class Count>
class RankedBins {
 public:
  // The sums of the groups, which are known.
  __device__ __forceinline__ void take(const Count* sums) {
    for (int g = threadIdx.x; g < kGroups; g += kThreads) sums_[g] = __ldcg(sums + g);
  }

  // The sums of groups of bins, a warp a group. All threads of the block.
  __device__ __forceinline__ void count(const Count* bins) {
    constexpr int kAhead = (kGroups + kWarps - 1) / kWarps < 8 ? (kGroups + kWarps - 1) / kWarps : 8;  // loads before the first is waited for
    for (int begin = warp_of(); begin < kGroups; begin += kWarps * kAhead) {
      Four four[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (begin + i * kWarps < kGroups) four[i].load(bins + (begin + i * kWarps) * kGroup + lane_of() * 4);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (begin + i * kWarps >= kGroups) continue;
        const Count sum = warp_sum(four[i].sum());
        if (lane_of() == 0) sums_[begin + i * kWarps] = sum;
        if constexpr (kKept) kept_[(begin + i * kWarps) * 32 + lane_of()] = four[i];
      }
    }
  }

  // The bin that holds the rank-th largest (1-based) number; {0, rank - total, 0} where there are fewer. All lanes of a warp.
  __device__ __forceinline__ Ranked find(const Count* bins, int64_t rank) const {
    constexpr int kOfLane = (kGroups + 31) / 32;
    Count sums[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int g = kGroups - 1 - (lane_of() * kOfLane + i);
      sums[i] = g >= 0 ? sums_[g] : 0;
    }
    const Place group = place(sums, rank);
    if (group.index < 0) return {0, group.rank, 0};
    const int first = (kGroups - 1 - group.index) * kGroup;
    Four four;
    if constexpr (kKept)
      four = kept_[first / 4 + 31 - lane_of()];
    else
      four.load(bins + first + (31 - lane_of()) * 4);
    const Count counts[4] = {four.x[3], four.x[2], four.x[1], four.x[0]};
    const Place bin = place(counts, group.rank);
    return {first + kGroup - 1 - bin.index, bin.rank, bin.count};
  }

 private:
  static constexpr int kGroup = kGroupBins, kGroups = kBins / kGroup;
  static constexpr bool kKept = sizeof(Count) * kBins <= 8192;  // count() keeps the bins: find() loads nothing

  struct alignas(16) Four {
    Count x[4];
    __device__ __forceinline__ void load(const Count* p) {
      const uint4* const words = reinterpret_cast<const uint4*>(p);
      if constexpr (sizeof(Count) == 4) {
        const uint4 a = __ldcg(words);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
      } else {
        const uint4 a = __ldcg(words), b = __ldcg(words + 1);
        x[0] = a.x | static_cast<Count>(a.y) << 32, x[1] = a.z | static_cast<Count>(a.w) << 32;
        x[2] = b.x | static_cast<Count>(b.y) << 32, x[3] = b.z | static_cast<Count>(b.w) << 32;
      }
    }
    __device__ __forceinline__ Count sum() const { return x[0] + x[1] + x[2] + x[3]; }
  };

  struct Place {
    int index;  // -1: there is none, and `rank` is what is left
    int64_t rank, count;
  };

  // Which of the counts of a warp, the first lane's first, from the largest bin down, holds the rank.
  template <int kOfLane>
  static __device__ __forceinline__ Place place(const Count (&counts)[kOfLane], int64_t rank) {
    int64_t own = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) own += counts[i];
    const int64_t inclusive = warp_inclusive_sum(own);
    const uint32_t reached = __ballot_sync(kAllLanes, inclusive >= rank);
    if (reached == 0) return {-1, rank - __shfl_sync(kAllLanes, inclusive, 31), 0};
    int64_t larger = inclusive - own;
    Place found = {-1, 0, 0};
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      if (found.index < 0 && rank <= larger + static_cast<int64_t>(counts[i]))
        found = {lane_of() * kOfLane + i, rank - larger, static_cast<int64_t>(counts[i])};
      larger += counts[i];
    }
    const int lane = __ffs(reached) - 1;
    return {__shfl_sync(kAllLanes, found.index, lane), __shfl_sync(kAllLanes, found.rank, lane), __shfl_sync(kAllLanes, found.count, lane)};
  }

  Count sums_[kGroups];
  Four kept_[kKept ? kBins / 4 : 1];
};

// The bin of one rank (RankedBins). All threads of the block.
template <int kBins, class Count>
__device__ __forceinline__ Ranked find_rank(const Count* bins, int64_t rank) {
  __shared__ RankedBins<kBins, Count> ranked;
  __syncthreads();  // what was called before has been read
  ranked.count(bins);
  __syncthreads();
  return ranked.find(bins, rank);
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

// Pieces of work that the blocks of a launch claim in order. Whoever has found that none is left, and waits for one to be done, waits for a block
// that runs and does not wait: no launch has to be resident as a whole.
class Claims {
 public:
  // The first claim is under way while the block does something else.
  __device__ __forceinline__ explicit Claims(uint32_t* claimed) : claimed_(claimed) { ask(); }

  // Calls f(piece), by all threads of the block, until none of `pieces` is left.
  template <class Function>
  __device__ __forceinline__ void work(uint32_t pieces, Function f) {
    __shared__ uint32_t piece;
    while (left_) {
      if (threadIdx.x == 0) piece = asked_;
      __syncthreads();
      const uint32_t own = piece;
      left_ = own < pieces;
      if (left_) f(own);
      __syncthreads();
      if (left_) ask();
    }
  }

 private:
  __device__ __forceinline__ void ask() {
    if (threadIdx.x == 0) asked_ = atomicAdd(claimed_, 1u);
  }

  uint32_t* claimed_;
  uint32_t asked_ = 0;  // in thread 0
  bool left_ = true;
};

// What another block of this launch may have written.
template <class Number>
__device__ __forceinline__ Number seen(const Number& x) {
  return *static_cast<const volatile Number*>(&x);
}

}  // namespace cuda
}  // namespace cram
