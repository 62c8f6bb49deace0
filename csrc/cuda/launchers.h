// The ops of the CUDA backend on checked input, torch-free: pointers, numbers and a stream. Each puts its launches on the stream and returns; nothing
// is read back. A launch that fails throws std::runtime_error.
#pragma once

#include <functional>
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

// Memory on the device that lives until the stream has come by, aligned to 16.
using Allocate = std::function<void*(int64_t bytes)>;

enum class TopkMode { kPerturb, kPrune, kThreshold };

struct TopkCall {
  TopkMode mode;
  const int64_t* k;  // [num_sets]
  int64_t num_sets;
  int32_t* thresholds;  // [num_sets]
  int64_t* stats;       // [num_sets, 3]
  Allocate allocate;    // about 0.16 bytes a weight of a large set
};

// perturb_topk_, prune_topk_ and topk_threshold; the perturbation is that of perturb_topk_.
void topk(const std::vector<Item>& items, const Perturbation& p, const TopkCall& call, Stream stream);

// perturb_nm_; without a flag in the perturbation prune_nm_. Memory: a byte a weight for the masks of tensors whose axis 1 lies far apart in memory.
void nm(const std::vector<Item>& items, const Perturbation& p, int n, int m, const Allocate& allocate, Stream stream);

void perturb_masked(const std::vector<Item>& items, const Perturbation& p, Stream stream);

}  // namespace cuda
}  // namespace cram
