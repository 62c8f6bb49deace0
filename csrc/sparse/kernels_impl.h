// The kernels of one SIMD level: included once by each of level_*.cpp, in a namespace of its own. Multiplications and additions fuse here.
#pragma once

#include <cstring>

#include "matrix.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cram {
namespace CRAM_ISA {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif

template <int width>
struct Vector {
  typedef float Type __attribute__((vector_size(4 * width)));
  typedef float Unaligned __attribute__((vector_size(4 * width), aligned(4), may_alias));
};

#define CRAM_INLINE_KERNEL inline __attribute__((always_inline))

// One row's non-zeros from `at` on, up to column `last`, times a packed panel. Several sets of sums, since each addition waits for the one before.
// Returns where it stopped.
template <int tile>
CRAM_INLINE_KERNEL uint32_t accumulate_row(const float* values, const uint16_t* column, uint32_t at, uint32_t stop, uint32_t last, const char* panel,
                                           bool fresh, float* sums) {
  constexpr int width = tile < kNative ? tile : kNative, registers = tile / width;
  constexpr int sets = registers >= 8 ? 1 : registers >= 4 ? 2 : 4;
  using V = typename Vector<width>::Type;
  using Stored = typename Vector<width>::Unaligned;
  V sum[sets][registers];
  for (int set = 0; set < sets; ++set)
    for (int r = 0; r < registers; ++r) sum[set][r] = V{};
  if (!fresh)
    for (int r = 0; r < registers; ++r) sum[0][r] = *reinterpret_cast<const Stored*>(sums + r * width);
  for (; at + sets <= stop && column[at + sets - 1] < last; at += sets)
    for (int set = 0; set < sets; ++set) {
      const V value = values[at + set] - V{};
      const Stored* row = reinterpret_cast<const Stored*>(panel + size_t{column[at + set]} * (tile * sizeof(float)));
      for (int r = 0; r < registers; ++r) sum[set][r] += value * row[r];
    }
  if (sets > 1)
    for (; at < stop && column[at] < last; ++at) {
      const V value = values[at] - V{};
      const Stored* row = reinterpret_cast<const Stored*>(panel + size_t{column[at]} * (tile * sizeof(float)));
      for (int r = 0; r < registers; ++r) sum[0][r] += value * row[r];
    }
  for (int set = 1; set < sets; ++set)
    for (int r = 0; r < registers; ++r) sum[0][r] += sum[set][r];
  for (int r = 0; r < registers; ++r) *reinterpret_cast<Stored*>(sums + r * width) = sum[0][r];
  return at;
}

template <int tile>
void accumulate_tile(const SparseMatrix& a, int64_t start, uint32_t* cursors, const uint32_t* stops, int64_t rows, const float* panel, int64_t first,
                     int64_t last, float* sums) {
  // Where row 0 of the dense matrix would lie, were all of it packed: an address that is computed, never read.
  const char* origin = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(panel) - static_cast<uintptr_t>(first) * tile * sizeof(float));
  const float* values = a.values + start;
  const uint16_t* column = a.column + start;
  const uint32_t limit = static_cast<uint32_t>(last);
  for (int64_t row = 0; row < rows; ++row, sums += tile)
    cursors[row] = accumulate_row<tile>(values, column, cursors[row], stops[row], limit, origin, first == 0, sums);
}

void accumulate(int tile, const SparseMatrix& a, int64_t start, uint32_t* cursors, const uint32_t* stops, int64_t rows, const float* panel,
                int64_t first, int64_t last, float* sums) {
  switch (tile) {
    case 8: return accumulate_tile<8>(a, start, cursors, stops, rows, panel, first, last, sums);
    case 16: return accumulate_tile<16>(a, start, cursors, stops, rows, panel, first, last, sums);
    case 32: return accumulate_tile<32>(a, start, cursors, stops, rows, panel, first, last, sums);
    case 64: return accumulate_tile<64>(a, start, cursors, stops, rows, panel, first, last, sums);
    case 128: return accumulate_tile<128>(a, start, cursors, stops, rows, panel, first, last, sums);
  }
}

bool well_formed(const SparseMatrix& a) {
  // Whether a column is not above the one before it, everywhere but where rows begin.
  const uint16_t* column = a.column;
  uint16_t largest = 0;
  int64_t descents = 0;
  for (int64_t begin = 0; begin < a.nonzeros; begin += 32768) {  // a count of 16 bits, as wide as what is compared
    const int64_t end = begin + 32768 < a.nonzeros ? begin + 32768 : a.nonzeros;
    uint16_t some = 0;
    for (int64_t i = begin; i < end; ++i) largest = column[i] > largest ? column[i] : largest;
    for (int64_t i = begin > 0 ? begin : 1; i < end; ++i) some = static_cast<uint16_t>(some + (column[i] <= column[i - 1]));
    descents += some;
  }
  int64_t at = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    if (at > 0 && a.counts[row] > 0) descents -= column[at] <= column[at - 1];
    at += a.counts[row];
  }
  return descents == 0 && (a.nonzeros == 0 || largest < a.columns);
}

