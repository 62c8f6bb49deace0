// Number types, rounding and the order of magnitudes (docs/contract.md: Perturb, Order), for one weight; shared by the CPU and CUDA.
// Every operation is rounded on its own: the CPU is compiled with -ffp-contract=off, CUDA uses the _rn intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CRAM_INLINE static __host__ __device__ __forceinline__
#define CRAM_HOST_DEVICE __host__ __device__
#else
#define CRAM_INLINE static inline __attribute__((always_inline))
#define CRAM_HOST_DEVICE
#endif
#define CRAM_INLINE_MEMBER inline __attribute__((always_inline))

namespace cram {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int32_t kNanKey = 0x7fc00000;  // the key of every NaN, and the bits of the canonical NaN
constexpr int32_t kInfKey = 0x7f800000;
constexpr int32_t kKeepAll = -1;  // the threshold below every key

CRAM_HOST_DEVICE constexpr int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }
CRAM_HOST_DEVICE constexpr int64_t mask_bytes(int64_t numel) { return (numel + 7) / 8; }

CRAM_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

CRAM_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

#if defined(__CUDA_ARCH__)
CRAM_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
CRAM_INLINE float sub(float a, float b) { return __fsub_rn(a, b); }
CRAM_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
CRAM_INLINE float div(float a, float b) { return __fdiv_rn(a, b); }
CRAM_INLINE float root(float a) { return __fsqrt_rn(a); }
#else
CRAM_INLINE float add(float a, float b) { return a + b; }
CRAM_INLINE float sub(float a, float b) { return a - b; }
CRAM_INLINE float mul(float a, float b) { return a * b; }
CRAM_INLINE float div(float a, float b) { return a / b; }
CRAM_INLINE float root(float a) { return __builtin_sqrtf(a); }
#endif

CRAM_INLINE float negate(float a) { return from_bits(to_bits(a) ^ 0x80000000u); }
CRAM_INLINE float larger(float a, float b) { return a != a || a > b ? a : b; }  // NaN if either is
CRAM_INLINE float canonical(float x) { return x != x ? from_bits(kNanKey) : x; }
CRAM_INLINE int32_t magnitude_key(float u) { return u != u ? kNanKey : static_cast<int32_t>(to_bits(u) & 0x7fffffffu); }

CRAM_INLINE float widen(float x) { return x; }
CRAM_INLINE float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

CRAM_INLINE float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // Inf, NaN
  if (magnitude >= 0x0400u) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float denormal = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2^-24, exact
  return from_bits(sign | to_bits(denormal));
#endif
}

// x -> the bits of a half, to nearest even; NaN becomes canonical.
CRAM_INLINE uint16_t half_bits(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t nearest;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(nearest) : "f"(x));
  return x != x ? 0x7e00u : nearest;
#else
  const uint32_t bits = to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to Inf
  if (magnitude < 0x38800000u) {                                               // below 2^-14: a multiple of 2^-24
    const float shifted = from_bits(magnitude) + 0.5f;                         // the sum rounds to a multiple of 2^-24
    return static_cast<uint16_t>(sign | (to_bits(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13));
#endif
}

CRAM_INLINE uint64_t scramble(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// x rounded to the type of the second argument, to nearest even, as a float; NaN becomes canonical.
CRAM_INLINE float rounded(float x, float) { return canonical(x); }
CRAM_INLINE float rounded(float x, BFloat16) {
  const uint32_t bits = to_bits(x);
  return x != x ? canonical(x) : from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}
CRAM_INLINE float rounded(float x, Float16) { return canonical(widen(Float16{half_bits(x)})); }

}  // namespace cram
