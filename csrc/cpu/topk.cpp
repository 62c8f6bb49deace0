// Global top-k in one pass: sample a bracket around the threshold, perturb and prune on a guess while writing down what falls into the
// bracket, select exactly among those, set right what the guess got wrong. Where the guess fails, a radix select over the saved weights: costs time, never exactness.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>

#include "../perturb.h"
#include "drivers.h"

namespace cram {
namespace {

constexpr int64_t kDirect = 2048;    // sets up to this size: every weight is a candidate
constexpr int64_t kSample = 32768;   // elements, at most
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

  // By the width of the bracket in ranks, and a tenth more.
  int64_t expected_candidates() const {
    if (numel <= kDirect) return numel;
    const double share = static_cast<double>(k) / static_cast<double>(numel);
    return static_cast<int64_t>(2.2 * kDeviations * std::sqrt(share * (1 - share) / static_cast<double>(sample())) * static_cast<double>(numel));
  }

  int64_t sample() const { return std::clamp(numel / 8, kDirect / 2, kSample); }

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

// Keys of sample elements [begin, end) of `total`: one at a hashed place of each of `total` equal strata of the set. Each place is a cache
// miss, so that a batch of them is on its way before the first is read.
void sample_keys(const std::vector<Item>& items, const Set& set, const Perturbation& p, int64_t total, int64_t begin, int64_t end, int32_t* keys) {
  constexpr int kBatch = 32;
  size_t at = 0;
  int64_t first = 0;  // of item `at`, among the set's weights
  while (begin < end) {
    std::pair<size_t, int64_t> places[kBatch];  // item, element
    const int batch = static_cast<int>(std::min<int64_t>(kBatch, end - begin));
    for (int b = 0; b < batch; ++b) {
      const int64_t j = begin + b;
      const int64_t low = static_cast<int64_t>(static_cast<__int128>(j) * set.numel / total);
      const int64_t high = static_cast<int64_t>(static_cast<__int128>(j + 1) * set.numel / total);
      const int64_t place = low + static_cast<int64_t>(scramble(j) % (high - low));
      while (place >= first + items[set.items[at]].numel) first += items[set.items[at++]].numel;
      const Item& item = items[set.items[at]];
      places[b] = {static_cast<size_t>(set.items[at]), place - first};
      const Source source = source_of(item, p, false);
      __builtin_prefetch(static_cast<const char*>(source.weights) + (place - first) * (source.master ? 4 : size_of(item.dtype)));
      if (source.grad != nullptr) __builtin_prefetch(static_cast<const char*>(source.grad) + (place - first) * size_of(item.dtype));
    }
    for (int b = 0; b < batch; ++b) {
      const Item& item = items[places[b].first];
      keys[begin + b] = key_at(source_of(item, p, false), item.dtype, places[b].second);
    }
    begin += batch;
  }
}

// The keys between which the k-th largest lies, but for bad luck.
Bracket bracket_of(int32_t* keys, int64_t size, const Set& set) {
  const double share = static_cast<double>(set.k) / static_cast<double>(set.numel);
  const double rank = share * static_cast<double>(size);
  const double width = kDeviations * std::sqrt(rank * (1 - share)) + 1;
  const int64_t upper = static_cast<int64_t>(std::floor(rank - width)) - 1;  // from the largest, 0-based
  const int64_t lower = static_cast<int64_t>(std::ceil(rank + width));
  const int64_t middle = std::clamp<int64_t>(std::llround(rank) - 1, 0, size - 1);
  Bracket bracket = {kKeepAll, kNanKey, kKeepAll, true};
  int32_t *from = keys, *to = keys + size;
  if (upper >= 0) {
    std::nth_element(from, keys + upper, to, std::greater<>());
    bracket.high = keys[upper];
    from = keys + upper + 1;
  }
  if (lower < size) {
    std::nth_element(from, keys + lower, to, std::greater<>());
    bracket.low = keys[lower] - 1;
    to = keys + lower;
  }
  if (keys + middle >= from && keys + middle < to) std::nth_element(from, keys + middle, to, std::greater<>());
  bracket.cut = std::clamp(keys[middle], bracket.low, bracket.high);  // the best guess: few weights will have to be set right
  // A bracket of one key (heavy ties): if the guess holds, that key is the threshold, and no list is needed.
  bracket.append = bracket.high - bracket.low > 1;
  if (!bracket.append) bracket.cut = bracket.high;
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
    const int64_t total = set.sample();
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
    free(bits_);
    free(offsets_);
  }

