// A slice times a vector where AVX-512 permutes bytes (VBMI): x is held in registers as planes of bytes. One permutation looks 64 bytes up in 128, so
// that four of them, and eight interleavings, find 64 elements of 128. Permutations of whole floats take four times as many, gathers longer still.
#include <immintrin.h>

#include "matrix.h"

namespace cram {
namespace {

constexpr int kPlanes = 4, kPlane = 256;  // bytes of a float; bytes of a plane

struct Table {
  __m512i plane[kPlanes][kPlane / 64];
};

// x of the columns of 4 steps. Interleaving keeps to the quarters of a register, so that the columns of each step are spread over the quarters first.
template <bool wide>
inline __attribute__((always_inline)) void look_up(const Table& x, __m512i columns, __m512 (&found)[4]) {
  const __m512i at = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), columns);
  __m512i byte[kPlanes];
#pragma GCC unroll 4
  for (int p = 0; p < kPlanes; ++p) {
    byte[p] = _mm512_permutex2var_epi8(x.plane[p][0], at, x.plane[p][1]);
    if (wide) byte[p] = _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), byte[p], _mm512_permutex2var_epi8(x.plane[p][2], at, x.plane[p][3]));
  }
  const __m512i low[] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1])};
  const __m512i high[] = {_mm512_unpacklo_epi8(byte[2], byte[3]), _mm512_unpackhi_epi8(byte[2], byte[3])};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    found[2 * i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[i], high[i]));
    found[2 * i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[i], high[i]));
  }
}

inline __m512 load(const float* values, __mmask16 there) { return _mm512_maskz_loadu_ps(there, values); }
inline __m512 load(const uint16_t* values, __mmask16 there) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, values)), 16));
}

// The sums of a piece's rows, in its order, go where they belong: 16 rows at a time, looked up in the registers of all.
inline __attribute__((always_inline)) void hand_out(const Piece& piece, const __m512* sums, const Sums& s) {
  const float* start = s.fresh ? s.bias : s.from;
  for (int64_t row = 0; row < piece.rows; row += kLanes) {
    const __mmask16 there = piece.rows - row >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (piece.rows - row)) - 1);
    const __m128i place = _mm_maskz_loadu_epi8(there, piece.place + row);
    const __m512i at = _mm512_cvtepu8_epi32(place);
    const __mmask16 bit5 = _mm_test_epi8_mask(place, _mm_set1_epi8(32)), bit6 = _mm_test_epi8_mask(place, _mm_set1_epi8(64));
    __m512 of_32[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) of_32[i] = _mm512_permutex2var_ps(sums[2 * i], at, sums[2 * i + 1]);
    const __m512 low = _mm512_mask_blend_ps(bit5, of_32[0], of_32[1]), high = _mm512_mask_blend_ps(bit5, of_32[2], of_32[3]);
    const __m512 found = _mm512_mask_blend_ps(bit6, low, high);
    _mm512_mask_storeu_ps(s.to + row, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, start + row), found));
  }
}

