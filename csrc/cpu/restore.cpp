#include "update.h"

namespace cram {

void Restore::run(const Context& c) {
  if (*perturbed == 0) return;
  Update update;
  update.skip = true;
  update.perturbed = perturbed;
  restore_and(c, items, cut(items), update, [](int32_t, const Range&, const void*) {});
}

void RestoreCombine::run(const Context& c) {
  const Update update = update_of(*this);
  const bool was_perturbed = *perturbed != 0;
  restore_and(c, items, cut(items), update, [&](int32_t i, const Range& r, const void*) {
    if (was_perturbed) restore_range(c, items[i], r);
    if (items[i].grad != nullptr) c.kernels.combine(items[i], r.begin, r.end, update.scales);
  });
}

}  // namespace cram
