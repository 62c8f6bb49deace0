// The kernels of one SIMD level: included once by each of level_*.cpp, in a namespace of its own. Multiplications and additions fuse here.
#pragma once

#include <cstring>
#include <type_traits>

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

#define CRAM_INLINE_LAMBDA __attribute__((always_inline))
#define CRAM_INLINE_KERNEL inline CRAM_INLINE_LAMBDA

// A tile of 16 is in one register with AVX-512, but for CPUs that halve such registers: there in two, so that its factor is not halved, too.
// Rows of a slice that are summed up together: each addition waits for the one before, so that 8 to 16 sums are to be under way at a time, and not
// more than there are registers for (32 of AVX-512, 16 of the others). Few groups also mean few loops that end where the CPU does not expect it.
template <int tile, bool halved>
struct Shape {
  static constexpr int width = tile == 16 && halved ? 8 : tile < kNative ? tile : kNative, registers = tile / width;
  static constexpr int most = kNative == 16 ? 16 : 8, wanted = tile == 16 || (tile == 32 && kNative == 16) ? 8 : tile < 16 ? 16 : 4;
  static constexpr int group = registers >= most ? 1 : most / registers < wanted ? most / registers : wanted;
};

#if defined(__AVX512F__)
// Only called where they are as large.
template <class V>
CRAM_INLINE_KERNEL void stream16(float* to, const V& v) {
  __m512 same;
  memcpy(&same, &v, sizeof v);
  _mm512_stream_ps(to, same);
}
#endif

template <int width>
CRAM_INLINE_KERNEL void store(float* to, typename Vector<width>::Type v, bool stream) {
#if defined(__AVX512F__)
  if (width == 16 && stream) return stream16(to, v);
#endif
  (void)stream;
  *reinterpret_cast<typename Vector<width>::Unaligned*>(to) = v;
}

// Value i of a group, in all elements. One load of 4 or 8 of them and permutations, where there are as many: loads are what takes longest.
template <int width, int group>
CRAM_INLINE_KERNEL typename Vector<width>::Type factor_of(const float* value, int i) {
  typename Vector<width>::Type factor;
  [[maybe_unused]] const auto permuted = [&](const auto& all) CRAM_INLINE_LAMBDA {
    memcpy(&factor, &all, sizeof factor);
    return factor;
  };
#if defined(__AVX512F__)
  if constexpr (width == 16 && group >= 4)
    return permuted(_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(value + i / 4 * 4)), _mm512_set1_epi32(i % 4)));
#endif
#if defined(__AVX2__)
  if constexpr (width == 8 && group >= 8)
    return permuted(_mm256_permutevar8x32_ps(_mm256_loadu_ps(value + i / 8 * 8), _mm256_set1_epi32(i % 8)));
  if constexpr (width == 8 && group == 4) {
    const __m128 four = _mm_loadu_ps(value);
    return permuted(_mm256_permutevar_ps(_mm256_set_m128(four, four), _mm256_set1_epi32(i)));
  }
#endif
  return factor = value[i] - decltype(factor){};
}

