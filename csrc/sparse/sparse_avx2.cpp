// The sparse kernels of the SIMD level "avx2"; the build gives this file its compiler flags.
#define CRAM_ISA sparse_isa_avx2
#define CRAM_ISA_NAME "avx2"
#include "kernels_impl.h"

const cram::SparseKernels& cram::sparse_avx2() { return cram::CRAM_ISA::kSparse; }
