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

constexpr int64_t kDirect = 2048;      // sets up to this size: every weight is a candidate
constexpr int64_t kRun = 4;            // neighbours that are sampled together: they share their cache misses
constexpr double kDeviations = 4;      // half width of the bracket; the guess fails about once in 16,000 steps
constexpr int64_t kSampleTask = 1024;  // runs
constexpr int64_t kLargeSample = 8192;  // runs: worth all threads

struct Set {
  std::vector<int32_t> items;
  int64_t numel = 0;
  int64_t k = 0;
  int32_t step = 1 << 16;  // of its keys: those of 16-bit types have zeros at their end
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
    return static_cast<int64_t>(2.2 * kDeviations * std::sqrt(share * (1 - share) / static_cast<double>(kRun * runs())) * static_cast<double>(numel));
  }

  // Of the sample; a power of two, so that strata are cut by a shift. A run costs two cache misses, and the fewer there are, the more
  // candidates: 1 / sqrt(runs) of the weights. Their sum is least at a multiple of numel^(2/3).
  int64_t runs() const {
    const double best = std::min(0.19 * std::pow(static_cast<double>(numel), 2.0 / 3), static_cast<double>(numel / (16 * kRun)));
    int64_t size = kDirect / 64;
    while (1.5 * static_cast<double>(size) < best) size *= 2;
    return size;
  }

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
    Set& set = *sets[items[i].set];
    set.items.push_back(static_cast<int32_t>(i));
    set.numel += items[i].numel;
    set.step = std::min(set.step, items[i].dtype == DType::kFloat32 ? 1 : items[i].dtype == DType::kFloat16 ? 1 << 13 : 1 << 16);
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

// Keys of runs [begin, end) of `runs`, kRun each: one run at a hashed place of each of `runs` equal strata of the set. Each place is a cache
// miss, so that a batch of them is on its way before the first is read.
void sample_keys(const std::vector<Item>& items, const Set& set, const Perturbation& p, int64_t runs, int64_t begin, int64_t end, int32_t* keys) {
  constexpr int kPlaces = 32;
  const int shift = __builtin_ctzll(runs);  // runs * numel is below 2^63 for lists of 2^48 weights
  size_t at = 0;
  int64_t first = 0;  // of item `at`, among the set's weights
  while (begin < end) {
    std::pair<int32_t, int64_t> places[kPlaces];  // item, element
    const int batch = static_cast<int>(std::min<int64_t>(kPlaces, end - begin));
    for (int b = 0; b < batch; ++b) {
      const int64_t j = begin + b;
      const int64_t low = (j * set.numel) >> shift, width = ((j + 1) * set.numel >> shift) - low;
      const int64_t place = low + static_cast<int64_t>(((scramble(j) >> 32) * width) >> 32);
      while (place >= first + items[set.items[at]].numel) first += items[set.items[at++]].numel;
      const Item& item = items[set.items[at]];
      const int64_t i = (place - first) / kRun * kRun;  // in one cache line
      places[b] = {set.items[at], i};
      if (item.master != nullptr)
        __builtin_prefetch(item.master + i);
      else
        __builtin_prefetch(static_cast<const char*>(item.param) + i * size_of(item.dtype));
      if (item.grad != nullptr) __builtin_prefetch(static_cast<const char*>(item.grad) + i * size_of(item.dtype));
    }
    for (int b = 0; b < batch; ++b) {
      const Item& item = items[places[b].first];
      const Source source = source_of(item, p, false);
      for (int64_t i = 0; i < kRun; ++i)
        keys[(begin + b) * kRun + i] = key_at(source, item.dtype, std::min(places[b].second + i, item.numel - 1));
    }
    begin += batch;
  }
}

struct Span {
  const int32_t* bits;
  int64_t count;
};

int32_t key_of(int32_t bits) { return bits & 0x7fffffff; }

struct Selected {
  int32_t key;
  int64_t larger;  // of all keys
};