// `group` rows of a slice, whose first non-zeros these are, times a panel. What a lane without a row sums up is not stored. `fetch`: later values, a
// cache line for each step, are fetched meanwhile.
template <int tile, bool halved, bool fresh, bool fetch>
CRAM_INLINE_KERNEL void accumulate_group(const float* value, const uint8_t* column, int64_t steps, const uint8_t* order, int rows, const float* panel,
                                         const Sums& s) {
  using S = Shape<tile, halved>;
  constexpr int width = S::width, registers = S::registers, group = S::group;
  constexpr int shift = __builtin_ctz(tile * sizeof(float));  // a row of the panel has 2^shift bytes
  using V = typename Vector<width>::Type;
  using Stored = typename Vector<width>::Unaligned;
  V sum[group][registers];
#pragma GCC unroll 16
  for (int i = 0; i < group; ++i)
#pragma GCC unroll 16
    for (int r = 0; r < registers; ++r) sum[i][r] = V{};
  for (int64_t step = 0; step < steps; ++step, value += kLanes, column += kLanes) {
    if (fetch) __builtin_prefetch(reinterpret_cast<const char*>(value) + kAhead);
    uint64_t words[group > 8 ? 2 : 1] = {};
    memcpy(words, column, group);
#pragma GCC unroll 16
    for (int i = 0; i < group; ++i) {
      const int right = (i % 8 * 8 - shift) & 63;  // a rotation: one instruction, which spares a second shift
      const uint64_t at = (words[i / 8] >> right | words[i / 8] << (-right & 63)) & uint64_t{255} << shift;
      const V factor = factor_of<width, group>(value, i);
      const Stored* row = reinterpret_cast<const Stored*>(reinterpret_cast<const char*>(panel) + at);
#pragma GCC unroll 16
      for (int r = 0; r < registers; ++r) sum[i][r] += factor * row[r];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < group; ++i) {
    if (i >= rows) break;
    const int64_t row = order[i];
    const float* from = s.from + row * s.from_stride;
    float* to = s.to + row * s.to_stride;
#pragma GCC unroll 16
    for (int r = 0; r < registers; ++r)
      store<width>(to + r * width, (fresh ? s.bias[row] - V{} : *reinterpret_cast<const Stored*>(from + r * width)) + sum[i][r], s.stream);
  }
}

template <int tile, bool halved, bool fresh>
void accumulate_tile(const Piece& piece, const float* panel, const Sums& s) {
  constexpr int group = Shape<tile, halved>::group;
  const float* values = piece.values;
  const uint8_t* column = piece.column;
  const uint8_t* order = piece.order;
  const uint8_t* steps_of = piece.steps_of;
  int64_t left = piece.rows;
  for (; left >= kLanes; left -= kLanes, order += kLanes, ++steps_of) {
    const int64_t steps = *steps_of;
    for (int64_t i = 0; i < steps * kLanes; i += 64) __builtin_prefetch(column + i + kAhead / 4);
    accumulate_group<tile, halved, fresh, true>(values, column, steps, order, group, panel, s);
    for (int lane = group; lane < kLanes; lane += group)
      accumulate_group<tile, halved, fresh, false>(values + lane, column + lane, steps, order + lane, group, panel, s);
    values += steps * kLanes;
    column += steps * kLanes;
  }
  for (int lane = 0; lane < left; lane += group)
    accumulate_group<tile, halved, fresh, false>(values + lane, column + lane, *steps_of, order + lane, static_cast<int>(left) - lane, panel, s);
}

// Calls f(tile as a type).
template <class Function>
void with_tile(int tile, Function f) {
  switch (tile) {
    case 8: return f(std::integral_constant<int, 8>{});
    case 16: return f(std::integral_constant<int, 16>{});
    case 32: return f(std::integral_constant<int, 32>{});
    case 64: return f(std::integral_constant<int, 64>{});
    case 128: return f(std::integral_constant<int, 128>{});
  }
}

template <bool halved>
void accumulate(int tile, const Piece& piece, const float* panel, const Sums& sums) {
  with_tile(tile, [&](auto width) {
    if (sums.fresh) return accumulate_tile<width, halved && width == 16, true>(piece, panel, sums);
    accumulate_tile<width, halved && width == 16, false>(piece, panel, sums);
  });
}

void spread(const float* x, int64_t width, int64_t block, float* to) {
  memcpy(to, x, static_cast<size_t>(width) * sizeof(float));
  memset(to + width, 0, static_cast<size_t>(block + 1 - width) * sizeof(float));
}

// The sums of a piece's rows, in its order, go where they belong.
CRAM_INLINE_KERNEL void hand_out(const Piece& piece, const float* sums, const Sums& s) {
  const float* start = s.fresh ? s.bias : s.from;
  for (int64_t row = 0; row < piece.rows; ++row) s.to[row] = start[row] + sums[piece.place[row]];
}

bool ordered(const Piece& piece) {
  int wrong = 0;
  for (int64_t row = 0; row < piece.rows; ++row) wrong |= piece.order[piece.place[row]] ^ static_cast<int>(row);
  return wrong == 0;
}

int largest(const uint8_t* bytes, int64_t n) {
  uint8_t found = 0;
  for (int64_t i = 0; i < n; ++i) found = bytes[i] > found ? bytes[i] : found;
  return found;
}

// A slice times a vector: a lane a row.
#if defined(__AVX512F__)
// The elements of x, of which 16 are in a register, that 16 bytes name: each permutation looks up in 32 of them, and the upper bits choose among the
// permutations. A gather from memory takes 2 to 3 times as long, on AMD's Zen 4 and on Intel's processors since their gathers were made safe.
template <int registers>
CRAM_INLINE_KERNEL __m512 look_up(const __m512* x, __m128i column) {
  const __m512i at = _mm512_cvtepu8_epi32(column);
  const __mmask16 bit5 = _mm_test_epi8_mask(column, _mm_set1_epi8(32)), bit6 = _mm_test_epi8_mask(column, _mm_set1_epi8(64));
  const auto of_64 = [&](const __m512* from) {
    return _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(from[0], at, from[1]), _mm512_permutex2var_ps(from[2], at, from[3]));
  };
  if constexpr (registers == 4) return of_64(x);
  const __m512 low = _mm512_mask_blend_ps(bit6, of_64(x), of_64(x + 4));
  if constexpr (registers == 8) return low;
  return _mm512_mask_blend_ps(_mm_movepi8_mask(column), low, _mm512_mask_blend_ps(bit6, of_64(x + 8), of_64(x + 12)));
}

