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

#if defined(__AVX512F__)
// With a stride of 1, and 16 lanes in each of `runs`: the place of the window outside, so that what its runs are stays in registers.
template <int runs>
void gather_whole(const View& view, int64_t begin, int64_t end, float* panel) {
  for (int64_t place = 0; place < view.places; ++place) {
    __mmask16 there[runs];
    int64_t from[runs];
#pragma GCC unroll 8
    for (int r = 0; r < runs; ++r) there[r] = view.runs[place * runs + r].there, from[r] = view.runs[place * runs + r].from;
    for (int64_t k = begin + (place - begin % view.places + view.places) % view.places; k < end; k += view.places) {
      const float* image = view.image + k / view.places * view.plane;
      float* to = panel + (k - begin) * runs * kLanes;
#pragma GCC unroll 8
      for (int r = 0; r < runs; ++r) _mm512_storeu_ps(to + r * kLanes, _mm512_maskz_loadu_ps(there[r], image + from[r]));
    }
  }
}
#endif

// Where the stride is neither 1 nor 2, it is a variable.
template <int constant_stride>
void gather_runs(const View& view, int64_t begin, int64_t end, int tile, float* panel) {
  [[maybe_unused]] const int64_t stride = constant_stride == 0 ? view.stride : constant_stride;
  int64_t place = begin % view.places;
  const float* image = view.image + begin / view.places * view.plane;
  for (int64_t k = begin; k < end; ++k, panel += tile) {
    const Run* const stop = view.runs + (place + 1) * view.runs_each;
    for (const Run* run = stop - view.runs_each; run < stop; ++run) {
      const float* from = image + run->from;
      float* to = panel + run->to;
      int lane = 0;
#if defined(__AVX512F__)
      if constexpr (constant_stride != 0) {
        const uint32_t there = constant_stride == 1 ? run->there : _pdep_u32(run->there, 0x55555555);
        __m512 found = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
        if constexpr (constant_stride == 2) {
          const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
          found = _mm512_permutex2var_ps(found, even, _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + kLanes));
        }
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << run->lanes) - 1), found);
        continue;
      }
#elif defined(__AVX2__)
      if constexpr (constant_stride == 1)
        for (; lane + 8 <= run->lanes; lane += 8) {
          const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
          const __m256i there = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(run->there >> lane), bit), bit);
          _mm256_storeu_ps(to + lane, _mm256_maskload_ps(from + lane, there));
        }
#endif
      for (; lane < run->lanes; ++lane) to[lane] = run->there >> lane & 1 ? from[lane * stride] : 0.0f;
    }
    if (++place == view.places) place = 0, image += view.plane;
  }
}

void gather(const View& view, int64_t begin, int64_t end, int tile, float* panel) {
  bool plain = view.places == 1 && view.stride == 1;  // a row of the panel is as it is in the image
  for (const Run* run = view.runs; plain && run < view.runs + view.runs_each; ++run)
    plain = run->there == (1u << run->lanes) - 1 && run->from - run->to == view.runs[0].from;
  if (plain)
    return with_tile(tile, [&](auto width) {
      const float* from = view.image + begin * view.plane + view.runs[0].from;
      for (int64_t k = begin; k < end; ++k, from += view.plane, panel += width) memcpy(panel, from, width * sizeof(float));
    });
#if defined(__AVX512F__)
  if (view.stride == 1 && view.runs_each * kLanes == tile) switch (view.runs_each) {
      case 1: return gather_whole<1>(view, begin, end, panel);
      case 2: return gather_whole<2>(view, begin, end, panel);
      case 4: return gather_whole<4>(view, begin, end, panel);
      case 8: return gather_whole<8>(view, begin, end, panel);
    }
#endif
  if (view.stride == 1) return gather_runs<1>(view, begin, end, tile, panel);
  if (view.stride == 2) return gather_runs<2>(view, begin, end, tile, panel);
  gather_runs<0>(view, begin, end, tile, panel);
}

}  // namespace CRAM_ISA
}  // namespace cram
