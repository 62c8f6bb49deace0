// The ends of a bracket, and the guess within it, as magnitudes are compared with them: four float32 or eight numbers of 16 bits at a time.
#pragma once

#include "topk.h"
#include "vector.cuh"

namespace cram {
namespace cuda {

// What a magnitude of T is compared with: it is above level(key) exactly where its own key is above `key`. The 16-bit types are compared as halves,
// two at a time: bits of bfloat16 are in the order of halves too, but for those that are NaN as a half, which the fast path does not see
// (MovedVectors::move). A word has the level twice.
constexpr uint32_t kBelowAll = 0xbc00, kAboveAll = 0x7c00;  // -1, Inf
static __device__ __forceinline__ float level(int32_t key, float) { return key < 0 ? -1.0f : from_bits(min(key, kInfKey)); }
static __device__ __forceinline__ uint32_t level(int32_t key, BFloat16) {
  return (key < 0 ? kBelowAll : min(static_cast<uint32_t>(key) >> 16, kAboveAll)) * 0x10001u;
}
static __device__ __forceinline__ uint32_t level(int32_t key, Float16) {
  uint16_t below;
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(below) : "f"(from_bits(key)));
  return (key < 0 ? kBelowAll : key >= kInfKey ? kAboveAll : below) * 0x10001u;
}

// All bits of a half are set where its magnitude is above the level.
static __device__ __forceinline__ uint32_t above(uint32_t word, uint32_t level) {
  uint32_t size, found;
  asm("abs.f16x2 %0, %1;" : "=r"(size) : "r"(word));
  asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(found) : "r"(size), "r"(level));
  return found;
}

template <class T>
struct Levels {
  decltype(level(0, T{})) low, high, cut;

  __device__ __forceinline__ explicit Levels(const Guess& guess)
      : low(level(guess.low, T{})), high(level(guess.high, T{})), cut(level(guess.cut, T{})) {}

  // Bits of vector j, of finite numbers: kLanes * j and on, which are kept; from bit 8 on, which lie inside the bracket. Zeroes what is not kept.
  __device__ __forceinline__ uint32_t sort(int j, Vector<T>& u) const {
    uint32_t bits = 0;
    if constexpr (sizeof(T) == 4) {
      // By hand: for a condition in C++, nvcc 13 selects a bit, and then adds it.
#pragma unroll
      for (int i = 0; i < 4; ++i)
        asm("{\n\t.reg .pred keeps, inside;\n\t.reg .f32 size;\n\t"
            "abs.f32 size, %0;\n\t"
            "setp.gt.f32 keeps, size, %2;\n\t"
            "setp.gt.f32 inside, size, %3;\n\t"
            "setp.le.and.f32 inside, size, %4, inside;\n\t"
            "@keeps or.b32 %1, %1, %5;\n\t"
            "@inside or.b32 %1, %1, %6;\n\t"
            "selp.b32 %0, %0, 0, keeps;\n\t}"
            : "+r"(u.words[i]), "+r"(bits)
            : "f"(cut), "f"(low), "f"(high), "r"(1 << (4 * j + i)), "r"(0x100 << (4 * j + i)));
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) {  // of word w: bit 2 w, and 16 + 2 w + 1
        const uint32_t own = 0x20001u << (2 * w), kept = above(u.words[w], cut);
        bits |= kept & own;
        bits |= above(u.words[w], low) & ~above(u.words[w], high) & own << 8;
        u.words[w] &= kept;
      }
      bits |= bits >> 16;
    }
    return bits;
  }
};

}  // namespace cuda
}  // namespace cram
