// Global top-k in one pass: sample a bracket around the threshold, perturb and prune on a guess while writing down what falls into the
// bracket, select exactly among those, set right what the guess got wrong. Where the guess fails, a radix select over the saved weights: costs time,
// never exactness.
#include "topk.h"

#include <cstdlib>
#include <new>

namespace cram {
namespace {

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
    set->bracket = {set->threshold, set->threshold, set->threshold, set->threshold, set->threshold, false};
  }
  return sets;
}

// ---- One pass ----

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
  perturb_ranges(c, items, p, pass.ranges, [&](int worker, int64_t task, const Item& item, const Source& source, bool& nonfinite) {
    const Range& r = pass.ranges[task];
    if (item.set < 0) return c.kernels.masked(source, item.dtype, r.begin, r.end, item.param, item.saved, nullptr, &nonfinite);
    Set& set = *sets[item.set];
    CandidateList& found = pass.found[worker];
    Bracket bracket = set.bracket;
    if (bracket.append && !set.overflow && !found.reserve(r.end - r.begin + 16)) set.overflow = true;
    bracket.append = bracket.append && !set.overflow;
    Counts counts;
    c.kernels.topk_stream(source, item.dtype, r.begin, r.end, bracket, write ? item.param : nullptr, item.saved, item.mask, found.end(), counts);
    if (bracket.append) found.append(task, counts.candidates);
    set.above += counts.above;
    set.at_high += counts.at_high;
    set.at_low += counts.at_low;
    set.nans += counts.nans;
    if ((set.candidates += counts.candidates) > set.most_candidates()) set.overflow = true;
    nonfinite = counts.nonfinite;
  });
}

// ---- Finish ----

// The threshold of a set from its candidates and ties, or the fallback mark.
void settle(const Pool& pool, Set& set, const std::vector<Span>& spans) {
  int64_t larger = set.above;
  if (!set.settled) {
    const Bracket& b = set.bracket;
    const bool listed = !set.overflow;
    const int64_t rank = set.k - set.above, below_high = rank - set.at_high, below_candidates = below_high - set.candidates;
    set.fallback = rank < 1 || below_candidates > set.at_low || (below_high >= 1 && below_candidates < 1 && !listed);
    if (set.fallback) return;
    if (below_high < 1) {
      set.threshold = b.high;
    } else if (below_candidates < 1) {
      const Selected selected = select(pool, spans, b.tie_low, b.tie_high, {below_high}, set.step)[0];
      set.threshold = selected.key;
      larger += set.at_high + selected.larger;
    } else {
      set.threshold = b.low + 1;
      larger += set.at_high + set.candidates;
    }
    const auto misplaced = [&](int32_t key) { return (key > b.cut) != (key > set.threshold); };
    set.rewrite = !listed || (set.at_high > 0 && misplaced(b.high)) || (set.at_low > 0 && misplaced(b.low + 1));
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
    if (set.fallback || set.rewrite) return;
    const int32_t *bits = found->bits(*record), low = std::min(set.bracket.cut, set.threshold), high = std::max(set.bracket.cut, set.threshold);
    const uint16_t* offsets = found->offsets(*record);
    const bool keep = set.threshold < set.bracket.cut;
    const int64_t size = size_of(item.dtype);
    for (int64_t first = 0; first < record->count;
         first += kBatch) {  // each of them is a cache miss: a batch is on its way before the first is written
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

// ---- Fallback ----

std::vector<Range> ranges_of(const std::vector<Item>& items, const Sets& sets, const Set* only) {
  return cut(items, [&](const Item& item) { return item.set >= 0 && (only == nullptr || sets[item.set].get() == only) ? kChunk : 0; });
}

// Prunes the ranges by the thresholds of their sets, and counts what is kept.
void apply(const Context& c, const std::vector<Item>& items, const Perturbation& p, const Sets& sets, const std::vector<Range>& ranges,
           bool from_saved) {
  std::vector<std::atomic<int64_t>> kept(sets.size());
  for_tasks(c.pool, ranges.size(), [&](int, int64_t task) {
    const Range& r = ranges[task];
    const Item& item = items[r.item];
    kept[item.set] +=
        c.kernels.topk_apply(source_of(item, p, from_saved), item.dtype, r.begin, r.end, sets[item.set]->threshold, item.param, item.mask);
  });
  for (const Range& r : ranges) sets[items[r.item].set]->kept = kept[items[r.item].set];
}

// The threshold of every set; with `write`, the perturbed and pruned weights too.
Sets solve(const Context& c, const std::vector<Item>& items, const Perturbation& p, const Selection& selection, bool write) {
  Sets sets = make_sets(items, selection.k, selection.num_sets);
  guess(c, items, p, sets);
  Pass pass;
  stream(c, items, p, sets, write, pass);
  finish(c, items, sets, pass);
  if (write) fix_up(c, items, sets, pass);
  for (auto& set : sets) {
    if (!set->fallback && !(write && set->rewrite)) continue;
    const std::vector<Range> ranges = ranges_of(items, sets, set.get());
    if (set->fallback) set->threshold = radix_select(c, items, p, *set, ranges, write);
    if (write) apply(c, items, p, sets, ranges, write);
  }
  return sets;
}

void report(const Sets& sets, const Selection& to) {
  for (size_t s = 0; s < sets.size(); ++s) {
    to.thresholds[s] = sets[s]->threshold;
    if (to.stats == nullptr) continue;
    to.stats[3 * s] = sets[s]->kept;
    to.stats[3 * s + 1] = sets[s]->candidates;
    to.stats[3 * s + 2] = sets[s]->fallback;
  }
}

}  // namespace

void TopkThreshold::run(const Context& c) { report(solve(c, items, {}, selection, false), selection); }

void PruneTopk::run(const Context& c) {
  const Sets sets = solve(c, items, {}, selection, false);
  for (auto& set : sets) set->kept = 0;
  apply(c, items, {}, sets, ranges_of(items, sets, nullptr), false);
  report(sets, selection);
}

void PerturbTopk::run(const Context& c) { report(solve(c, items, perturbation_of(*this, kName), selection, true), selection); }

}  // namespace cram
