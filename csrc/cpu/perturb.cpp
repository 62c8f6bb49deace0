#include "drivers.h"

namespace cram {

bool past_cache(const std::vector<Item>& items) {
  constexpr int64_t kCaches = 4 << 20;  // bytes: the second level of a few cores; beside the parameters there are gradients and activations
  int64_t bytes = 0;
  for (const Item& item : items) bytes += item.numel * size_of(item.dtype);
  return bytes > kCaches;
}

Source source_of(const Item& item, const Perturbation& p, bool from_saved) {
  const void* weights = item.master != nullptr ? item.master : from_saved ? item.saved : item.param;
  return {weights, item.master != nullptr, item.grad, item.rho, p.inv_scale != nullptr ? *p.inv_scale : 1, p.inv_scale != nullptr, p.past_cache};
}

void perturb_masked(const Context& c, const std::vector<Item>& items, const Perturbation& p) {
  const std::vector<Range> ranges = cut(items);
  std::atomic<bool> nonfinite{false};
  *p.perturbed = 1;
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    bool bad = false;
    c.kernels.masked(source_of(item, p, false), item.dtype, r.begin, r.end, item.param, item.saved, item.mask, &bad);
    if (bad) nonfinite = true;
  });
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

}  // namespace cram
