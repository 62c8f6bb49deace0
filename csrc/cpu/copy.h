// The copy that the benchmarks compare with.
#pragma once

#include <cstddef>

#include "simd.h"

namespace cram {

// Copies between addresses that do not overlap, with non-temporal stores, on torch's threads.
void streaming_copy(void* to, const void* from, size_t bytes, size_t threads);

}  // namespace cram