// `registers` hold `block` columns at least. A filler, in column `block`, may be beyond them: it is kept out of the sum.
template <int registers>
int dot_slices(const Piece& piece, const float* from, const Sums& s) {
  __m512 x[registers];
#pragma GCC unroll 16
  for (int i = 0; i < registers; ++i) x[i] = _mm512_loadu_ps(from + i * 16);
  const float* values = piece.values;
  const uint8_t* column = piece.column;
  float sums[kMaxSection];
  for (int64_t first = 0; first < piece.rows; first += kLanes) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const auto step = [&](int i) {
      const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(column));
      const __m512 found = look_up<registers>(x, c), value = _mm512_loadu_ps(values);
      sum[i] = registers == 16 ? _mm512_fmadd_ps(value, found, sum[i])
                               : _mm512_mask3_fmadd_ps(value, found, sum[i], _mm_testn_epi8_mask(c, _mm_set1_epi8(static_cast<char>(registers * 16))));
      values += kLanes, column += kLanes;
    };
    int64_t left = piece.steps_of[first / kLanes];
    for (; left >= 2; left -= 2) step(0), step(1);
    if (left) step(0);
    _mm512_storeu_ps(sums + first, _mm512_add_ps(sum[0], sum[1]));
  }
  hand_out(piece, sums, s);
  return largest(piece.column, column - piece.column);
}

int dot(const Piece& piece, int64_t block, const float* x, const Sums& s) {
  if (block <= 64) return dot_slices<4>(piece, x, s);
  if (block <= 128) return dot_slices<8>(piece, x, s);
  return dot_slices<16>(piece, x, s);
}
#else
int dot(const Piece& piece, int64_t, const float* x, const Sums& s) {
  const float* values = piece.values;
  const uint8_t* column = piece.column;
  float sums[kMaxSection] = {};
  for (int64_t first = 0; first < piece.rows; first += kLanes)
    for (int64_t steps = piece.steps_of[first / kLanes]; steps > 0; --steps, values += kLanes, column += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) sums[first + lane] += values[lane] * x[column[lane]];
  hand_out(piece, sums, s);
  return largest(piece.column, column - piece.column);
}
#endif

void widen(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = uint32_t{from[i]} << 16;
    memcpy(to + i, &bits, sizeof bits);
  }
}

}  // namespace CRAM_ISA
}  // namespace cram

#include "move_impl.h"

namespace cram {
namespace CRAM_ISA {

constexpr SparseKernels kSparse = {CRAM_ISA_NAME, spread, dot,   nullptr, accumulate<false>, transpose,
                                   copy_rows,     gather, widen, ordered, largest};

}  // namespace CRAM_ISA
}  // namespace cram
