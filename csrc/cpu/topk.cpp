// Global top-k in one pass: sample a bracket around the threshold, perturb and prune on the guess while writing down what falls into the
// bracket, select exactly among those, fix them up. Where the guess fails, a radix select over the saved weights: costs time, never exactness.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>

#include "../perturb.h"
#include "drivers.h"

namespace cram {
namespace {

constexpr int64_t kDirect = 2048;    // sets up to this size: every weight is a candidate
constexpr int64_t kSample = 65536;   // elements, at most
constexpr double kDeviations = 4;    // half width of the bracket; the guess fails about once in 16,000 steps
constexpr int64_t kSampleTask = 4096;

struct Set {
  std::vector<int32_t> items;
  int64_t numel = 0;
  int64_t k = 0;
  Bracket bracket = {kKeepAll, kNanKey, kKeepAll, true};
  bool settled = false;  // the threshold is known without looking at a weight
  bool fallback = false;
  int32_t threshold = 0;
  int64_t kept = 0;
  std::atomic<int64_t> above{0}, candidates{0}, nans{0};
  std::atomic<bool> overflow{false};

  int64_t most_candidates() const { return std::max(2 * kDirect, numel / 16); }
};

using Sets = std::vector<std::unique_ptr<Set>>;

Sets make_sets(const std::vector<Item>& items, const int64_t* k, int64_t num_sets) {
  Sets sets;
  for (int64_t s = 0; s < num_sets; ++s) {
    sets.push_back(std::make_unique<Set>());
    sets.back()->k = k[s];
  }
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].set < 0) continue;
    sets[items[i].set]->items.push_back(static_cast<int32_t>(i));
    sets[items[i].set]->numel += items[i].numel;
  }
  for (auto& set : sets) {
    set->settled = set->k < 1 || set->k > set->numel;
    if (!set->settled) continue;
    set->threshold = set->k < 1 ? kNanKey : kKeepAll;
    set->bracket = {set->threshold, set->threshold, set->threshold, false};
  }
  return sets;
}

// ---- 1. Sample ----

template <class T>
float read(const void* p, int64_t i) {
  return widen(static_cast<const T*>(p)[i]);
}

template <class T>
int32_t key_at(const Source& s, int64_t i) {
  float u = s.master ? static_cast<const float*>(s.weights)[i] : read<T>(s.weights, i);
  if (s.grad != nullptr) {
    float g = read<T>(s.grad, i);
    if (s.scaled) g = mul(g, s.inv_scale);
    u = rounded(uphill(u, g, s.rho), T{});
  }
  return magnitude_key(u);
}

int32_t key_at(const Source& source, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return key_at<BFloat16>(source, i);
    case DType::kFloat16:
      return key_at<Float16>(source, i);
    default:
      return key_at<float>(source, i);
  }
}

