// What moves activations to and from the form of the kernels, of one SIMD level: a part of kernels_impl.h.
#pragma once

namespace cram {
namespace CRAM_ISA {

#if defined(__AVX2__)
CRAM_INLINE_KERNEL void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0xee);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

#if defined(__AVX512F__)
CRAM_INLINE_KERNEL void transpose16(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 r[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // quarter q of r[i + c] is then column 4 * q + c of 4 rows
      r[i + 2 * j] = _mm512_shuffle_ps(s[i + j], s[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm512_shuffle_ps(s[i + j], s[i + j + 2], 0xee);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even[] = {_mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88)};
    const __m512 odd[] = {_mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd)};
    _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(even[0], even[1], 0x88));
    _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd[0], odd[1], 0x88));
    _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even[0], even[1], 0xdd));
    _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd));
  }
}
#endif

void transpose_by_8(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  int64_t full_rows = 0, full_columns = 0;
#if defined(__AVX2__)
  full_rows = rows / 8 * 8, full_columns = columns / 8 * 8;
  for (int64_t c = 0; c < full_columns; c += 8)  // what is written is written row by row
    for (int64_t r = 0; r < full_rows; r += 8) transpose8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < full_rows ? full_columns : 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  // Rows at a distance of some 4 KB share few places in the first-level cache, fewer than 16.
  const bool spread = from_stride % 1024 != 0 && to_stride % 1024 != 0;
  const int64_t full_rows = spread ? rows / 16 * 16 : 0, full_columns = columns / 16 * 16;
  for (int64_t c = 0; c < full_columns; c += 16)
    for (int64_t r = 0; r < full_rows; r += 16) transpose16(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  transpose_by_8(from + full_columns, from_stride, full_rows, columns - full_columns, to + full_columns * to_stride, to_stride);
  from += full_rows * from_stride, rows -= full_rows, to += full_rows;
#endif
  transpose_by_8(from, from_stride, rows, columns, to, to_stride);
}

void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  using Stored = Vector<kNative>::Unaligned;
  const int64_t whole = columns / kNative * kNative;
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    for (int64_t c = 0; c < whole; c += kNative) *reinterpret_cast<Stored*>(to + c) = *reinterpret_cast<const Stored*>(from + c);
#if defined(__AVX512F__)
    const __mmask16 some = static_cast<__mmask16>((1u << (columns - whole)) - 1);
    if (some) _mm512_mask_storeu_ps(to + whole, some, _mm512_maskz_loadu_ps(some, from + whole));
#else
    for (int64_t c = whole; c < columns; ++c) to[c] = from[c];
#endif
  }
}

template <int tile>
void gather_tile(const float* from, const int64_t* offsets, int64_t rows, int64_t valid, float* panel) {
  for (int64_t i = 0; i < rows; ++i, panel += tile) {
    if (valid == tile) {
      memcpy(panel, from + offsets[i], tile * sizeof(float));
    } else {
      memcpy(panel, from + offsets[i], static_cast<size_t>(valid) * sizeof(float));
      memset(panel + valid, 0, static_cast<size_t>(tile - valid) * sizeof(float));
    }
  }
}

void gather_rows(int tile, const float* from, const int64_t* offsets, int64_t rows, int64_t valid, float* panel) {
  with_tile(tile, [&](auto width) { gather_tile<width>(from, offsets, rows, valid, panel); });
}

void split_rows(const float* from, int64_t width, int64_t stride, int64_t from_stride, int64_t shift, int64_t rows, float* to, int64_t length) {
  const int64_t before = shift >= 0 ? 0 : (stride - 1 - shift) / stride, behind = width <= shift ? 0 : (width - shift + stride - 1) / stride;
  const int64_t first = before < length ? before : length, stop = behind < first ? first : behind < length ? behind : length;
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const int rest = static_cast<int>((stop - first) % 16);  // numbers behind the whole registers; with a stride of 2 they span 2 * rest - 1 of the row
  const uint32_t some = (1u << rest) - 1, between = rest == 0 ? 0 : stride == 1 ? some : ~uint32_t{0} >> (33 - 2 * rest);
  const auto tail = static_cast<__mmask16>(some), low_part = static_cast<__mmask16>(between), high_part = static_cast<__mmask16>(between >> 16);
  const auto load = [&](const float* begin, __mmask16 low, __mmask16 high) {
    const __m512 found = _mm512_maskz_loadu_ps(low, begin);
    return stride == 1 ? found : _mm512_permutex2var_ps(found, even, _mm512_maskz_loadu_ps(high, begin + 16));
  };
#endif
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += length) {
    int64_t i = 0;
    for (; i < first; ++i) to[i] = 0;
#if defined(__AVX512F__)
    if (stride <= 2) {
      for (; i < stop - rest; i += 16) _mm512_storeu_ps(to + i, load(from + i * stride + shift, 0xffff, 0x7fff));
      if (rest) _mm512_mask_storeu_ps(to + i, tail, load(from + i * stride + shift, low_part, high_part));
      i = stop;
    }
#else
    if (stride == 1)  // constants, so that the compiler makes vectors of them
      for (; i < stop; ++i) to[i] = from[i + shift];
    if (stride == 2)
      for (; i < stop; ++i) to[i] = from[i * 2 + shift];
#endif
    for (; i < stop; ++i) to[i] = from[i * stride + shift];
    for (; i < length; ++i) to[i] = 0;
  }
}

}  // namespace CRAM_ISA
}  // namespace cram
