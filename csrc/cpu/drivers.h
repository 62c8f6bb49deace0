// What the ops of the CPU backend share, torch-free: each cuts its list into ranges and runs the kernels on them in parallel (Op::run, in the file
// with the op's stem). But for a top-k, which selects among what its pass found, all memory is allocated before the first weight changes; then the
// flag is set and the weights are saved, so that they come back.
#pragma once

#include "../ops.h"
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

// Of a call; its items get their rho. Weights that are perturbed already are refused.
Perturbation perturbation_of(PerturbOp&, const char* op);

// Whether tensors of this size have left the caches before they are read again.
bool past_cache(const std::vector<Item>&);

// Where the unperturbed weights are, and how to read u from there: for ranges whose parameter may be overwritten already (`saved`) or not yet.
Source source_of(const Item&, const Perturbation&, bool from_saved);

// Raises the flag, then calls body(worker, task, item, source, nonfinite) for each range, in parallel. A body says in
// `nonfinite` whether a gradient is Inf or NaN; then found_inf is set.
template <class Body>
void perturb_ranges(const Context& c, const std::vector<Item>& items, const Perturbation& p, const std::vector<Range>& ranges, Body body) {
  std::atomic<bool> nonfinite{false};
  if (p.perturbed != nullptr) *p.perturbed = 1;
  for_tasks(c.pool, ranges.size(), [&](int worker, int64_t task) {
    const Item& item = items[ranges[task].item];
    bool bad = false;
    body(worker, task, item, source_of(item, p, false), bad);
    if (bad) nonfinite = true;
  });
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

}  // namespace cram