uint64_t scramble(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Keys of sample elements [begin, end) of `total`: one at a hashed place of each of `total` equal strata of the set.
void sample_keys(const std::vector<Item>& items, const Set& set, const Perturbation& p, int64_t total, int64_t begin, int64_t end, int32_t* keys) {
  size_t at = 0;
  int64_t first = 0;  // of item `at`, among the set's weights
  for (int64_t j = begin; j < end; ++j) {
    const int64_t low = static_cast<int64_t>(static_cast<__int128>(j) * set.numel / total);
    const int64_t high = static_cast<int64_t>(static_cast<__int128>(j + 1) * set.numel / total);
    const int64_t place = low + static_cast<int64_t>(scramble(j) % (high - low));
    while (place >= first + items[set.items[at]].numel) first += items[set.items[at++]].numel;
    const Item& item = items[set.items[at]];
    keys[j] = key_at(source_of(item, p, false), item.dtype, place - first);
  }
}

// The keys between which the k-th largest lies, but for bad luck.
Bracket bracket_of(int32_t* keys, int64_t size, const Set& set) {
  const double share = static_cast<double>(set.k) / static_cast<double>(set.numel);
  const double rank = share * static_cast<double>(size);
  const double width = kDeviations * std::sqrt(rank * (1 - share)) + 1;
  const int64_t upper = static_cast<int64_t>(std::floor(rank - width)) - 1;  // from the largest, 0-based
  const int64_t lower = static_cast<int64_t>(std::ceil(rank + width));
  Bracket bracket = {kKeepAll, kNanKey, kKeepAll, true};
  int32_t* from = keys;
  if (upper >= 0) {
    std::nth_element(keys, keys + upper, keys + size, std::greater<>());
    bracket.high = keys[upper];
    from = keys + upper + 1;
  }
  if (lower < size) {
    std::nth_element(from, keys + lower, keys + size, std::greater<>());
    bracket.low = keys[lower] - 1;
  }
  // A bracket of one key (heavy ties): if the guess holds, that key is the threshold, and no list is needed.
  bracket.append = bracket.high - bracket.low > 1;
  bracket.cut = bracket.append ? bracket.low : bracket.high;
  return bracket;
}

struct SampleTask {
  int64_t set, total, begin, end;
  int64_t place;  // of the set's first key among all keys
};

void guess(const Context& c, const std::vector<Item>& items, const Perturbation& p, Sets& sets) {
  std::vector<SampleTask> tasks, brackets;
  int64_t size = 0;
  for (size_t s = 0; s < sets.size(); ++s) {
    const Set& set = *sets[s];
    if (set.settled || set.numel <= kDirect) continue;
    const int64_t total = std::clamp(set.numel / 8, kDirect / 2, kSample);
    brackets.push_back({static_cast<int64_t>(s), total, 0, total, size});
    for (int64_t begin = 0; begin < total; begin += kSampleTask)
      tasks.push_back({static_cast<int64_t>(s), total, begin, std::min(begin + kSampleTask, total), size});
    size += total;
  }
  if (tasks.empty()) return;
  std::vector<int32_t> keys(size);
  for_tasks(c.pool, tasks.size(), [&](int, int64_t i) {
    const SampleTask& t = tasks[i];
    sample_keys(items, *sets[t.set], p, t.total, t.begin, t.end, keys.data() + t.place);
  });
  for_tasks(c.pool, brackets.size(), [&](int, int64_t i) {
    const SampleTask& t = brackets[i];
    sets[t.set]->bracket = bracket_of(keys.data() + t.place, t.total, *sets[t.set]);
  });
}

// ---- 2. One pass ----

// The candidates that one worker found, range by range.
class CandidateList {
 public:
  struct Record {
    int64_t range, first, count;
  };

  ~CandidateList() {
    free(keys_);
    free(offsets_);
  }

  // Room for `count` more; false where there is no memory.
  bool reserve(int64_t count) {
    if (size_ + count <= capacity_) return true;
    const int64_t capacity = std::max(2 * capacity_, size_ + count);
    void* keys = realloc(keys_, capacity * sizeof(int32_t));
    if (keys != nullptr) keys_ = static_cast<int32_t*>(keys);
    void* offsets = keys == nullptr ? nullptr : realloc(offsets_, capacity * sizeof(uint16_t));
    if (offsets == nullptr) return false;
    offsets_ = static_cast<uint16_t*>(offsets);
    capacity_ = capacity;
    return true;
  }

  Candidates end() { return {keys_ + size_, offsets_ + size_}; }

  void append(int64_t range, int64_t count) {
    if (count > 0) records_.push_back({range, size_, count});
    size_ += count;
  }

  const std::vector<Record>& records() const { return records_; }
  const int32_t* keys(const Record& r) const { return keys_ + r.first; }
  const uint16_t* offsets(const Record& r) const { return offsets_ + r.first; }

 private:
  int32_t* keys_ = nullptr;
  uint16_t* offsets_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
  std::vector<Record> records_;
};

struct Pass {
  std::vector<Range> ranges;
  std::vector<CandidateList> found;  // [threads]
};

// `write`: perturb, save, prune on the guess; else only count and find.
void stream(const Context& c, const std::vector<Item>& items, const Perturbation& p, Sets& sets, bool write, Pass& pass) {
  pass.ranges = cut(items, [&](const Item& item) {
    const bool open = item.set >= 0 && !sets[item.set]->settled;
    return write || open ? kChunk : 0;
  });
  pass.found = std::vector<CandidateList>(c.pool.threads);
  std::atomic<bool> nonfinite{false};
  if (p.perturbed != nullptr) *p.perturbed = 1;
  for_tasks(c.pool, pass.ranges.size(), [&](int worker, int64_t task) {
    const Range& r = pass.ranges[task];
    const Item& item = items[r.item];
    const Source source = source_of(item, p, false);
    Counts counts;
    if (item.set < 0) {
      c.kernels.masked(source, item.dtype, r.begin, r.end, item.param, item.saved, nullptr, &counts.nonfinite);
    } else {
      Set& set = *sets[item.set];
      CandidateList& found = pass.found[worker];
      Bracket bracket = set.bracket;
      if (bracket.append && !set.overflow && !found.reserve(r.end - r.begin + 16)) set.overflow = true;
      bracket.append = bracket.append && !set.overflow;
      c.kernels.topk_stream(source, item.dtype, r.begin, r.end, bracket, write ? item.param : nullptr, item.saved, item.mask, found.end(), counts);
      if (bracket.append) found.append(task, counts.candidates);
      set.above += counts.above;
      set.nans += counts.nans;
      if ((set.candidates += counts.candidates) > set.most_candidates()) set.overflow = true;
    }
    if (counts.nonfinite) nonfinite = true;
  });
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

// ---- 3. Finish ----

// The rank-th largest (1-based) of the keys in (low, high]: by a histogram of 4096 bins, then exactly in one bin.
int32_t select(const std::vector<std::pair<const int32_t*, int64_t>>& lists, const Bracket& bracket, int64_t rank) {
  constexpr int kBins = 4096;
  int shift = 0;
  while (((static_cast<int64_t>(bracket.high) - bracket.low) >> shift) >= kBins) ++shift;
  std::vector<int64_t> bins(kBins, 0);
  for (auto [keys, count] : lists)
    for (int64_t i = 0; i < count; ++i) ++bins[(keys[i] - bracket.low - 1) >> shift];
  int bin = kBins - 1;
  while (rank > bins[bin]) rank -= bins[bin--];
  std::vector<int32_t> in_bin;
  in_bin.reserve(bins[bin]);
  for (auto [keys, count] : lists)
    for (int64_t i = 0; i < count; ++i)
      if ((keys[i] - bracket.low - 1) >> shift == bin) in_bin.push_back(keys[i]);
  std::nth_element(in_bin.begin(), in_bin.begin() + (rank - 1), in_bin.end(), std::greater<>());
  return in_bin[rank - 1];
}

// The threshold of each set from its candidates, or the fallback mark.
void finish(const Context& c, const std::vector<Item>& items, Sets& sets, const Pass& pass) {
  std::vector<std::vector<std::pair<const int32_t*, int64_t>>> lists(sets.size());
  for (const CandidateList& found : pass.found)
    for (const auto& record : found.records()) lists[items[pass.ranges[record.range].item].set].push_back({found.keys(record), record.count});
  for_tasks(c.pool, sets.size(), [&](int, int64_t s) {
    Set& set = *sets[s];
    int64_t larger = set.above;
    if (!set.settled) {
      const int64_t rank = set.k - set.above;
      const bool inside = rank >= 1 && rank <= set.candidates;
      set.fallback = !inside || (set.bracket.append && set.overflow);
      if (set.fallback) return;
      set.threshold = set.bracket.append ? select(lists[s], set.bracket, rank) : set.bracket.high;
      if (set.bracket.append)
        for (auto [keys, count] : lists[s])
          for (int64_t i = 0; i < count; ++i) larger += keys[i] > set.threshold;
    }
    set.kept = set.threshold == kNanKey ? 0 : larger - set.nans;
  });
}

void zero(const Item& item, int64_t i) {
  if (item.dtype == DType::kFloat32)
    static_cast<float*>(item.param)[i] = 0;
  else
    static_cast<uint16_t*>(item.param)[i] = 0;
  if (item.mask != nullptr) item.mask[i / 8] &= static_cast<uint8_t>(~(1u << (i % 8)));
}

// Candidates at or below the threshold were kept on the guess: prune them.
void fix_up(const Context& c, const std::vector<Item>& items, const Sets& sets, const Pass& pass) {
  std::vector<std::pair<const CandidateList*, const CandidateList::Record*>> records;
  for (const CandidateList& found : pass.found)
    for (const auto& record : found.records()) records.push_back({&found, &record});
  constexpr int64_t kStep = 64;
  for_tasks(c.pool, (records.size() + kStep - 1) / kStep, [&](int, int64_t task) {
    for (size_t i = task * kStep; i < std::min<size_t>((task + 1) * kStep, records.size()); ++i) {
      const auto [found, record] = records[i];
      const Range& r = pass.ranges[record->range];
      const Item& item = items[r.item];
      const Set& set = *sets[item.set];
      if (set.fallback) continue;
      const int32_t* keys = found->keys(*record);
      const uint16_t* offsets = found->offsets(*record);
      for (int64_t j = 0; j < record->count; ++j)
        if (keys[j] <= set.threshold && keys[j] != kNanKey) zero(item, r.begin + offsets[j]);
    }
  });
}

// ---- 4. Fallback ----

// Radix select over two digits of 15 and 16 bits.
int32_t radix_select(const Context& c, const std::vector<Item>& items, const Perturbation& p, const Set& set, const std::vector<Range>& ranges,
                     bool from_saved) {
  constexpr int kBits = 16, kBins = 1 << kBits;
  std::vector<std::vector<int64_t>> bins(c.pool.threads, std::vector<int64_t>(kBins));
  int64_t rank = set.k;
  const auto digit = [&](int shift, int prefix_shift, int32_t prefix) {
    for (auto& own : bins) std::fill(own.begin(), own.end(), 0);
    for_tasks(c.pool, ranges.size(), [&](int worker, int64_t task) {
      const Range& r = ranges[task];
      const Item& item = items[r.item];
      c.kernels.topk_histogram(source_of(item, p, from_saved), item.dtype, r.begin, r.end, shift, kBins, prefix_shift, prefix, bins[worker].data());
    });
    for (int bin = kBins - 1; bin > 0; --bin) {
      int64_t count = 0;
      for (const auto& own : bins) count += own[bin];
      if (rank <= count) return bin;
      rank -= count;
    }
    return 0;
  };
  const int32_t high = digit(kBits, 31, 0);
  return (high << kBits) | digit(0, kBits, high);
}

std::vector<Range> ranges_of(const std::vector<Item>& items, const Sets& sets, const Set* only) {
  return cut(items, [&](const Item& item) { return item.set >= 0 && (only == nullptr || sets[item.set].get() == only) ? kChunk : 0; });
}

int64_t apply(const Context& c, const std::vector<Item>& items, const Perturbation& p, const Sets& sets, const std::vector<Range>& ranges,
              bool from_saved) {
  std::atomic<int64_t> kept{0};
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    kept += c.kernels.topk_apply(source_of(item, p, from_saved), item.dtype, r.begin, r.end, sets[item.set]->threshold, item.param, item.mask);
  });
  return kept;
}