// The dot product of one row's `count` non-zeros with x. `seen` becomes the largest column; columns out of range read the last element.
#if defined(__AVX512F__)
constexpr int kAhead = 256;  // non-zeros: the weights of a large network come from beyond the second cache
struct Seen {
  __m512i largest = _mm512_setzero_si512();
  bool all_below(int64_t columns) const { return static_cast<int64_t>(_mm512_reduce_max_epu32(largest)) < columns; }
};
inline float dot_row(const float* values, const uint16_t* column, int64_t count, const float* x, int64_t columns, Seen& seen) {
  const __m512i last = _mm512_set1_epi32(static_cast<int>(columns - 1));
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t at = 0;
  for (int turn = 0; at + 16 <= count; at += 16, turn ^= 1) {
    __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(column + at)));
    seen.largest = _mm512_max_epu32(seen.largest, i);
    _mm_prefetch(reinterpret_cast<const char*>(values + at + kAhead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(column + at + kAhead), _MM_HINT_T0);
    const __m512 v = _mm512_loadu_ps(values + at), g = _mm512_i32gather_ps(_mm512_min_epu32(i, last), x, 4);
    sum[turn] = _mm512_fmadd_ps(v, g, sum[turn]);
  }
  if (at < count) {
    const __mmask16 some = static_cast<__mmask16>((1u << (count - at)) - 1);
    const __m512i i = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, column + at));
    seen.largest = _mm512_max_epu32(seen.largest, i);
    const __m512 g = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, _mm512_min_epu32(i, last), x, 4);
    sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, values + at), g, sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}
#else
struct Seen {
  int64_t largest = 0;
  bool all_below(int64_t columns) const { return largest < columns; }
};
inline float dot_row(const float* values, const uint16_t* column, int64_t count, const float* x, int64_t columns, Seen& seen) {
  float sum[8] = {};
  int64_t at = 0;
  for (; at < count; ++at) {
    const int64_t c = column[at];
    seen.largest = c > seen.largest ? c : seen.largest;
    sum[at % 8] += values[at] * x[c < columns ? c : columns - 1];
  }
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
#endif

bool dot(const SparseMatrix& a, int64_t begin, int64_t end, int64_t start, const float* x, const float* bias, float* out) {
  Seen seen;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t count = a.counts[row];
    out[row] = dot_row(a.values + start, a.column + start, count, x, a.columns, seen) + (bias != nullptr ? bias[row] : 0.0f);
    start += count;
  }
  return seen.all_below(a.columns);
}

#if defined(__AVX2__)
CRAM_INLINE_KERNEL void transpose8(const float* from, int64_t from_stride, __m256 bias, float* to, int64_t to_stride) {
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
    _mm256_storeu_ps(to + i * to_stride, _mm256_add_ps(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20), bias));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_add_ps(_mm256_permute2f128_ps(r[i], r[i + 4], 0x31), bias));
  }
}
#endif

void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* bias, float* to, int64_t to_stride) {
  int64_t full_rows = 0, full_columns = 0;
#if defined(__AVX2__)
  full_rows = rows / 8 * 8, full_columns = columns / 8 * 8;
  for (int64_t c = 0; c < full_columns; c += 8)  // what is written is written row by row
    for (int64_t r = 0; r < full_rows; r += 8) {
      const __m256 b = bias != nullptr ? _mm256_loadu_ps(bias + r) : _mm256_set1_ps(-0.0f);  // -0: adding it changes no bit
      transpose8(from + r * from_stride + c, from_stride, b, to + c * to_stride + r, to_stride);
    }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < full_rows ? full_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c] + (bias != nullptr ? bias[r] : -0.0f);
}

void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* bias, float* to, int64_t to_stride) {
  using V = Vector<kNative>::Type;
  using Stored = Vector<kNative>::Unaligned;
  const int64_t whole = columns / kNative * kNative;
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    const float b = bias != nullptr ? bias[r] : -0.0f;
    const V all = b - V{};
    for (int64_t c = 0; c < whole; c += kNative) *reinterpret_cast<Stored*>(to + c) = *reinterpret_cast<const Stored*>(from + c) + all;
#if defined(__AVX512F__)
    const __mmask16 some = static_cast<__mmask16>((1u << (columns - whole)) - 1);
    if (some) _mm512_mask_storeu_ps(to + whole, some, _mm512_add_ps(_mm512_maskz_loadu_ps(some, from + whole), (__m512)all));
#else
    for (int64_t c = whole; c < columns; ++c) to[c] = from[c] + b;
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
  switch (tile) {
    case 8: return gather_tile<8>(from, offsets, rows, valid, panel);
    case 16: return gather_tile<16>(from, offsets, rows, valid, panel);
    case 32: return gather_tile<32>(from, offsets, rows, valid, panel);
    case 64: return gather_tile<64>(from, offsets, rows, valid, panel);
    case 128: return gather_tile<128>(from, offsets, rows, valid, panel);
  }
}

constexpr SparseKernels kSparse = {CRAM_ISA_NAME, dot, accumulate, transpose, copy_rows, well_formed, gather_rows};

}  // namespace CRAM_ISA
}  // namespace cram
