// The ops of the CUDA backend on checked input, torch-free: pointers, numbers and a stream. Each puts its launches on the stream and returns; nothing
// is read back. A launch that fails throws std::runtime_error.
#pragma once

#include <vector>

#include "../item.h"

struct CUstream_st;

namespace cram {
namespace cuda {

using Stream = CUstream_st*;

// What the perturbations share; everything on the device.
struct Perturbation {
  const float* rho = nullptr;  // one value, or one a tensor
  bool rho_per_tensor = false;
  const float* inv_scale = nullptr;  // optional
  float* found_inf = nullptr;        // optional
  int32_t* perturbed = nullptr;      // the flag
};

void perturb_masked(const std::vector<Item>& items, const Perturbation& p, Stream stream);

}  // namespace cuda
}  // namespace cram
