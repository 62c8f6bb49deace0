#include "drivers.h"

namespace cram {

void GradNorm::run(const Context& c) {
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
  *norm = canonical(static_cast<float>(__builtin_sqrt(sums[0])));
}

}  // namespace cram
