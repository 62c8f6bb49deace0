// The SIMD levels of this machine; which one runs is chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace cram {

#define CRAM_EXPORT __attribute__((visibility("default")))  // what Python calls (host.cpp)

std::vector<std::string> simd_levels();  // those that this CPU has, best last
const Kernels& kernels();                // the chosen level's; CRAM_KERNELS_SIMD overrides the best
void set_simd_level(const std::string& name);

}  // namespace cram
