// The ops of the CPU backend on checked input, torch-free: each cuts its list into ranges and runs the kernels on them in parallel.
// But for a top-k, which selects among what its pass found, all memory is allocated before the first weight changes; then the flag is set and the
// weights are saved, so that they come back.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace cram {

struct Context {
  const Pool& pool;
  const Kernels& kernels;
};

struct Perturbation {
  const float* inv_scale = nullptr;  // optional
  float* found_inf = nullptr;        // optional
  int32_t* perturbed = nullptr;      // the flag
  bool past_cache = false;           // the list is larger than the caches
};

// Whether tensors of this size have left the caches before they are read again.
bool past_cache(const std::vector<Item>&);

struct TopkStats {
  int64_t kept, candidates, fallback;
};

// thresholds, stats: [num_sets]
void topk_threshold(const Context&, const std::vector<Item>&, const int64_t* k, int64_t num_sets, int32_t* thresholds);
// bins: [num_sets, 2^bits], zeros
void topk_histogram(const Context&, const std::vector<Item>&, const Perturbation&, const int64_t* prefix, int64_t num_sets, int shift, int bits,
                    int64_t* bins);
void prune_topk(const Context&, const std::vector<Item>&, const int64_t* k, int64_t num_sets, int32_t* thresholds, TopkStats* stats);
void perturb_topk(const Context&, const std::vector<Item>&, const Perturbation&, const int64_t* k, int64_t num_sets, int32_t* thresholds,
                  TopkStats* stats);

void prune_nm(const Context&, const std::vector<Item>&, int n, int m);
void perturb_nm(const Context&, const std::vector<Item>&, const Perturbation&, int n, int m);

void perturb_masked(const Context&, const std::vector<Item>&, const Perturbation&);

struct Update {
  Scales scales;
  bool skip = false;             // found_inf: only restore
  int32_t* perturbed = nullptr;  // the flag
};

void restore(const Context&, const std::vector<Item>&, int32_t* perturbed);
void restore_combine(const Context&, const std::vector<Item>&, const Update&);
void restore_sgd(const Context&, const std::vector<Item>&, const Update&, const std::vector<SgdOptions>&);

void restore_adam(const Context&, const std::vector<Item>&, const Update&, std::vector<AdamOptions>, const std::vector<AdamHyper>&);

float grad_norm(const Context&, const std::vector<Item>&, const float* inv_scale);

// Where the unperturbed weights are, and how to read u from there: for ranges whose parameter may be overwritten already (`saved`) or not yet.
Source source_of(const Item&, const Perturbation&, bool from_saved);

}  // namespace cram
