// The SIMD levels of this machine; which one runs is chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace cram {

#define CRAM_EXPORT __attribute__((visibility("default")))  // the host module calls these

CRAM_EXPORT std::vector<std::string> simd_levels();  // those that this CPU has, best last
CRAM_EXPORT const Kernels& kernels();                // the chosen level's; CRAM_KERNELS_SIMD overrides the best
CRAM_EXPORT void set_simd_level(const std::string& name);

}  // namespace cram