template <bool wide, class Value>
int dot_slices(const Piece& piece, const Value* values, const float* spread, const Sums& s) {
  Table x;
#pragma GCC unroll 4
  for (int p = 0; p < kPlanes; ++p)
#pragma GCC unroll 4
    for (int i = 0; i < (wide ? 4 : 2); ++i) x.plane[p][i] = _mm512_loadu_si512(reinterpret_cast<const char*>(spread) + p * kPlane + i * 64);
  const uint8_t* column = piece.column;
  __m512i largest = _mm512_setzero_si512();
  __m512 sums[kMaxSection / kLanes];
#pragma GCC unroll 8
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t slice = 0; slice * kLanes < piece.rows; ++slice) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()}, found[4];
    int left = piece.steps_of[slice];
    for (; left >= 4; left -= 4, values += 4 * kLanes, column += 4 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) __builtin_prefetch(reinterpret_cast<const char*>(values + i * kLanes) + kAhead);
      __builtin_prefetch(column + kAhead / sizeof(*values));
      const __m512i columns = _mm512_loadu_si512(column);
      largest = _mm512_max_epu8(largest, columns);
      look_up<wide>(x, columns, found);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = _mm512_fmadd_ps(load(values + i * kLanes, 0xffff), found[i], sum[i]);
    }
    if (left > 0) {  // what is not there is neither read nor summed up
      const uint64_t there = (uint64_t{1} << left * kLanes) - 1;
      const __m512i columns = _mm512_maskz_loadu_epi8(there, column);
      largest = _mm512_max_epu8(largest, columns);
      look_up<wide>(x, columns, found);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const __mmask16 step = static_cast<__mmask16>(there >> i * kLanes);
        sum[i] = _mm512_mask3_fmadd_ps(load(values + i * kLanes, step), found[i], sum[i], step);
      }
      values += left * kLanes, column += left * kLanes;
    }
    sums[slice] = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
  }
  hand_out(piece, sums, s);
  const __m256i of_32 = _mm256_max_epu8(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
  const __m128i of_16 = _mm_max_epu8(_mm256_castsi256_si128(of_32), _mm256_extracti128_si256(of_32, 1));
  const __m128i of_8 = _mm_max_epu8(of_16, _mm_srli_epi16(of_16, 8));  // in the lower half of each 16 bits
  const __m128i least = _mm_minpos_epu16(_mm_andnot_si128(of_8, _mm_set1_epi16(255)));
  return 255 - _mm_extract_epi16(least, 0);
}

template <class Value>
int dot_of(const Piece& piece, const Value* values, int64_t block, const float* spread, const Sums& s) {
  if (block < 128) return dot_slices<false>(piece, values, spread, s);  // a filler is in column `block`
  return dot_slices<true>(piece, values, spread, s);
}

void spread(const float* x, int64_t width, int64_t block, float* to) {
  char* bytes = reinterpret_cast<char*>(to);
  for (int64_t i = 0; i <= block; i += 16) {
    const int64_t left = width - i;
    const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
    const __m512i found = _mm512_castps_si512(_mm512_maskz_loadu_ps(there, x + i));
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + p * kPlane + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(found, 8 * p)));
  }
}

int dot(const Piece& piece, int64_t block, const float* spread, const Sums& s) { return dot_of(piece, piece.values, block, spread, s); }
int dot_half(const Piece& piece, int64_t block, const float* spread, const Sums& s) { return dot_of(piece, piece.half, block, spread, s); }

inline __mmask64 first_of(int64_t n) { return n >= 64 ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1; }

bool ordered(const Piece& piece) {
  static const struct Count {
    alignas(64) uint8_t of[kMaxSection];
    Count() {
      for (int i = 0; i < kMaxSection; ++i) of[i] = static_cast<uint8_t>(i);
    }
  } numbers;
  const __m512i order[] = {_mm512_maskz_loadu_epi8(first_of(piece.rows), piece.order),
                           _mm512_maskz_loadu_epi8(first_of(piece.rows - 64), piece.order + 64)};
  for (int64_t row = 0; row < piece.rows; row += 64) {
    const __mmask64 there = first_of(piece.rows - row);
    const __m512i found = _mm512_permutex2var_epi8(order[0], _mm512_maskz_loadu_epi8(there, piece.place + row), order[1]);
    if (_mm512_mask_cmpneq_epu8_mask(there, found, _mm512_load_si512(numbers.of + row))) return false;
  }
  return true;
}

}  // namespace

const SparseKernels& sparse_vbmi(bool halved) {
  const auto with_bytes = [](SparseKernels found) {
    found.spread = spread, found.dot = dot, found.dot_half = dot_half, found.ordered = ordered;
    return found;
  };
  static const SparseKernels whole = with_bytes(sparse_avx512(false)), halves = with_bytes(sparse_avx512(true));
  return halved ? halves : whole;
}

}  // namespace cram
