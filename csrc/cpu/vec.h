// A block of 16 floats in the registers of the instruction set that this file is compiled for: the number type F of the shared arithmetic.
// Plain vector extensions of g++ and clang++; intrinsics only for masks, compress, 16-bit conversions and the square root.
// Everything lives in a namespace of its own for each instruction set (CRAM_ISA), so that the linker cannot mix them.
#pragma once

#include "../number.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cram {
namespace CRAM_ISA {

constexpr int kBlock = 16;
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kBlock / kWidth;

typedef float FloatVec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UnsignedVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits;  // one bit a lane, 16 lanes

// For lambdas that are the body of a loop: a call for each block would cost more than the work in it.
#define CRAM_INLINE_LAMBDA __attribute__((always_inline))

#define CRAM_PARTS for (int part = 0; part < kParts; ++part)

struct F {
  FloatVec v[kParts];
  F() = default;
  CRAM_INLINE_MEMBER explicit F(float x) { CRAM_PARTS v[part] = x - FloatVec{}; }  // of +0: x itself, -0 too
};

struct I {
  IntVec v[kParts];
  I() = default;
  CRAM_INLINE_MEMBER explicit I(int32_t x) { CRAM_PARTS v[part] = IntVec{} + x; }
};

#define CRAM_BINARY(name, type, op)                \
  CRAM_INLINE type name(type a, type b) {          \
    CRAM_PARTS a.v[part] = a.v[part] op b.v[part]; \
    return a;                                      \
  }
CRAM_BINARY(add, F, +)
CRAM_BINARY(sub, F, -)
CRAM_BINARY(mul, F, *)
CRAM_BINARY(div, F, /)
CRAM_BINARY(add, I, +)
CRAM_BINARY(sub, I, -)
CRAM_BINARY(both, I, &)
#undef CRAM_BINARY

CRAM_INLINE I as_int(F a) {
  I r;
  CRAM_PARTS r.v[part] = (IntVec)a.v[part];
  return r;
}

CRAM_INLINE F as_float(I a) {
  F r;
  CRAM_PARTS r.v[part] = (FloatVec)a.v[part];
  return r;
}

// Comparisons of integers: -1 in the lanes where they hold.
CRAM_INLINE I less(I a, I b) {
  CRAM_PARTS a.v[part] = a.v[part] < b.v[part];
  return a;
}

CRAM_INLINE I shifted(I a, int right) {
  CRAM_PARTS a.v[part] = a.v[part] >> right;
  return a;
}

CRAM_INLINE F negate(F a) {
  CRAM_PARTS a.v[part] = (FloatVec)((IntVec)a.v[part] ^ (IntVec{} + INT32_MIN));
  return a;
}

CRAM_INLINE F canonical(F a) {
  const FloatVec nan = (FloatVec)(IntVec{} + kNanKey);
  CRAM_PARTS a.v[part] = a.v[part] == a.v[part] ? a.v[part] : nan;
  return a;
}

CRAM_INLINE F larger(F a, F b) {
  CRAM_PARTS a.v[part] = ((a.v[part] != a.v[part]) | (a.v[part] > b.v[part])) ? a.v[part] : b.v[part];
  return a;
}

CRAM_INLINE I larger(I a, I b) {
  CRAM_PARTS a.v[part] = a.v[part] > b.v[part] ? a.v[part] : b.v[part];
  return a;
}

CRAM_INLINE I magnitude_key(F u) { return both(as_int(canonical(u)), I(0x7fffffff)); }

CRAM_INLINE F load(const float* p) {
  F r;
  memcpy(&r, p, sizeof r);
  return r;
}
CRAM_INLINE I load(const int32_t* p) {
  I r;
  memcpy(&r, p, sizeof r);
  return r;
}
CRAM_INLINE void store(float* p, F a) { memcpy(p, &a, sizeof a); }
CRAM_INLINE void store(int32_t* p, I a) { memcpy(p, &a, sizeof a); }

#if defined(__AVX512F__)

CRAM_INLINE F root(F a) { return a.v[0] = (FloatVec)_mm512_sqrt_ps((__m512)a.v[0]), a; }
// A mask in a general register, zero-extended for certain: g++ 12 spills the 16 bits of a mask register and may read 32 back.
CRAM_INLINE Bits bits_of(__mmask16 mask) {
  Bits bits;
  asm("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
CRAM_INLINE Bits greater_bits(I a, I b) { return bits_of(_mm512_cmpgt_epi32_mask((__m512i)a.v[0], (__m512i)b.v[0])); }
CRAM_INLINE F keep(F a, Bits bits) { return a.v[0] = (FloatVec)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)a.v[0]), a; }
CRAM_INLINE I keep(I a, Bits bits) { return a.v[0] = (IntVec)_mm512_maskz_mov_epi32((__mmask16)bits, (__m512i)a.v[0]), a; }

CRAM_INLINE I load16(const uint16_t* p) {
  I r;
  r.v[0] = (IntVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return r;
}
CRAM_INLINE void store16(uint16_t* p, I a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)a.v[0])); }

