#include <algorithm>
#include <numeric>

#include "drivers.h"

namespace cram {
namespace {

constexpr int64_t kStrip = 1024;  // weights: their keys and their u stay in the first-level cache

// Whole tiles (m rows of `inner`) and whole mask bytes.
int64_t unit(const Item& item, int m) { return std::lcm(m * item.inner, static_cast<int64_t>(8)); }
int64_t strip(const Item& item, int m) { return std::max<int64_t>(1, kStrip / unit(item, m)) * unit(item, m); }

int64_t chunk(const Item& item, int m) {
  if (item.inner == 0) return kChunk;
  return std::max<int64_t>(1, kChunk / strip(item, m)) * strip(item, m);
}

void prune_nm(const Context& c, const std::vector<Item>& items, const Perturbation& p, const Pattern& pattern) {
  const int n = pattern.n, m = pattern.m;
  const std::vector<Range> ranges = cut(items, [&](const Item& item) { return chunk(item, m); });
  int64_t widest = 0;
  for (const Item& item : items)
    if (item.inner > 0) widest = std::max(widest, std::min(strip(item, m), item.numel));
  std::vector<std::vector<char>> scratch(c.pool.threads, std::vector<char>(nm_scratch(widest)));
  perturb_ranges(c, items, p, ranges, [&](int worker, int64_t task, const Item& item, const Source& source, bool& nonfinite) {
    const Range& r = ranges[task];
    if (item.inner == 0) return c.kernels.masked(source, item.dtype, r.begin, r.end, item.param, item.saved, nullptr, &nonfinite);
    for (int64_t begin = r.begin; begin < r.end; begin += strip(item, m)) {
      const int64_t end = std::min(begin + strip(item, m), r.end);
      c.kernels.nm(source, item.dtype, begin, end, item.inner, n, m, item.param, item.saved, item.mask, scratch[worker].data(), &nonfinite);
    }
  });
}

}  // namespace

void PruneNm::run(const Context& c) {
  std::vector<Item> pruned;
  for (const Item& item : items)
    if (item.inner > 0) pruned.push_back(item);
  prune_nm(c, pruned, {}, pattern);
}

void PerturbNm::run(const Context& c) { prune_nm(c, items, perturbation_of(*this, kName), pattern); }

}  // namespace cram
