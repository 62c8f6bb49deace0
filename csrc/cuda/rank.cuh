// N:M: which keys of a group are among the n largest, in the registers of one thread (docs/contract.md: N:M).
#pragma once

#include "../number.h"

namespace cram {
namespace cuda {

// Bit i: key[i] is among the n largest of M; of equal keys the later ones stay. Each key has four bits of a word for the number of keys that it beats,
// so that a pair costs a comparison and an addition, and one test of all fields tells who stays.
template <int M>
__device__ __forceinline__ uint32_t among_largest(const int32_t (&key)[M], int n) {
  static_assert(M == 4 || M == 8, "fields of four bits in 32");
  // A field starts as if its key beat all before it, plus what makes its upper bit say that at least M - n keys are beaten.
  uint32_t fields = 0;
#pragma unroll
  for (int i = 0; i < M; ++i) fields |= static_cast<uint32_t>(i) << (4 * i);
  fields += (M == 4 ? 0x1111u : 0x11111111u) * static_cast<uint32_t>(8 - M + n);
#pragma unroll
  for (int j = 1; j < M; ++j)
#pragma unroll
    for (int i = 0; i < j; ++i)
      if (key[j] < key[i]) fields += (1u << (4 * i)) - (1u << (4 * j));
  const auto packed = [](uint32_t x) { return (((x >> 3) & 0x1111u) * 0x249u >> 9) & 15u; };  // the upper bits of four fields, side by side
  return M == 4 ? packed(fields) : packed(fields) | packed(fields >> 16) << 4;
}

}  // namespace cuda
}  // namespace cram
