// Global top-k in one pass over the weights, in five launches (docs/contract.md: Top-k; csrc/cpu/topk.cpp is the same algorithm):
//   prepare  set up the selection sets and clear their counters
//   sample   a histogram of some keys of each set; its last block brackets the k-th largest
//   stream   perturb, save, prune on a guess; write down the candidates, the keys inside the bracket, and count their digits
//   select   the rank among the candidates gives the threshold exactly, or the guess has failed
//   finish   set right what the guess got wrong; where it failed, find the threshold from all keys and write all weights anew
// Nothing is read back: what a launch finds is in the workspace when the next one starts.
#pragma once

#include "entry.h"
#include "launchers.h"

namespace cram {
namespace cuda {

enum class TopkMode { kPerturb, kPrune, kThreshold };

constexpr int64_t kDirect = 32768;  // sets up to this size: every weight is a candidate
constexpr int64_t kMaxSamples = 65536;
constexpr double kDeviations = 4;     // half width of the bracket; the guess fails about once in 16,000 steps
constexpr int kDigitBins = 2048;      // 11 bits
constexpr int kSampleBins = 32768;    // by the upper 15 bits of a key, and one for zero alone
constexpr int kSampleGroups = kSampleBins / kGroupBins;
constexpr int kTied = 32;             // a key that one in so many weights has is no candidate, but counted, where the sample can tell
constexpr int64_t kSliceSize = kSelectAhead * kThreads;  // candidates that a block of `select` looks at

// A selection set in the workspace.
struct SetState {
  int64_t numel, k;
  int32_t samples;            // 0: a direct set
  int32_t key_step;           // every key is a multiple
  int64_t first;              // of its candidates among all
  int64_t capacity;           // candidates that there is room for
  int32_t slices;             // blocks of `select`
  uint32_t* digits;           // [2][kDigitBins]: candidates by the first digit of key - low - 1, then, in the bin of the threshold, by the second
  uint32_t* sampled;          // [kSampleBins]
  uint32_t* sampled_groups;   // [kSampleGroups]: their sums
  unsigned long long* radix;  // [3][kDigitBins], in the memory of `sampled`

  // The bracket: candidates have low < key <= high; provisionally kept is key > cut, and low <= cut <= high.
  int32_t low, high, cut;
  bool ties_below;  // many weights have the key `low`: they are counted in `at_low`
  int32_t shift;  // of the first digit
  bool settled;   // the threshold is known without looking at a weight
  bool append;    // candidates are written down, not only counted

  // Counters.
  unsigned long long above, candidates, at_low, nans;
  uint32_t samples_done, slices_done;

  // Results.
  int32_t threshold;
  int64_t larger;  // keys above the threshold
  bool fallback;
};

// Of one key (heavy ties) no list is needed: if the guess holds, it is the threshold.
CRAM_HOST_DEVICE constexpr bool writes_candidates(int32_t low, int32_t high) { return high - low > 1; }

// What `stream` wrote down of a chunk.
struct CandidateRecord {
  int64_t first;  // within its set's candidates
  int32_t count;
  int32_t tensor;  // of those that were streamed
};

struct StreamedTensor {
  PerturbEntry entry;
  int64_t first;  // of its chunks among all
};

// How far the blocks of `finish` are where a guess has failed.
struct Progress {
  int32_t any_fallback;
  uint32_t claimed, done;  // pieces of work
};

// Where everything is in the workspace; for kernels.
struct TopkMemory {
  Progress* progress;
  SetState* sets;
  StreamedTensor* tensors;
  CandidateRecord* records;  // [num_chunks]
  int64_t num_chunks;
  int32_t* keys;      // of all sets' candidates
  uint16_t* offsets;  // of candidates in their chunks
};

// What a set starts from; for `prepare`.
struct SetEntry {
  int64_t numel, first, capacity;
  int64_t tallies;  // offset of its counters
  int32_t samples, key_step, index, slices;
};
using SetTable = Table<SetEntry>;

// The launches of a call, from its list of tensors alone.
struct TopkPlan {
  // dense: tensors outside of all sets take part.
  TopkPlan(const std::vector<Item>& items, int64_t num_sets, bool dense);

  int64_t num_sets, num_chunks;
  std::vector<PerturbTable> chunks;   // tasks: chunks; set by set
  std::vector<PerturbTable> samples;  // tasks: kThreads samples
  std::vector<SetTable> sets;         // tasks: kClearBytes of counters
  std::vector<SetTable> slices;       // tasks: slices of candidates

  int64_t workspace() const { return bytes; }
  TopkMemory memory(void* workspace) const;
  unsigned char* tallies(void* workspace) const { return static_cast<unsigned char*>(workspace) + tallies_at; }

 private:
  int64_t tallies_at = 0, sets_at = 0, tensors_at = 0, records_at = 0, keys_at = 0, offsets_at = 0, bytes = 0;
};

constexpr int64_t kClearBytes = 16384;  // counters that a block of `prepare` clears
CRAM_HOST_DEVICE constexpr int64_t tally_bytes(int32_t samples) { return 4 * (2 * kDigitBins + (samples > 0 ? kSampleBins + kSampleGroups : 0)); }

void topk_prepare(const TopkPlan& plan, const TopkMemory& memory, unsigned char* tallies, const int64_t* k, Stream stream);
void topk_sample(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, Stream stream);
void topk_stream(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, bool write, Stream stream);
void topk_select(const TopkPlan& plan, const TopkMemory& memory, Stream stream);
void topk_finish(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, TopkMode mode, int32_t* thresholds, int64_t* stats,
                 Stream stream);

}  // namespace cuda
}  // namespace cram