// The keys of 1-based `ranks` from the largest, of keys in (low, high]: by a histogram, then exactly in the bins that matter. `step`: all keys are multiples of it.
std::vector<Selected> select(const Pool& pool, const std::vector<Span>& spans, int32_t low, int32_t high, const std::vector<int64_t>& ranks, int32_t step) {
  constexpr int kBins = 2048;
  int shift = 0;
  while (((static_cast<int64_t>(high) - low) >> shift) >= kBins) ++shift;
  const auto bin_of = [&](int32_t bits) { return (key_of(bits) - low - 1) >> shift; };

  std::vector<std::vector<int64_t>> bins(pool.threads, std::vector<int64_t>(kBins, 0));
  for_tasks(pool, spans.size(), [&](int worker, int64_t i) {
    int64_t* own = bins[worker].data();
    for (const int32_t *bits = spans[i].bits, *end = bits + spans[i].count; bits < end; ++bits) ++own[bin_of(*bits)];
  });
  for (size_t worker = 1; worker < bins.size(); ++worker)
    for (int bin = 0; bin < kBins; ++bin) bins[0][bin] += bins[worker][bin];

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

// The keys between which the k-th largest lies, but for bad luck. keys: [runs, kRun]
Bracket bracket_of(const Pool& pool, const int32_t* keys, int64_t runs, const Set& set) {
  const int64_t size = runs * kRun;
  std::vector<Span> spans;
  for (int64_t begin = 0; begin < size; begin += kSampleTask * kRun) spans.push_back({keys + begin, std::min(kSampleTask * kRun, size - begin)});
  const double share = static_cast<double>(set.k) / static_cast<double>(set.numel), rank = share * static_cast<double>(size);
  const int64_t middle = std::clamp<int64_t>(std::llround(rank), 1, size);
  const int32_t cut = select(pool, spans, kKeepAll, kNanKey, {middle}, 1)[0].key;

  // Neighbours resemble each other, in rows of an embedding much: the width comes from the variance between runs.
  int64_t squares = 0, total = 0;
  for (const int32_t *run = keys, *end = keys + size; run < end; run += kRun) {
    int64_t larger = 0;
    for (int i = 0; i < kRun; ++i) larger += run[i] >= cut;
    total += larger;
    squares += larger * larger;
  }
  const double mean = static_cast<double>(total) / static_cast<double>(runs);
  const double independent = rank * (1 - share), between = static_cast<double>(squares) - static_cast<double>(total) * mean;
  const double width = kDeviations * std::sqrt(std::max(independent, between)) + 1;
  const int64_t upper = static_cast<int64_t>(std::floor(rank - width)), lower = static_cast<int64_t>(std::ceil(rank + width)) + 1;

  Bracket bracket = {kKeepAll, kNanKey, kKeepAll, true};
  std::vector<int64_t> ranks;
  if (upper >= 1) ranks.push_back(upper);
  if (lower <= size) ranks.push_back(lower);
  const std::vector<Selected> ends = select(pool, spans, kKeepAll, kNanKey, ranks, 1);
  if (upper >= 1) bracket.high = ends.front().key;
  if (lower <= size) bracket.low = ends.back().key - 1;
  bracket.cut = std::clamp(cut, bracket.low, bracket.high);  // the best guess: few weights will have to be set right
  // A bracket of one key (heavy ties): if the guess holds, that key is the threshold, and no list is needed.
  bracket.append = bracket.high - bracket.low > 1;
  if (!bracket.append) bracket.cut = bracket.high;
  return bracket;
}

const Pool kAlone{1, [](int, void (*body)(void*, int), void* context) { body(context, 0); }};

void guess(const Context& c, const std::vector<Item>& items, const Perturbation& p, Sets& sets) {
  struct Task {
    Set* set;
    int64_t begin, end;  // of the runs; begin is 0 for the first task of a set
    int64_t place;       // of the set's first key among all keys
  };
  std::vector<Task> tasks;
  int64_t size = 0;
  for (auto& set : sets) {
    if (set->settled || set->numel <= kDirect) continue;
    for (int64_t begin = 0; begin < set->runs(); begin += kSampleTask) tasks.push_back({set.get(), begin, std::min(begin + kSampleTask, set->runs()), size});
    size += set->runs() * kRun;
  }
  if (tasks.empty()) return;
  const std::unique_ptr<int32_t[]> keys(new int32_t[size]);
  for_tasks(c.pool, tasks.size(), [&](int, int64_t i) {
    const Task& t = tasks[i];
    sample_keys(items, *t.set, p, t.set->runs(), t.begin, t.end, keys.get() + t.place);
  });
  const auto bracket = [&](const Pool& pool, const Task& t) { t.set->bracket = bracket_of(pool, keys.get() + t.place, t.set->runs(), *t.set); };
  // Large sets one after the other, each in parallel; small ones side by side.
  const auto large = [](const Task& t) { return t.set->runs() >= kLargeSample; };
  for (const Task& t : tasks)
    if (t.begin == 0 && large(t)) bracket(c.pool, t);
  for_tasks(c.pool, tasks.size(), [&](int, int64_t i) {
    if (tasks[i].begin == 0 && !large(tasks[i])) bracket(kAlone, tasks[i]);
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

// The threshold of a set from its candidates, or the fallback mark.
void settle(const Pool& pool, Set& set, const std::vector<Span>& spans) {
  int64_t larger = set.above;
  if (!set.settled) {
    const int64_t rank = set.k - set.above;
    set.fallback = rank < 1 || rank > set.candidates || (set.bracket.append && set.overflow);
    if (set.fallback) return;
    const Selected selected =
        set.bracket.append ? select(pool, spans, set.bracket.low, set.bracket.high, {rank}, set.step)[0] : Selected{set.bracket.high, 0};
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
  for_tasks(c.pool, sets.size(), [&](int, int64_t s) {
    if (sets[s]->candidates <= kLarge) settle(kAlone, *sets[s], spans[s]);
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
  constexpr int64_t kBatch = 256;
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
    const int64_t size = size_of(item.dtype);
    for (int64_t first = 0; first < record->count; first += kBatch) {  // each of them is a cache miss: a batch is on its way before the first is written
      int32_t wrong[kBatch];
      int count = 0;
      for (int64_t j = first; j < std::min(first + kBatch, record->count); ++j) {
        const int32_t key = key_of(bits[j]);
        wrong[count] = static_cast<int32_t>(j);
        count += (key > low) & (key <= high) & (key != kNanKey);
      }
      for (int w = 0; w < count; ++w) {
        const int64_t i = r.begin + offsets[wrong[w]];
        __builtin_prefetch(static_cast<char*>(item.param) + i * size, 1);
        if (item.mask != nullptr) __builtin_prefetch(item.mask + i / 8, 1);
      }
      for (int w = 0; w < count; ++w) {
        const float u = from_bits(keep ? static_cast<uint32_t>(bits[wrong[w]]) : 0u);
        const int64_t i = r.begin + offsets[wrong[w]];
        if (item.dtype == DType::kFloat32)
          put(item, i, u, keep);
        else
          put(item, i, item.dtype == DType::kFloat16 ? half_bits(u) : static_cast<uint16_t>(to_bits(u) >> 16), keep);
      }
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
