// H: 32 numbers of 16 bits in as many registers as a block of 16 floats; what 16-bit types are compared, pruned and stored in. Included by vec.h's
// users.
#pragma once

#include "vec.h"

namespace cram {
namespace CRAM_ISA {

constexpr int kHalves = 32;
typedef int16_t HalfVec __attribute__((vector_size(4 * kWidth)));

struct H {
  HalfVec v[kParts];
  H() = default;
  CRAM_INLINE_MEMBER explicit H(int16_t x) { CRAM_PARTS v[part] = HalfVec{} + x; }
};

CRAM_INLINE H add(H a, H b) {
  CRAM_PARTS a.v[part] = a.v[part] + b.v[part];
  return a;
}
CRAM_INLINE H both(H a, H b) {
  CRAM_PARTS a.v[part] = a.v[part] & b.v[part];
  return a;
}

template <class T>
CRAM_INLINE H load_halves(const T* p) {
  H r;
  memcpy(&r, p, sizeof r);
  return r;
}
template <class T>
CRAM_INLINE void store_halves(T* p, H a) {
  memcpy(p, &a, sizeof a);
}

// 16 numbers at `first` and 16 at `second`.
template <class T>
CRAM_INLINE H load_halves(const T* first, const T* second) {
  T both[kHalves];
  memcpy(both, first, sizeof both / 2);
  memcpy(both + kHalves / 2, second, sizeof both / 2);
  return load_halves(both);
}

// The lanes of floats lo, hi as bits of the type of the last argument, to nearest even. No NaN among them.
CRAM_INLINE I nearest_bfloat16(F a) {  // in the upper halves
  I bits = as_int(a);
  CRAM_PARTS bits.v[part] = bits.v[part] + 0x7fff + ((bits.v[part] >> 16) & 1);
  return bits;
}

#if defined(__AVX512F__)

CRAM_INLINE H narrow(F lo, F hi, BFloat16) {
  alignas(64) static constexpr int16_t odd[kHalves] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  H r;
  r.v[0] = (HalfVec)_mm512_permutex2var_epi16((__m512i)nearest_bfloat16(lo).v[0], _mm512_load_si512(odd), (__m512i)nearest_bfloat16(hi).v[0]);
  return r;
}
CRAM_INLINE H narrow(F lo, F hi, Float16) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i low = _mm512_cvtps_ph((__m512)lo.v[0], mode), high = _mm512_cvtps_ph((__m512)hi.v[0], mode);
  H r;
  r.v[0] = (HalfVec)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return r;
}

CRAM_INLINE Bits greater_bits(H a, H b) {
  const __mmask32 mask = _mm512_cmpgt_epi16_mask((__m512i)a.v[0], (__m512i)b.v[0]);
  Bits bits;
  asm("kmovd %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
CRAM_INLINE H keep(H a, Bits bits) { return a.v[0] = (HalfVec)_mm512_maskz_mov_epi16((__mmask32)bits, (__m512i)a.v[0]), a; }

// sum + 1 in the lanes where a < b.
CRAM_INLINE H add_if_less(H sum, H a, H b) {
  const __mmask32 mask = _mm512_cmplt_epi16_mask((__m512i)a.v[0], (__m512i)b.v[0]);
  return sum.v[0] = (HalfVec)_mm512_mask_sub_epi16((__m512i)sum.v[0], mask, (__m512i)sum.v[0], _mm512_set1_epi16(-1)), sum;
}
CRAM_INLINE I add_if_less(I sum, I a, I b) {
  const __mmask16 mask = _mm512_cmplt_epi32_mask((__m512i)a.v[0], (__m512i)b.v[0]);
  return sum.v[0] = (IntVec)_mm512_mask_sub_epi32((__m512i)sum.v[0], mask, (__m512i)sum.v[0], _mm512_set1_epi32(-1)), sum;
}

// Where a < b: up + 1 and down - 1.
CRAM_INLINE void swap_if_less(H& up, H& down, H a, H b) {
  const __mmask32 mask = _mm512_cmplt_epi16_mask((__m512i)a.v[0], (__m512i)b.v[0]);
  const __m512i minus_one = _mm512_set1_epi16(-1);
  up.v[0] = (HalfVec)_mm512_mask_sub_epi16((__m512i)up.v[0], mask, (__m512i)up.v[0], minus_one);
  down.v[0] = (HalfVec)_mm512_mask_add_epi16((__m512i)down.v[0], mask, (__m512i)down.v[0], minus_one);
}
CRAM_INLINE void swap_if_less(I& up, I& down, I a, I b) {
  const __mmask16 mask = _mm512_cmplt_epi32_mask((__m512i)a.v[0], (__m512i)b.v[0]);
  const __m512i minus_one = _mm512_set1_epi32(-1);
  up.v[0] = (IntVec)_mm512_mask_sub_epi32((__m512i)up.v[0], mask, (__m512i)up.v[0], minus_one);
  down.v[0] = (IntVec)_mm512_mask_add_epi32((__m512i)down.v[0], mask, (__m512i)down.v[0], minus_one);
}

// Lane i of the result is lane index[i], which lies in the same run of 8 lanes.
CRAM_INLINE I permute(I a, I index) { return a.v[0] = (IntVec)_mm512_permutexvar_epi32((__m512i)index.v[0], (__m512i)a.v[0]), a; }
CRAM_INLINE H permute(H a, H index) { return a.v[0] = (HalfVec)_mm512_permutexvar_epi16((__m512i)index.v[0], (__m512i)a.v[0]), a; }

CRAM_INLINE uint64_t load_flags64(const uint8_t* p) {
  const __mmask64 mask = _mm512_movepi8_mask(_mm512_loadu_si512(p));
  uint64_t bits;
  asm("kmovq %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}

#elif defined(__AVX2__)

CRAM_INLINE H narrow(F lo, F hi, BFloat16) {
  H r;
  const I bits[2] = {nearest_bfloat16(lo), nearest_bfloat16(hi)};
  CRAM_PARTS {
    const __m256i low = _mm256_srli_epi32((__m256i)bits[part].v[0], 16), high = _mm256_srli_epi32((__m256i)bits[part].v[1], 16);
    r.v[part] = (HalfVec)_mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  }
  return r;
}
CRAM_INLINE H narrow(F lo, F hi, Float16) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  H r;
  const F floats[2] = {lo, hi};
  CRAM_PARTS {
    const __m128i low = _mm256_cvtps_ph((__m256)floats[part].v[0], mode), high = _mm256_cvtps_ph((__m256)floats[part].v[1], mode);
    r.v[part] = (HalfVec)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  return r;
}

CRAM_INLINE Bits greater_bits(H a, H b) {
  const __m256i bytes = _mm256_packs_epi16((__m256i)(a.v[0] > b.v[0]), (__m256i)(a.v[1] > b.v[1]));  // interleaved by 128 bits
  return (Bits)_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8));
}
CRAM_INLINE H keep(H a, Bits bits) {
  const HalfVec lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768};
  CRAM_PARTS {
    const int16_t own = (int16_t)(bits >> (16 * part));  // by itself: g++ 12 refuses the cast within the sum where it checks shifts (UBSan)
    a.v[part] &= (lane & (HalfVec{} + own)) == lane;
  }
  return a;
}
CRAM_INLINE I permute(I a, I index) {
  CRAM_PARTS a.v[part] = (IntVec)_mm256_permutevar8x32_epi32((__m256i)a.v[part], (__m256i)index.v[part]);
  return a;
}
CRAM_INLINE H permute(H a, H index) {
  CRAM_PARTS a.v[part] = (HalfVec)_mm256_shuffle_epi8((__m256i)a.v[part], (__m256i)((index.v[part] & 7) * 0x0202 + 0x0100));
  return a;
}
CRAM_INLINE uint64_t load_flags64(const uint8_t* p) {
  const auto half = [](const uint8_t* q) { return (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_loadu_si256((const __m256i*)q)); };
  return half(p) | half(p + 32) << 32;
}

#else

CRAM_INLINE int16_t half_of(float x, BFloat16) { return (int16_t)(to_bits(rounded(x, BFloat16{})) >> 16); }
CRAM_INLINE int16_t half_of(float x, Float16) { return (int16_t)half_bits(x); }
template <class T>
CRAM_INLINE H narrow(F lo, F hi, T t) {
  H r;
  float floats[kHalves];
  int16_t halves[kHalves];
  store(floats, lo), store(floats + kBlock, hi);
  for (int lane = 0; lane < kHalves; ++lane) halves[lane] = half_of(floats[lane], t);
  memcpy(&r, halves, sizeof r);
  return r;
}
CRAM_INLINE Bits greater_bits(H a, H b) {
  Bits bits = 0;
  CRAM_PARTS {
    const HalfVec greater = a.v[part] > b.v[part];
    for (int lane = 0; lane < 2 * kWidth; ++lane) bits |= (Bits)(greater[lane] & 1) << (2 * kWidth * part + lane);
  }
  return bits;
}
CRAM_INLINE H keep(H a, Bits bits) {
  const HalfVec lane = {1, 2, 4, 8, 16, 32, 64, 128};
  CRAM_PARTS {
    const int16_t own = (int16_t)((bits >> (2 * kWidth * part)) & 0xff);
    a.v[part] &= (lane & (HalfVec{} + own)) == lane;
  }
  return a;
}
CRAM_INLINE I permute(I a, I index) {
  int32_t from[kBlock], at[kBlock], to[kBlock];
  store(from, a), store(at, index);
  for (int lane = 0; lane < kBlock; ++lane) to[lane] = from[at[lane]];
  return load(to);
}
CRAM_INLINE H permute(H a, H index) {
  int16_t from[kHalves], at[kHalves], to[kHalves];
  store_halves(from, a), store_halves(at, index);
  for (int lane = 0; lane < kHalves; ++lane) to[lane] = from[at[lane]];
  return load_halves(to);
}
CRAM_INLINE uint64_t load_flags64(const uint8_t* p) {
  uint64_t bits = 0;
  for (int block = 0; block < 4; ++block) bits |= (uint64_t)load_flags(p + kBlock * block) << (kBlock * block);
  return bits;
}

#endif

#if !defined(__AVX512F__)
CRAM_INLINE H add_if_less(H sum, H a, H b) {
  CRAM_PARTS sum.v[part] -= (HalfVec)(a.v[part] < b.v[part]);
  return sum;
}
CRAM_INLINE I add_if_less(I sum, I a, I b) { return sub(sum, less(a, b)); }
CRAM_INLINE void swap_if_less(H& up, H& down, H a, H b) {
  CRAM_PARTS {
    const HalfVec minus_one = (HalfVec)(a.v[part] < b.v[part]);
    up.v[part] -= minus_one;
    down.v[part] += minus_one;
  }
}
CRAM_INLINE void swap_if_less(I& up, I& down, I a, I b) {
  const I minus_one = less(a, b);
  up = sub(up, minus_one);
  down = add(down, minus_one);
}
#endif

}  // namespace CRAM_ISA
}  // namespace cram
