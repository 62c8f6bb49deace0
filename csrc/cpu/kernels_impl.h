// The passes of kernels.h for the instruction set that this file is compiled for. Included by isa_*.cpp, once each.
#include "nm_kernels.h"
#include "topk_kernels.h"
#include "update_kernels.h"

namespace cram {
namespace CRAM_ISA {

static void masked(Source source, DType dtype, int64_t begin, int64_t end, void* out, void* saved, const uint8_t* mask, bool* nonfinite) {
  const I largest(kInfKey);
  with_u(source, dtype, begin, end, nonfinite, [&](auto t, int64_t i, auto lanes, F u) CRAM_MELT {
    const Bits kept = mask == nullptr ? ~Bits(0) : load_bits(mask, i, lanes);
    write<decltype(t)>(source, i, lanes, u, kept | greater_bits(magnitude_key(u), largest), out, saved);
  });
}

static void norm(const void* grad, DType dtype, int64_t numel, int64_t begin, int64_t end, float inv_scale, bool scaled, double* sums) {
  with_type(dtype, [&](auto t) CRAM_MELT {
    using T = decltype(t);
    const T* g = static_cast<const T*>(grad);
    const F factor(inv_scale);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float x[kNormChunk];
      const int64_t first = chunk * kNormChunk;
      const int64_t last = first + kNormChunk < numel ? first + kNormChunk : numel;
      if (last - first < kNormChunk) memset(x, 0, sizeof x);
      for_blocks(first, last, [&](int64_t i, auto lanes) CRAM_MELT {
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

constexpr Kernels kTable = {CRAM_ISA_NAME, topk_stream, topk_apply, topk_histogram, masked, nm, round_master, combine, sgd, adam, norm};

}  // namespace CRAM_ISA
}  // namespace cram
