// The sparse kernels of the SIMD level "avx512"; the build gives this file its compiler flags.
#define CRAM_ISA sparse_isa_avx512
#define CRAM_ISA_NAME "avx512"
#include "kernels_impl.h"

const cram::SparseKernels& cram::sparse_avx512(bool halved) {
  static const SparseKernels whole = CRAM_ISA::kSparse, halves = [] {
    SparseKernels found = CRAM_ISA::kSparse;
    found.accumulate = CRAM_ISA::accumulate<true>;
    return found;
  }();
  return halved ? halves : whole;
}
