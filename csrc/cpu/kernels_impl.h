// The passes of kernels.h for the instruction set that this file is compiled for. Included by isa_*.cpp, once each.
#include "nm_kernels.h"
#include "norm_kernels.h"
#include "topk_kernels.h"
#include "update_kernels.h"

namespace cram {
namespace CRAM_ISA {

static void masked(Source source, DType dtype, int64_t begin, int64_t end, void* out, void* saved, const uint8_t* mask, bool* nonfinite) {
  const I largest(kInfKey);
  with_u(source, dtype, begin, end, nonfinite, [&](auto t, int64_t i, auto lanes, F u) CRAM_INLINE_LAMBDA {
    const Bits kept = mask == nullptr ? ~Bits(0) : load_bits(mask, i, lanes);
    write<decltype(t)>(source, i, lanes, u, kept | greater_bits(magnitude_key(u), largest), out, saved);
  });
}

constexpr Kernels kTable = {CRAM_ISA_NAME, topk_stream, topk_apply, topk_histogram, masked, nm, round_master, combine, sgd, adam, norm};

}  // namespace CRAM_ISA
}  // namespace cram
