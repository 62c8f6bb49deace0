// A bracket around the k-th largest key of each set, from a histogram of a sample.
#pragma once

#include "block.cuh"
#include "topk.h"

namespace cram {
namespace cuda {

// Ranks of the sample between which the k-th largest of the set lies, but for bad luck: once in 16,000 steps.
static __device__ __forceinline__ SampleRanks ranks_of(int64_t k, int64_t numel, int32_t samples) {
  const double share = static_cast<double>(k) / static_cast<double>(numel), rank = share * samples;
  const double width = kDeviations * sqrt(rank * (1 - share)) + 1;
  const int64_t middle = min(max(static_cast<int64_t>(rank + 0.5), int64_t{1}), int64_t{samples});
  return {static_cast<int32_t>(floor(rank - width)), static_cast<int32_t>(ceil(rank + width)) + 1, static_cast<int32_t>(middle)};
}

// Bins are 2^16 keys wide: 0.1 % of the weights or so. Zero, the most frequent of ties, has its own.
static __device__ __forceinline__ int bin_of(int32_t key) { return key == 0 ? 0 : 1 + (key >> 16); }
static __device__ __forceinline__ int32_t below_bin(int bin) { return bin == 0 ? kKeepAll : max(((bin - 1) << 16) - 1, 0); }
static __device__ __forceinline__ int32_t top_of_bin(int bin, int32_t key_step) {
  return bin == 0 ? 0 : min(((bin - 1) << 16) + (1 << 16) - key_step, kNanKey);
}

// Levels are kKeepAll or more, and below 2^31 - 1: each is one more in its half of a word, whose upper bit says that there is a guess.
static __device__ __forceinline__ GuessWords words_of(const Guess& guess) {
  constexpr unsigned long long kThere = 1ull << 63;
  const auto half = [](int32_t level) { return static_cast<unsigned long long>(level + 1); };
  return {kThere | half(guess.high) << 32 | half(guess.low), kThere | (guess.ties_below ? 1ull << 32 : 0) | half(guess.cut)};
}

// The guess of a set, when there is one. A block that waits has no claim.
static __device__ __forceinline__ Guess wait_for_guess(const SetState& state) {
  GuessWords words;
  while ((words.ends = seen(state.guess_words.ends)) == 0) {
  }
  while ((words.cut = seen(state.guess_words.cut)) == 0) {
  }
  const auto level = [](unsigned long long half) { return static_cast<int32_t>(half & 0x7fffffffu) - 1; };
  return {level(words.ends), level(words.ends >> 32), level(words.cut), (words.cut >> 32 & 1) != 0};
}

// In shared memory.
class Bracketing {
 public:
  // Counts a slice of the sampled keys; the block that counts the last one of a set brackets it. All threads of the block.
  __device__ __forceinline__ void run(const TopkMemory& memory, uint32_t slice) {
    for (int g = threadIdx.x; g < kSampleGroups; g += kThreads) groups_[g] = 0;
    SetState& state = memory.sets[last_at_most(memory.num_sets, slice, [&](int32_t s) { return memory.sets[s].sample_slices_before; })];
    const int64_t first = (slice - state.sample_slices_before) * kSliceSize + threadIdx.x * kSelectAhead;
    const uint4 bins = *reinterpret_cast<const uint4*>(memory.samples + slice * kSliceSize + threadIdx.x * kSelectAhead);
    const uint32_t words[4] = {bins.x, bins.y, bins.z, bins.w};
    const uint32_t samples = static_cast<uint32_t>(state.samples);
    const bool settled = state.settled;
    const int own = static_cast<int>(min(max(samples - first, int64_t{0}), int64_t{kSelectAhead}));
    __syncthreads();  // the groups are clear
#pragma unroll
    for (int i = 0; i < kSelectAhead; ++i) {
      const int bin = static_cast<int>(words[i / 2] >> (i % 2 * 16) & 0xffffu);
      tally(state.sampled, bin, i < own);
      tally(groups_, bin / kGroupBins, i < own);
    }
    __syncthreads();
    for (int g = threadIdx.x; g < kSampleGroups; g += kThreads)
      if (groups_[g] > 0) atomicAdd(state.sampled_groups + g, groups_[g]);
    const uint32_t begin = (slice - state.sample_slices_before) * static_cast<uint32_t>(kSliceSize);
    if (is_last(&state.samples_done, min(samples - begin, static_cast<uint32_t>(kSliceSize)), samples) && !settled) bracket(state);
  }

 private:
  // The keys between which the k-th largest lies, but for bad luck. All threads of a block; a warp finds one rank.
  __device__ __forceinline__ void bracket(SetState& state) {
    const SampleRanks ranks = state.ranks;
    const int32_t key_step = state.key_step, samples = state.samples;
    sampled_.take(state.sampled_groups);
    __syncthreads();
    static_assert(kWarps >= 3, "a warp a rank");
    if (warp_of() < 3) {
      const Ranked found = sampled_.find(state.sampled, warp_of() == 0 ? ranks.upper : warp_of() == 1 ? ranks.lower : ranks.middle);
      if (lane_of() == 0) ends_[warp_of()] = found;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const Guess guess = guess_of(ranks, key_step, samples);
      const GuessWords words = words_of(guess);
      atomicExch(&state.guess_words.ends, words.ends);
      atomicExch(&state.guess_words.cut, words.cut);
      state.guess = guess;
    }
    for (int i = threadIdx.x; i < kPasses * kDigitBins; i += kThreads) state.radix[i] = 0;  // `sampled` is read
  }

  __device__ __forceinline__ Guess guess_of(const SampleRanks& ranks, int32_t key_step, int32_t samples) const {
    const Ranked &upper = ends_[0], &lower = ends_[1], &middle = ends_[2];
    const auto has_one_key = [&](const Ranked& found) { return found.bin == 0 || key_step == 1 << 16; };
    // A bin of a single key that many weights share reaches over an end of the bracket: they are counted, not written down.
    const auto tied = [&](const Ranked& end) { return has_one_key(end) && end.count >= samples / kTied; };
    const bool has_upper = ranks.upper >= 1, has_lower = ranks.lower <= samples;
    const int32_t cut_low = below_bin(middle.bin), cut_high = top_of_bin(middle.bin, key_step);
    if (has_upper && tied(upper) && middle.bin == upper.bin) return {cut_high - 1, cut_high, cut_high, false};  // it is the threshold
    int32_t low = has_lower ? below_bin(lower.bin) : kKeepAll, high = has_upper ? top_of_bin(upper.bin, key_step) : kNanKey;
    const bool ties_below = has_lower && tied(lower) && lower.bin != upper.bin;
    if (has_upper && tied(upper)) high -= key_step;
    if (ties_below) low = top_of_bin(lower.bin, key_step);
    const int32_t cut = has_one_key(middle) ? cut_high : cut_low / 2 + cut_high / 2;  // the guess: few weights will have to be set right
    return {low, high, high - low > 1 ? min(max(cut, low), high) : high, ties_below};
  }

  uint32_t groups_[kSampleGroups];  // of this block's samples
  RankedBins<kSampleBins, uint32_t> sampled_;
  Ranked ends_[3];
};

}  // namespace cuda
}  // namespace cram
