// The squares of chunks of 1024 elements. Included by kernels_impl.h.
#pragma once

#include "blocks.h"

namespace cram {
namespace CRAM_ISA {

static void norm(const void* grad, DType dtype, int64_t numel, int64_t begin, int64_t end, float inv_scale, bool scaled, double* sums) {
  with_type(dtype, [&](auto t) CRAM_INLINE_LAMBDA {
    using T = decltype(t);
    const T* g = static_cast<const T*>(grad);
    const F factor(inv_scale);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float x[kNormChunk];
      const int64_t first = chunk * kNormChunk;
      const int64_t last = first + kNormChunk < numel ? first + kNormChunk : numel;
      if (last - first < kNormChunk) memset(x, 0, sizeof x);
      for_blocks(first, last, [&](int64_t i, auto lanes) CRAM_INLINE_LAMBDA {
        F block = load(g + i, lanes);
        if (scaled) block = mul(block, factor);
        store(x + (i - first), block, lanes);
      });
      double folded[kNormChunk / 2];
      for (int i = 0; i < kNormChunk / 2; ++i) {
        const double a = x[i], b = x[i + kNormChunk / 2];
        folded[i] = a * a + b * b;
      }
      for (int half = kNormChunk / 4; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) folded[i] += folded[i + half];
      sums[chunk] = folded[0];
    }
  });
}

}  // namespace CRAM_ISA
}  // namespace cram
