// The sparse kernels of the SIMD level "portable"; the build gives this file its compiler flags.
#define CRAM_ISA sparse_isa_portable
#define CRAM_ISA_NAME "portable"
#include "kernels_impl.h"

const cram::SparseKernels& cram::sparse_portable() { return cram::CRAM_ISA::kSparse; }
