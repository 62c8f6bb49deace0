// Exact selection: among keys that are there, and among those of all weights.
#include <functional>

#include "topk.h"

namespace cram {

// By a histogram, then exactly in the bins that matter.
std::vector<Selected> select(const Pool& pool, const std::vector<Span>& spans, int32_t low, int32_t high, const std::vector<int64_t>& ranks,
                             int32_t step) {
  constexpr int kBins = 2048;
  int shift = 0;
  while (((static_cast<int64_t>(high) - low) >> shift) >= kBins) ++shift;
  const auto bin_of = [&](int32_t bits) { return (key_of(bits) - low - 1) >> shift; };

  std::vector<Bins> bins(pool.threads, Bins(kBins));
  for_tasks(pool, spans.size(), [&](int worker, int64_t i) {
    int64_t* own = bins[worker].data();
    for (const int32_t *bits = spans[i].bits, *end = bits + spans[i].count; bits < end; ++bits) ++own[bin_of(*bits)];
  });
  add_up(pool, bins);

  std::vector<Selected> selected;
  std::vector<int> chosen;  // bin of each rank
  std::vector<char> wanted(kBins, 0);
  for (int64_t rank : ranks) {
    int64_t larger = 0;
    int bin = kBins - 1;
    while (larger + bins[0][bin] < rank) larger += bins[0][bin--];
    chosen.push_back(bin);
    wanted[bin] = 1;
    const int64_t from = static_cast<int64_t>(low) + 1 + (static_cast<int64_t>(bin) << shift);
    selected.push_back({static_cast<int32_t>((from + step - 1) / step * step), larger});
  }
  if ((1 << shift) <= step) return selected;  // a bin has room for one key

  std::vector<std::vector<int32_t>> found(pool.threads);
  for_tasks(pool, spans.size(), [&](int worker, int64_t i) {
    for (const int32_t *bits = spans[i].bits, *end = bits + spans[i].count; bits < end; ++bits)
      if (wanted[bin_of(*bits)]) found[worker].push_back(key_of(*bits));
  });
  std::vector<int32_t> keys;
  for (size_t i = 0; i < ranks.size(); ++i) {
    keys.clear();
    for (const auto& own : found)
      for (int32_t key : own)
        if (bin_of(key) == chosen[i]) keys.push_back(key);
    const auto place = keys.begin() + (ranks[i] - selected[i].larger - 1);
    std::nth_element(keys.begin(), place, keys.end(), std::greater<>());
    selected[i].key = *place;
    selected[i].larger += std::count_if(keys.begin(), place, [&](int32_t other) { return other > *place; });
  }
  return selected;
}

// Radix select over two digits of 15 and 16 bits.
int32_t radix_select(const Context& c, const std::vector<Item>& items, const Perturbation& p, const Set& set, const std::vector<Range>& ranges,
                     bool from_saved) {
  constexpr int kBits = 16, kBins = 1 << kBits;
  std::vector<Bins> bins(std::max<size_t>(1, std::min<size_t>(c.pool.threads, ranges.size())), Bins(kBins));
  int64_t rank = set.k;
  const auto digit = [&](int shift, int prefix_shift, int32_t prefix) {
    for_tasks(c.pool, bins.size(), [&](int, int64_t worker) { std::fill(bins[worker].begin(), bins[worker].end(), 0); });
    for_tasks(c.pool, ranges.size(), [&](int worker, int64_t task) {
      const Range& r = ranges[task];
      const Item& item = items[r.item];
      c.kernels.topk_histogram(source_of(item, p, from_saved), item.dtype, r.begin, r.end, shift, kBins, prefix_shift, prefix, bins[worker].data());
    });
    add_up(c.pool, bins);
    for (int bin = kBins - 1; bin > 0; --bin) {
      if (rank <= bins[0][bin]) return bin;
      rank -= bins[0][bin];
    }
    return 0;
  };
  const int32_t high = digit(kBits, 31, 0);
  return (high << kBits) | digit(0, kBits, high);
}

}  // namespace cram