CRAM_INLINE F widen_half(const uint16_t* p) {
  F r;
  r.v[0] = (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  return r;
}
CRAM_INLINE void store_half(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)a.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Flags: a byte a lane, of which the top bit counts; for bits whose places are not whole bytes.
CRAM_INLINE void store_flags(uint8_t* p, Bits bits) { _mm_storeu_si128((__m128i*)p, _mm_movm_epi8((__mmask16)bits)); }
CRAM_INLINE Bits load_flags(const uint8_t* p) { return bits_of(_mm_movepi8_mask(_mm_loadu_si128((const __m128i*)p))); }

#elif defined(__AVX2__)

CRAM_INLINE F root(F a) {
  CRAM_PARTS a.v[part] = (FloatVec)_mm256_sqrt_ps((__m256)a.v[part]);
  return a;
}
CRAM_INLINE Bits greater_bits(I a, I b) {
  Bits bits = 0;
  CRAM_PARTS bits |= (Bits)_mm256_movemask_ps((__m256)(a.v[part] > b.v[part])) << (kWidth * part);
  return bits;
}
CRAM_INLINE I keep(I a, Bits bits) {
  const IntVec lane = {1, 2, 4, 8, 16, 32, 64, 128};
  CRAM_PARTS a.v[part] &= (lane & (IntVec{} + (int32_t)(bits >> (kWidth * part)))) == lane;
  return a;
}
CRAM_INLINE F keep(F a, Bits bits) { return as_float(keep(as_int(a), bits)); }

CRAM_INLINE void store_flags(uint8_t* p, Bits bits) {
  const __m128i halves = _mm_set_epi64x((bits >> 8) * 0x0101010101010101ll, (bits & 0xff) * 0x0101010101010101ll);
  const __m128i lane = _mm_set1_epi64x(0x8040201008040201ll);
  _mm_storeu_si128((__m128i*)p, _mm_cmpeq_epi8(_mm_and_si128(halves, lane), lane));
}
CRAM_INLINE Bits load_flags(const uint8_t* p) { return (Bits)_mm_movemask_epi8(_mm_loadu_si128((const __m128i*)p)); }

CRAM_INLINE I load16(const uint16_t* p) {
  I r;
  CRAM_PARTS r.v[part] = (IntVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + kWidth * part)));
  return r;
}
CRAM_INLINE void store16(uint16_t* p, I a) {
  const __m256i packed = _mm256_packus_epi32((__m256i)a.v[0], (__m256i)a.v[1]);  // lanes of a[0] and a[1] interleaved by 128 bits
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
CRAM_INLINE F widen_half(const uint16_t* p) {
  F r;
  CRAM_PARTS r.v[part] = (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + kWidth * part)));
  return r;
}
CRAM_INLINE void store_half(uint16_t* p, F a) {
  CRAM_PARTS _mm_storeu_si128((__m128i*)(p + kWidth * part), _mm256_cvtps_ph((__m256)a.v[part], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

CRAM_INLINE F root(F a) {
  CRAM_PARTS for (int lane = 0; lane < kWidth; ++lane) a.v[part][lane] = __builtin_sqrtf(a.v[part][lane]);
  return a;
}
CRAM_INLINE Bits greater_bits(I a, I b) {
  Bits bits = 0;
  CRAM_PARTS {
    const IntVec greater = a.v[part] > b.v[part];
    for (int lane = 0; lane < kWidth; ++lane) bits |= (Bits)(greater[lane] & 1) << (kWidth * part + lane);
  }
  return bits;
}
CRAM_INLINE I keep(I a, Bits bits) {
  const IntVec lane = {1, 2, 4, 8};
  CRAM_PARTS a.v[part] &= (lane & (IntVec{} + (int32_t)(bits >> (kWidth * part)))) == lane;
  return a;
}
CRAM_INLINE F keep(F a, Bits bits) { return as_float(keep(as_int(a), bits)); }

CRAM_INLINE void store_flags(uint8_t* p, Bits bits) {
  for (int lane = 0; lane < kBlock; ++lane) p[lane] = (uint8_t)((bits >> lane & 1) << 7);
}
CRAM_INLINE Bits load_flags(const uint8_t* p) {
  Bits bits = 0;
  for (int lane = 0; lane < kBlock; ++lane) bits |= (Bits)(p[lane] >> 7) << lane;
  return bits;
}

CRAM_INLINE I load16(const uint16_t* p) {
  I r;
  CRAM_PARTS for (int lane = 0; lane < kWidth; ++lane) r.v[part][lane] = p[kWidth * part + lane];
  return r;
}
CRAM_INLINE void store16(uint16_t* p, I a) {
  CRAM_PARTS for (int lane = 0; lane < kWidth; ++lane) p[kWidth * part + lane] = (uint16_t)a.v[part][lane];
}
CRAM_INLINE F widen_half(const uint16_t* p) {
  F r;
  CRAM_PARTS for (int lane = 0; lane < kWidth; ++lane) r.v[part][lane] = widen(Float16{p[kWidth * part + lane]});
  return r;
}
CRAM_INLINE void store_half(uint16_t* p, F a) {
  CRAM_PARTS for (int lane = 0; lane < kWidth; ++lane) p[kWidth * part + lane] = half_bits(a.v[part][lane]);
}

#endif

CRAM_INLINE Bits equal_bits(I a, I b) { return ((1u << kBlock) - 1) & ~(greater_bits(a, b) | greater_bits(b, a)); }

CRAM_INLINE F load(const Float16* p) { return widen_half(&p->bits); }
CRAM_INLINE F load(const BFloat16* p) {
  I wide = load16(&p->bits);
  CRAM_PARTS wide.v[part] = wide.v[part] << 16;
  return as_float(wide);
}

// store: of values that T holds exactly; the canonical NaN included.
CRAM_INLINE void store(Float16* p, F a) { store_half(&p->bits, a); }
CRAM_INLINE void store(BFloat16* p, F a) {
  I high = as_int(a);
  CRAM_PARTS high.v[part] = (IntVec)((UnsignedVec)high.v[part] >> 16);
  store16(&p->bits, high);
}

// Stores a rounded to T, to nearest even; NaN becomes canonical.
CRAM_INLINE void store_rounded(float* p, F a) { store(p, canonical(a)); }
CRAM_INLINE void store_rounded(Float16* p, F a) { store_half(&p->bits, canonical(a)); }
CRAM_INLINE void store_rounded(BFloat16* p, F a) {
  I bits = as_int(a);
  const FloatVec nan = (FloatVec)(IntVec{} + kNanKey);
  CRAM_PARTS {
    bits.v[part] = bits.v[part] + 0x7fff + ((bits.v[part] >> 16) & 1);
    a.v[part] = a.v[part] == a.v[part] ? (FloatVec)bits.v[part] : nan;
  }
  store(p, a);
}

// a rounded to the type of the second argument, to nearest even, still as floats; NaN becomes canonical.
CRAM_INLINE F rounded(F a, float) { return canonical(a); }
CRAM_INLINE F rounded(F a, BFloat16) {
  I bits = as_int(a);
  CRAM_PARTS bits.v[part] = (bits.v[part] + 0x7fff + ((bits.v[part] >> 16) & 1)) & (int32_t)0xffff0000;
  const FloatVec nan = (FloatVec)(IntVec{} + kNanKey);
  CRAM_PARTS a.v[part] = a.v[part] == a.v[part] ? (FloatVec)bits.v[part] : nan;
  return a;
}
CRAM_INLINE F rounded(F a, Float16) {
  uint16_t half[kBlock];
  store_half(half, canonical(a));
  return widen_half(half);
}

// p[lane] = bit ? p[lane] : +0, on the raw bits.
CRAM_INLINE void keep_raw(float* p, Bits bits) { store(p, keep(load(p), bits)); }
CRAM_INLINE void keep_raw(BFloat16* p, Bits bits) { store16(&p->bits, keep(load16(&p->bits), bits)); }
CRAM_INLINE void keep_raw(Float16* p, Bits bits) { store16(&p->bits, keep(load16(&p->bits), bits)); }

// `bytes` of them, 32 or 64, to an address that is written once and not read soon.
template <int bytes>
CRAM_INLINE void stream(void* to, const void* from) {
#if defined(__AVX512F__)
  if (bytes == 64 && reinterpret_cast<uintptr_t>(to) % 64 == 0) return _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    for (int byte = 0; byte < bytes; byte += 32)
      _mm256_stream_si256((__m256i*)((char*)to + byte), _mm256_loadu_si256((const __m256i*)((const char*)from + byte)));
    return;
  }
#endif
  memcpy(to, from, bytes);
}

}  // namespace CRAM_ISA
}  // namespace cram
