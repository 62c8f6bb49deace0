#include <algorithm>

#include "drivers.h"

namespace cram {

void TopkHistogram::run(const Context& c) {
  Perturbation p;
  p.inv_scale = inv_scale;
  for (size_t i = 0; i < items.size(); ++i) items[i].rho = rho.at(i);
  std::vector<Bins> found(c.pool.threads, Bins(num_sets << bits));
  const std::vector<Range> ranges = cut(items, [](const Item& item) { return item.set >= 0 ? kChunk : 0; });
  for_tasks(c.pool, ranges.size(), [&](int worker, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    c.kernels.topk_histogram(source_of(item, p, false), item.dtype, r.begin, r.end, static_cast<int>(shift), 1 << bits,
                             static_cast<int>(shift + bits), static_cast<int32_t>(std::min<int64_t>(prefix[item.set], INT32_MAX)),
                             found[worker].data() + (item.set << bits));
  });
  add_up(c.pool, found);
  std::copy(found[0].begin(), found[0].end(), bins);
}

}  // namespace cram
