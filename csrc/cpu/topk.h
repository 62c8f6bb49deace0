// Global top-k on the CPU, what its steps share. topk_sample.cpp guesses a bracket around the threshold; topk.cpp perturbs and prunes on the guess
// while writing down what falls into the bracket, and sets right what the guess got wrong; topk_select.cpp selects among those, or among all.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "drivers.h"

namespace cram {

constexpr int64_t kDirect = 2048;  // sets up to this size: every weight is a candidate
constexpr int64_t kRun = 4;        // neighbours that are sampled together: they share their cache misses
constexpr double kDeviations = 4;  // half width of the bracket; the guess fails about once in 16,000 steps

constexpr int64_t kTied = 32;  // a key that one in so many weights has is no candidate, but counted

struct Set {
  std::vector<int32_t> items;
  int64_t numel = 0;
  int64_t k = 0;
  int32_t step = 1 << 16;  // of its keys: those of 16-bit types have zeros at their end
  Bracket bracket = {kKeepAll, kNanKey, kKeepAll, kKeepAll, kNanKey, true};
  bool settled = false;   // the threshold is known without looking at a weight
  bool fallback = false;  // the guess failed: the threshold is to be looked for among all weights
  bool rewrite = false;   // the threshold is known, and weights that nobody wrote down are on the wrong side of the cut
  int32_t threshold = 0;
  int64_t kept = 0;
  std::atomic<int64_t> above{0}, at_high{0}, candidates{0}, at_low{0}, nans{0};
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
    constexpr double kMost = 1 << 17;
    const double best = std::min({0.19 * std::pow(static_cast<double>(numel), 2.0 / 3), static_cast<double>(numel / (16 * kRun)), kMost});
    int64_t size = kDirect / 64;
    while (1.5 * static_cast<double>(size) < best) size *= 2;
    return size;
  }

  int64_t most_candidates() const { return std::max({2 * kDirect, numel / 16, 2 * expected_candidates()}); }
};

using Sets = std::vector<std::unique_ptr<Set>>;

inline const Pool kAlone{1, [](int, void (*body)(void*, int), void* context) { body(context, 0); }};

// Sets the bracket of every set that is larger than kDirect and not settled.
void guess(const Context&, const std::vector<Item>&, const Perturbation&, Sets&);

struct Span {
  const int32_t* bits;
  int64_t count;
};

inline int32_t key_of(int32_t bits) { return bits & 0x7fffffff; }

struct Selected {
  int32_t key;
  int64_t larger;  // of all keys
};

// The keys of 1-based `ranks` from the largest, of keys in (low, high]. `step`: all keys are multiples of it.
std::vector<Selected> select(const Pool&, const std::vector<Span>&, int32_t low, int32_t high, const std::vector<int64_t>& ranks, int32_t step);

// The k-th largest key of a set, from all its weights.
int32_t radix_select(const Context&, const std::vector<Item>&, const Perturbation&, const Set&, const std::vector<Range>&, bool from_saved);

}  // namespace cram
