#include "update.h"

namespace cram {

void RestoreSgd::run(const Context& c) {
  for (size_t i = 0; i < items.size(); ++i) settings[i].lr = lr.at(i);
  const Update update = update_of(*this);
  const bool streamed = past_cache(items);
  restore_and(c, items, cut(items), update, [&](int32_t i, const Range& r, const void* weights) {
    c.kernels.sgd(items[i], weights, streamed, r.begin, r.end, update.scales, settings[i]);
  });
}

}  // namespace cram