// The threshold of every set; with `write`, the perturbed and pruned weights too.
Sets solve(const Context& c, const std::vector<Item>& items, const Perturbation& p, const int64_t* k, int64_t num_sets, bool write) {
  Sets sets = make_sets(items, k, num_sets);
  guess(c, items, p, sets);
  Pass pass;
  stream(c, items, p, sets, write, pass);
  finish(c, items, sets, pass);
  if (write) fix_up(c, items, sets, pass);
  for (auto& set : sets) {
    if (!set->fallback) continue;
    const std::vector<Range> ranges = ranges_of(items, sets, set.get());
    set->threshold = radix_select(c, items, p, *set, ranges, write);
    if (write) set->kept = apply(c, items, p, sets, ranges, write);
  }
  return sets;
}

void report(const Sets& sets, int32_t* thresholds, TopkStats* stats) {
  for (size_t s = 0; s < sets.size(); ++s) {
    thresholds[s] = sets[s]->threshold;
    if (stats != nullptr) stats[s] = {sets[s]->kept, sets[s]->candidates, sets[s]->fallback};
  }
}

}  // namespace

void topk_threshold(const Context& c, const std::vector<Item>& items, const int64_t* k, int64_t num_sets, int32_t* thresholds) {
  report(solve(c, items, {}, k, num_sets, false), thresholds, nullptr);
}

void prune_topk(const Context& c, const std::vector<Item>& items, const int64_t* k, int64_t num_sets, int32_t* thresholds, TopkStats* stats) {
  const Sets sets = solve(c, items, {}, k, num_sets, false);
  for (auto& set : sets) set->kept = 0;
  const std::vector<Range> ranges = ranges_of(items, sets, nullptr);
  std::vector<std::atomic<int64_t>> kept(num_sets);
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    kept[item.set] +=
        c.kernels.topk_apply(source_of(item, {}, false), item.dtype, r.begin, r.end, sets[item.set]->threshold, item.param, item.mask);
  });
  for (int64_t s = 0; s < num_sets; ++s) sets[s]->kept = kept[s];
  report(sets, thresholds, stats);
}

void perturb_topk(const Context& c, const std::vector<Item>& items, const Perturbation& p, const int64_t* k, int64_t num_sets, int32_t* thresholds,
                  TopkStats* stats) {
  report(solve(c, items, p, k, num_sets, true), thresholds, stats);
}

}  // namespace cram
