#include "drivers.h"

namespace cram {

void PerturbMasked::run(const Context& c) {
  const Perturbation p = perturbation_of(*this, kName);
  const std::vector<Range> ranges = cut(items);
  std::atomic<bool> nonfinite{false};
  *perturbed = 1;
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    bool bad = false;
    c.kernels.masked(source_of(item, p, false), item.dtype, r.begin, r.end, item.param, item.saved, item.mask, &bad);
    if (bad) nonfinite = true;
  });
  if (nonfinite && found_inf != nullptr) *found_inf = 1;
}

}  // namespace cram
