// What a restore and the updates share.
#pragma once

#include <cstring>

#include "drivers.h"

namespace cram {

struct Update {
  Scales scales;
  bool skip = false;             // found_inf: only restore
  int32_t* perturbed = nullptr;  // the flag
};

inline Update update_of(const UpdateOp& op) {
  Update update;
  if (op.inv_scale != nullptr) update.scales.grad = *op.inv_scale, update.scales.has_grad = true;
  if (op.first_inv_scale != nullptr) update.scales.first_grad = *op.first_inv_scale, update.scales.has_first_grad = true;
  PlainArithmetic plain;  // a denormal is not 0
  update.skip = op.found_inf != nullptr && *op.found_inf != 0;
  update.perturbed = op.perturbed;
  return update;
}

inline void restore_range(const Context& c, const Item& item, const Range& r) {
  if (item.master != nullptr) {
    c.kernels.round_master(item.master, item.dtype, r.begin, r.end, item.param);
  } else if (item.saved != nullptr) {
    const int64_t size = size_of(item.dtype);
    memcpy(static_cast<char*>(item.param) + r.begin * size, static_cast<const char*>(item.saved) + r.begin * size, (r.end - r.begin) * size);
  }
}

// Restores every range, and calls step(item index, range, where its weights are) for those with a gradient in place of the restore.
template <class Step>
void restore_and(const Context& c, const std::vector<Item>& items, const std::vector<Range>& ranges, const Update& update, Step step) {
  const bool perturbed = *update.perturbed != 0;
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    if (update.skip || !UpdateOp::is_updated(item)) {
      if (perturbed) restore_range(c, item, r);
      return;
    }
    step(r.item, r, item.master != nullptr ? item.master : perturbed && item.saved != nullptr ? item.saved : item.param);
  });
  *update.perturbed = 0;
}

}  // namespace cram
