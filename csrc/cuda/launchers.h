// The ops of the CUDA backend on checked input, torch-free: pointers, numbers and a stream. Each puts its launches on the stream and returns; nothing
// is read back. A launch that fails throws std::runtime_error.
#pragma once

#include <functional>
#include <vector>

#include "../adam.h"
#include "../item.h"
#include "../sgd.h"

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

// bins: [num_sets, 2^bits], zeros
void topk_histogram(const std::vector<Item>& items, const Perturbation& p, const int64_t* prefix, int shift, int bits, int64_t* bins, Stream stream);

// perturb_nm_; without a flag in the perturbation prune_nm_. Memory: a byte a weight for the masks of tensors whose axis 1 lies far apart in memory.
void nm(const std::vector<Item>& items, const Perturbation& p, int n, int m, const Allocate& allocate, Stream stream);

void perturb_masked(const std::vector<Item>& items, const Perturbation& p, Stream stream);

// What the updates share; everything on the device.
struct Update {
  const float* inv_scale = nullptr;        // optional
  const float* first_inv_scale = nullptr;  // optional
  const float* found_inf = nullptr;        // optional
  int32_t* perturbed = nullptr;            // the flag
};

struct LearningRate {
  const float* values = nullptr;  // one, or one a tensor
  bool per_tensor = false;
};

void restore(const std::vector<Item>& items, int32_t* perturbed, Stream stream);
void restore_combine(const std::vector<Item>& items, const Update& update, Stream stream);
// options, hyper: one an item; what depends on lr and step is computed on the device.
void restore_sgd(const std::vector<Item>& items, const Update& update, const LearningRate& lr, const std::vector<SgdOptions>& options, Stream stream);
void restore_adam(const std::vector<Item>& items, const Update& update, const LearningRate& lr, const std::vector<AdamOptions>& options,
                  const std::vector<AdamHyper>& hyper, Stream stream);

// sums: room for norm_sums(items) numbers.
int64_t norm_sums(const std::vector<Item>& items);
void grad_norm(const std::vector<Item>& items, const float* inv_scale, double* sums, float* result, Stream stream);

}  // namespace cuda
}  // namespace cram
