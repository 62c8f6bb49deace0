// What the ops of the CUDA backend share, torch-free. Op::run, in the file with the op's stem, puts its launches on the stream and returns; nothing is
// read back. A launch that fails throws std::runtime_error.
#pragma once

#include <functional>
#include <vector>

#include "../ops.h"

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

inline Perturbation perturbation_of(const PerturbOp& op) { return {op.rho.values, op.rho.each, op.inv_scale, op.found_inf, op.perturbed}; }

// Memory on the device that lives until the stream has come by, aligned to 16.
using Allocate = std::function<void*(int64_t bytes)>;

struct Context {
  Stream stream;
  Allocate allocate;
};

// What the updates share; everything on the device.
struct Update {
  const float* inv_scale = nullptr;        // optional
  const float* first_inv_scale = nullptr;  // optional
  const float* found_inf = nullptr;        // optional
  int32_t* perturbed = nullptr;            // the flag
};

inline Update update_of(const UpdateOp& op) { return {op.inv_scale, op.first_inv_scale, op.found_inf, op.perturbed}; }

}  // namespace cuda
}  // namespace cram