  // Room for `count` more in one record; false where there is no memory.
  bool reserve(int64_t count) try {
    if (records_.size() == records_.capacity()) records_.reserve(2 * records_.capacity() + 64);
    if (size_ + count <= capacity_) return true;
    const int64_t capacity = std::max(2 * capacity_, size_ + count);
    void* bits = realloc(bits_, capacity * sizeof(int32_t));
    if (bits != nullptr) bits_ = static_cast<int32_t*>(bits);
    void* offsets = bits == nullptr ? nullptr : realloc(offsets_, capacity * sizeof(uint16_t));
    if (offsets == nullptr) return false;
    offsets_ = static_cast<uint16_t*>(offsets);
    capacity_ = capacity;
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }

  Candidates end() { return {bits_ + size_, offsets_ + size_}; }

  void append(int64_t range, int64_t count) {
    if (count > 0) records_.push_back({range, size_, count});
    size_ += count;
  }

  const std::vector<Record>& records() const { return records_; }
  const int32_t* bits(const Record& r) const { return bits_ + r.first; }
  const uint16_t* offsets(const Record& r) const { return offsets_ + r.first; }

 private:
  int32_t* bits_ = nullptr;  // of u as a float
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
  int64_t expected = 0;
  for (const auto& set : sets)
    if (set->bracket.append) expected += set->expected_candidates();
  for (CandidateList& found : pass.found) found.reserve(expected / c.pool.threads + kChunk + 16);
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

struct Span {
  const int32_t* bits;
  int64_t count;
};

int32_t key_of(int32_t bits) { return bits & 0x7fffffff; }

struct Selected {
  int32_t key;
  int64_t larger;  // candidates with a larger key
};

// The rank-th largest (1-based) key of candidates, all in (low, high]: by a histogram, then exactly in one of its bins.
Selected select(const Pool& pool, const std::vector<Span>& spans, const Bracket& bracket, int64_t rank) {
  constexpr int kBins = 2048;
  int shift = 0;
  while (((static_cast<int64_t>(bracket.high) - bracket.low) >> shift) >= kBins) ++shift;
  const auto bin_of = [&](int32_t bits) { return (key_of(bits) - bracket.low - 1) >> shift; };

  std::vector<std::vector<int64_t>> bins(pool.threads, std::vector<int64_t>(kBins, 0));
  for_tasks(pool, spans.size(), [&](int worker, int64_t i) {
    int64_t* own = bins[worker].data();
    for (const int32_t *bits = spans[i].bits, *end = bits + spans[i].count; bits < end; ++bits) ++own[bin_of(*bits)];
  });
  int64_t larger = 0, in_bin = 0;
  int bin = kBins;
  while (larger + in_bin < rank) {
    larger += in_bin;
    in_bin = 0;
    --bin;
    for (const auto& own : bins) in_bin += own[bin];
  }

  std::vector<std::vector<int32_t>> found(pool.threads);
  for_tasks(pool, spans.size(), [&](int worker, int64_t i) {
    for (const int32_t *bits = spans[i].bits, *end = bits + spans[i].count; bits < end; ++bits)
      if (bin_of(*bits) == bin) found[worker].push_back(key_of(*bits));
  });
  std::vector<int32_t>& keys = found[0];
  for (size_t worker = 1; worker < found.size(); ++worker) keys.insert(keys.end(), found[worker].begin(), found[worker].end());
  std::nth_element(keys.begin(), keys.begin() + (rank - larger - 1), keys.end(), std::greater<>());
  const int32_t key = keys[rank - larger - 1];
  return {key, larger + std::count_if(keys.begin(), keys.end(), [&](int32_t other) { return other > key; })};
}

// The threshold of a set from its candidates, or the fallback mark.
void settle(const Pool& pool, Set& set, const std::vector<Span>& spans) {
  int64_t larger = set.above;
  if (!set.settled) {
    const int64_t rank = set.k - set.above;
    set.fallback = rank < 1 || rank > set.candidates || (set.bracket.append && set.overflow);
    if (set.fallback) return;
    const Selected selected = set.bracket.append ? select(pool, spans, set.bracket, rank) : Selected{set.bracket.high, 0};
    set.threshold = selected.key;
    larger += selected.larger;
  }
  set.kept = set.threshold == kNanKey ? 0 : larger - set.nans;
}

// Large sets one after the other, each in parallel; small ones side by side.
void finish(const Context& c, const std::vector<Item>& items, Sets& sets, const Pass& pass) {
  constexpr int64_t kLarge = 32768;  // candidates
  std::vector<std::vector<Span>> spans(sets.size());
  for (const CandidateList& found : pass.found)
    for (const auto& record : found.records()) spans[items[pass.ranges[record.range].item].set].push_back({found.bits(record), record.count});
  for (size_t s = 0; s < sets.size(); ++s)
    if (sets[s]->candidates > kLarge) settle(c.pool, *sets[s], spans[s]);
  const Pool alone{1, [](int, void (*body)(void*, int), void* context) { body(context, 0); }};
  for_tasks(c.pool, sets.size(), [&](int, int64_t s) {
    if (sets[s]->candidates <= kLarge) settle(alone, *sets[s], spans[s]);
  });
}

template <class T>
void put(const Item& item, int64_t i, T value, bool keep) {
  static_cast<T*>(item.param)[i] = value;
  if (item.mask == nullptr) return;
  const uint8_t bit = static_cast<uint8_t>(1u << (i % 8));
  item.mask[i / 8] = static_cast<uint8_t>(keep ? item.mask[i / 8] | bit : item.mask[i / 8] & ~bit);
}

// Sets right what the guess `cut` got wrong: the candidates between it and the threshold.
void fix_up(const Context& c, const std::vector<Item>& items, const Sets& sets, const Pass& pass) {
  std::vector<std::pair<const CandidateList*, const CandidateList::Record*>> records;
  for (const CandidateList& found : pass.found)
    for (const auto& record : found.records()) records.push_back({&found, &record});
  for_tasks(c.pool, records.size(), [&](int, int64_t task) {
    const auto [found, record] = records[task];
    const Range& r = pass.ranges[record->range];
    const Item& item = items[r.item];
    const Set& set = *sets[item.set];
    if (set.fallback) return;
    const int32_t *bits = found->bits(*record), low = std::min(set.bracket.cut, set.threshold), high = std::max(set.bracket.cut, set.threshold);
    const uint16_t* offsets = found->offsets(*record);
    const bool keep = set.threshold < set.bracket.cut;
    for (int64_t j = 0; j < record->count; ++j) {
      const int32_t key = key_of(bits[j]);
      if (key <= low || key > high || key == kNanKey) continue;
      const float u = from_bits(keep ? static_cast<uint32_t>(bits[j]) : 0u);
      const int64_t i = r.begin + offsets[j];
      if (item.dtype == DType::kFloat32)
        put(item, i, u, keep);
      else
        put(item, i, item.dtype == DType::kFloat16 ? half_bits(u) : static_cast<uint16_t>(to_bits(u) >> 16), keep);
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

void topk_histogram(const Context& c, const std::vector<Item>& items, const Perturbation& p, const int64_t* prefix, int64_t num_sets, int shift,
                    int bits, int64_t* bins) {
  const int64_t size = num_sets << bits;
  std::vector<std::vector<int64_t>> found(c.pool.threads, std::vector<int64_t>(size));
  const std::vector<Range> ranges = cut(items, [](const Item& item) { return item.set >= 0 ? kChunk : 0; });
  for_tasks(c.pool, ranges.size(), [&](int worker, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    c.kernels.topk_histogram(source_of(item, p, false), item.dtype, r.begin, r.end, shift, 1 << bits, shift + bits,
                             static_cast<int32_t>(prefix[item.set]), found[worker].data() + (item.set << bits));
  });
  for (const auto& own : found)
    for (int64_t i = 0; i < size; ++i) bins[i] += own[i];
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
