// A bracket around the threshold from a sample of the weights.
#include "../perturb.h"
#include "topk.h"

namespace cram {
namespace {

constexpr int64_t kSampleTask = 1024;   // runs
constexpr int64_t kLargeSample = 8192;  // runs: worth all threads

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
      for (int64_t i = 0; i < kRun; ++i) keys[(begin + b) * kRun + i] = key_at(source, item.dtype, std::min(places[b].second + i, item.numel - 1));
    }
    begin += batch;
  }
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

  Bracket bracket = {kKeepAll, kNanKey, kKeepAll, kKeepAll, kNanKey, true};
  std::vector<int64_t> ranks;
  if (upper >= 1) ranks.push_back(upper);
  if (lower <= size) ranks.push_back(lower);
  const std::vector<Selected> ends = select(pool, spans, kKeepAll, kNanKey, ranks, 1);
  if (upper >= 1) bracket.high = ends.front().key;
  if (lower <= size) bracket.low = ends.back().key - 1;
  bracket.cut = std::clamp(cut, bracket.low, bracket.high);  // the best guess: few weights will have to be set right
  // A key that many share reaches over an end of the bracket, since between the ends there are few.
  const auto tied = [&](int32_t key) { return std::count(keys, keys + size, key) >= size / kTied; };
  bracket.tie_low = bracket.low;
  bracket.tie_high = bracket.high;
  if (tied(bracket.high)) --bracket.tie_high;
  if (bracket.tie_low < bracket.tie_high && tied(bracket.low + 1)) ++bracket.tie_low;
  bracket.append = bracket.tie_low < bracket.tie_high;
  return bracket;
}

}  // namespace

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
    for (int64_t begin = 0; begin < set->runs(); begin += kSampleTask)
      tasks.push_back({set.get(), begin, std::min(begin + kSampleTask, set->runs()), size});
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

}  // namespace cram
