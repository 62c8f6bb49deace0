#include "update.h"

namespace cram {

void RestoreAdam::run(const Context& c) {
  const Update update = update_of(*this);
  const std::vector<Range> ranges = cut(items);  // all that takes memory, before anything is counted
  {
    PlainArithmetic plain;
    for (size_t i = 0; i < items.size(); ++i) {
      if (update.skip || !is_updated(items[i])) continue;
      *items[i].step += 1;
      set_step(settings[i], hyper[i].beta1, hyper[i].beta2, lr.at(i), hyper[i].weight_decay, static_cast<int64_t>(*items[i].step));
    }
  }
  const bool streamed = past_cache(items);
  restore_and(c, items, ranges, update, [&](int32_t i, const Range& r, const void* weights) {
    c.kernels.adam(items[i], weights, streamed, r.begin, r.end, update.scales, settings[i], hyper[i].weight_decay != 0);
  });
}

}  // namespace cram
