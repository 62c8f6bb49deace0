// The kernels of the SIMD level "portable"; the build gives this file its compiler flags.
#define CRAM_ISA isa_portable
#define CRAM_ISA_NAME "portable"
#include "kernels_impl.h"

const cram::Kernels& cram::kernels_portable() { return cram::CRAM_ISA::kTable; }
