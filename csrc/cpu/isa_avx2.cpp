// The kernels of the SIMD level "avx2"; the build gives this file its compiler flags.
#define CRAM_ISA isa_avx2
#define CRAM_ISA_NAME "avx2"
#include "kernels_impl.h"

const cram::Kernels& cram::kernels_avx2() { return cram::CRAM_ISA::kTable; }
