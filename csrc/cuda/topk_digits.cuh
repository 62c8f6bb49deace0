// What the radix launches have found out about a threshold.
#pragma once

#include "block.cuh"
#include "source.cuh"
#include "topk.h"

namespace cram {
namespace cuda {

constexpr int kPasses = 3;  // digits of 11, 10 and 10 bits
CRAM_HOST_DEVICE constexpr int digit_shift(int pass) { return 20 - 10 * pass; }
CRAM_HOST_DEVICE constexpr int digit_mask(int pass) { return pass == 0 ? 2047 : 1023; }

// The digits of the threshold that the passes before `pass` have found, and the rank that is left. All threads of a block.
static __device__ __forceinline__ Ranked digits_before(const SetState& state, int pass) {
  Ranked found = {0, state.k, 0};
  for (int before = 0; before < pass; ++before) {
    const Ranked digit = find_rank<kDigitBins>(state.radix + before * kDigitBins, found.rank);
    found = {found.bin << 10 | digit.bin, digit.rank, digit.count};
  }
  return found;
}

}  // namespace cuda
}  // namespace cram
