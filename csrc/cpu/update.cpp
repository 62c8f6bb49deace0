#include <cstring>

#include "drivers.h"

namespace cram {
namespace {

void restore_range(const Context& c, const Item& item, const Range& r) {
  if (item.master != nullptr) {
    c.kernels.round_master(item.master, item.dtype, r.begin, r.end, item.param);
  } else if (item.saved != nullptr) {
    const int64_t size = size_of(item.dtype);
    memcpy(static_cast<char*>(item.param) + r.begin * size, static_cast<const char*>(item.saved) + r.begin * size, (r.end - r.begin) * size);
  }
}

bool has_gradient(const Item& item) { return item.grad != nullptr || item.first_grad != nullptr; }

// Restores every range, and calls step(item index, range, where its weights are) for those with a gradient in place of the restore.
template <class Step>
void restore_and(const Context& c, const std::vector<Item>& items, const std::vector<Range>& ranges, const Update& update, Step step) {
  const bool perturbed = *update.perturbed != 0;
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    if (update.skip || !has_gradient(item)) {
      if (perturbed) restore_range(c, item, r);
      return;
    }
    step(r.item, r, item.master != nullptr ? item.master : perturbed && item.saved != nullptr ? item.saved : item.param);
  });
  *update.perturbed = 0;
}

}  // namespace

void restore(const Context& c, const std::vector<Item>& items, int32_t* perturbed) {
  if (*perturbed == 0) return;
  Update update;
  update.skip = true;
  update.perturbed = perturbed;
  restore_and(c, items, cut(items), update, [](int32_t, const Range&, const void*) {});
}

void restore_combine(const Context& c, const std::vector<Item>& items, const Update& update) {
  const bool perturbed = *update.perturbed != 0;
  restore_and(c, items, cut(items), update, [&](int32_t i, const Range& r, const void*) {
    if (perturbed) restore_range(c, items[i], r);
    if (items[i].grad != nullptr) c.kernels.combine(items[i], r.begin, r.end, update.scales);
  });
}

void restore_sgd(const Context& c, const std::vector<Item>& items, const Update& update, const std::vector<SgdOptions>& options) {
  const bool streamed = past_cache(items);
  restore_and(c, items, cut(items), update, [&](int32_t i, const Range& r, const void* weights) {
    c.kernels.sgd(items[i], weights, streamed, r.begin, r.end, update.scales, options[i]);
  });
}

void restore_adam(const Context& c, const std::vector<Item>& items, const Update& update, std::vector<AdamOptions> options,
                  const std::vector<AdamHyper>& hyper) {
  const std::vector<Range> ranges = cut(items);  // all that takes memory, before anything is counted
  {
    PlainArithmetic plain;
    for (size_t i = 0; i < items.size(); ++i) {
      if (update.skip || !has_gradient(items[i])) continue;
      *items[i].step += 1;
      set_step(options[i], hyper[i].beta1, hyper[i].beta2, hyper[i].lr, hyper[i].weight_decay, static_cast<int64_t>(*items[i].step));
    }
  }
  const bool streamed = past_cache(items);
  restore_and(c, items, ranges, update, [&](int32_t i, const Range& r, const void* weights) {
    c.kernels.adam(items[i], weights, streamed, r.begin, r.end, update.scales, options[i], hyper[i].weight_decay != 0);
  });
}

float grad_norm(const Context& c, const std::vector<Item>& items, const float* inv_scale) {
  constexpr int64_t kStep = 32;      // chunks a task
  std::vector<Item> chunks = items;  // their numel counted in chunks
  std::vector<int64_t> first(items.size() + 1, 0);
  for (size_t i = 0; i < items.size(); ++i) {
    chunks[i].numel = (items[i].numel + kNormChunk - 1) / kNormChunk;
    first[i + 1] = first[i] + chunks[i].numel;
  }
  int64_t size = 1;
  while (size < first.back()) size *= 2;
  std::vector<double> sums(size, 0.0);
  const std::vector<Range> ranges = cut(chunks, [](const Item&) { return kStep; });
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    c.kernels.norm(items[r.item].grad, items[r.item].dtype, items[r.item].numel, r.begin, r.end, inv_scale != nullptr ? *inv_scale : 1,
                   inv_scale != nullptr, sums.data() + first[r.item]);
  });
  PlainArithmetic plain;
  for (int64_t half = size / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return canonical(static_cast<float>(__builtin_sqrt(sums[0])));
}

}  // namespace cram
