// Global top-k in one pass over the weights, in three launches (docs/contract.md: Top-k; csrc/cpu/topk.cpp is the same algorithm):
//   start   set up the selection sets, clear their counters, look at some keys of each
//   stream  bracket the k-th largest key of each set by a histogram of those; then perturb, save, prune on that guess, write down the candidates,
//           the keys inside the bracket, and count their digits
//   finish  the rank among the candidates gives the threshold exactly, or the guess has failed; set right what the guess got wrong; where it
//           failed, find the threshold from all keys and write all weights anew
// Nothing is read back: what a launch finds is in the workspace when the next one starts. Within a launch blocks wait for others (Claims).
#pragma once

#include <cstddef>

#include "entry.h"
#include "launchers.h"

namespace cram {
namespace cuda {

enum class TopkMode { kPerturb, kPrune, kThreshold };

constexpr int64_t kDirect = 32768;  // sets up to this size: every weight is a candidate
constexpr int64_t kMaxSamples = 65536;
constexpr double kDeviations = 4;   // half width of the bracket; the guess fails about once in 16,000 steps
constexpr int kDigitBins = 2048;    // 11 bits
constexpr int kSampleBins = 32768;  // by the upper 15 bits of a key, and one for zero alone
constexpr int kSampleGroups = kSampleBins / kGroupBins;
constexpr int kPasses = 3;  // where a guess has failed, keys are counted by digits of 11, 10 and 10 bits
constexpr int kTied = 32;   // a key that one in so many weights has is no candidate, but counted, where the sample can tell
constexpr int64_t kSliceSize = kSelectAhead * kThreads;  // candidates, or keys of the sample, that a block looks at
constexpr int32_t kUnknown = -2;                         // a threshold that has not been found yet

// What is known of a set's threshold before all weights have been seen: candidates have low < key <= high; provisionally kept is key > cut, and
// low <= cut <= high.
struct Guess {
  int32_t low, high, cut;
  bool ties_below;  // many weights have the key `low`: they are counted in `at_low`
};

// A guess in two words, each of which is written and read at once. 0: there is none yet.
struct GuessWords {
  unsigned long long ends, cut;
};

// Of the sample, from the largest key, 1-based: the ends of the bracket, and what lies where the threshold should.
struct SampleRanks {
  int32_t upper, lower, middle;  // upper < 1, lower > samples: the bracket has no such end
};

// A selection set in the workspace. has_failed(), with which `finish` begins, looks at each of the first three sectors of 32 bytes, so that what
// select() needs is there too.
struct alignas(32) SetState {
  int64_t k;
  unsigned long long above, candidates, at_low;  // weights that `stream` found: above the bracket, inside, with the key `low`

  int64_t capacity;  // candidates that there is room for
  Guess guess;
  int32_t key_step;        // every key is a multiple
  uint32_t slices_before;  // of candidates: those of the sets before this one

  int64_t first;      // of its candidates among all
  uint32_t* digits;   // [2][kDigitBins]: candidates by the first digit of key - low - 1, then, in the bin of the threshold, by the second
  int32_t threshold;  // what `finish` finds
  bool settled;       // the threshold is known without looking at a weight
  unsigned long long nans;

  int64_t numel;
  GuessWords guess_words;
  int32_t samples;  // 0: a direct set
  SampleRanks ranks;
  uint32_t sample_slices_before;  // those of the sets before this one
  uint32_t samples_done, slices_done;
  uint32_t* sampled;          // [kSampleBins]
  uint32_t* sampled_groups;   // [kSampleGroups]: their sums
  unsigned long long* radix;  // [kPasses][kDigitBins], in the memory of `sampled`
};
static_assert(offsetof(SetState, capacity) == 32 && offsetof(SetState, first) == 64 && offsetof(SetState, numel) == 96, "sectors");

CRAM_HOST_DEVICE constexpr uint32_t slices_of(int64_t numbers) { return static_cast<uint32_t>((numbers + kSliceSize - 1) / kSliceSize); }

// Of one key (heavy ties) no list is needed: if the guess holds, it is the threshold.
CRAM_HOST_DEVICE constexpr bool writes_candidates(const Guess& guess) { return guess.high - guess.low > 1; }

// Of the first digit of candidates.
CRAM_HOST_DEVICE inline int32_t first_shift(const Guess& guess) {
  int32_t shift = 0;
  while ((guess.high - guess.low - 1) >> shift >= kDigitBins) ++shift;
  return shift;
}

// Whether a candidate takes one word: in sets of bfloat16 alone.
CRAM_HOST_DEVICE constexpr bool packs(int32_t key_step) { return key_step == 1 << 16; }

// A candidate as `stream` writes it down: its key, the sign of its u in the upper bit, and in packed ones the offset in its chunk in the lower half.
CRAM_HOST_DEVICE constexpr int32_t key_of(uint32_t candidate, bool packed) {
  return static_cast<int32_t>(candidate & (packed ? 0x7fff0000u : 0x7fffffffu));
}

// What `stream` wrote down of a chunk.
struct CandidateRecord {
  uint64_t first : 48, count : 16;   // of its candidates among all
  uint32_t tensor : 31, packed : 1;  // tensor: of those that were streamed
  int32_t set;                       // -1: none
};

struct StreamedTensor {
  PerturbEntry entry;
  int64_t first;  // of its chunks among all
};

// How far the blocks of a launch are.
struct Progress {
  uint32_t sample_slices, slices;  // claimed: of the samples in `stream`, of the candidates in `finish`
  uint32_t claimed, done;          // where a guess has failed: pieces of work
};

// Where everything is in the workspace; for kernels.
struct TopkMemory {
  Progress* progress;
  SetState* sets;
  StreamedTensor* tensors;
  CandidateRecord* records;  // [num_chunks]
  uint16_t* samples;         // [sample_slices][kSliceSize]: bins of the sampled keys
  uint32_t* candidates;      // of all sets
  uint16_t* offsets;         // of candidates in their chunks, but for packed ones
  int64_t num_chunks;
  int32_t num_sets;
  uint32_t sample_slices, slices;
};

// What a set starts from.
struct SetEntry {
  int64_t numel, first, capacity;
  int64_t tallies;  // offset of its counters
  int32_t samples, key_step;
  uint32_t sample_slices_before, slices_before;
  uint32_t end;  // of its tasks: kClearBytes of counters each
};

// What is sampled of a tensor.
struct SampledEntry {
  const void* param;
  const void* grad;     // optional
  const float* master;  // optional
  int64_t numel;
  int64_t extra;  // place of its first weight within its set
  int64_t set_numel;
  int32_t samples;  // of the set
  uint32_t sample_slices_before;
  uint32_t index : 29;
  uint32_t dtype : 3;
  uint32_t end;  // of its tasks: kThreads samples each
};

// What a launch of `start` works on: some sets, then some tensors, with the tasks of the tensors first.
struct StartTable {
  static constexpr int kBytes = (kArgumentBytes - kOtherArguments) / 16 * 16 - 16;

  int32_t num_sets = 0, num_tensors = 0, sets_before = 0;
  alignas(16) unsigned char bytes[kBytes];

  CRAM_HOST_DEVICE const SetEntry* sets() const { return reinterpret_cast<const SetEntry*>(bytes); }
  CRAM_HOST_DEVICE const SampledEntry* tensors() const { return reinterpret_cast<const SampledEntry*>(bytes + num_sets * sizeof(SetEntry)); }
  CRAM_HOST_DEVICE uint32_t sample_tasks() const { return num_tensors > 0 ? tensors()[num_tensors - 1].end : 0; }
  CRAM_HOST_DEVICE uint32_t set_tasks() const { return num_sets > 0 ? sets()[num_sets - 1].end : 0; }
  bool has_room(size_t more) const { return num_sets * sizeof(SetEntry) + num_tensors * sizeof(SampledEntry) + more <= kBytes; }
};

// The launches of a call, from its list of tensors alone.
struct TopkPlan {
  // dense: tensors outside of all sets take part.
  TopkPlan(const std::vector<Item>& items, int64_t num_sets, bool dense);

  std::vector<StartTable> starts;
  std::vector<PerturbTable> chunks;  // tasks: chunks; set by set

  int64_t workspace() const { return bytes; }
  TopkMemory memory(void* workspace) const;
  unsigned char* tallies(void* workspace) const { return static_cast<unsigned char*>(workspace) + tallies_at; }

 private:
  int64_t num_sets, num_chunks = 0;
  uint32_t sample_slices = 0, slices = 0;
  int64_t tallies_at = 0, sets_at = 0, tensors_at = 0, records_at = 0, samples_at = 0, keys_at = 0, offsets_at = 0, bytes = 0;
};

constexpr int64_t kClearBytes = 16384;  // counters that a block of `start` clears
CRAM_HOST_DEVICE constexpr int64_t tally_bytes(int32_t samples) { return 4 * (2 * kDigitBins + (samples > 0 ? kSampleBins + kSampleGroups : 0)); }

void topk_start(const TopkPlan& plan, const TopkMemory& memory, unsigned char* tallies, const int64_t* k, const Perturbation& p, Stream stream);
void topk_stream(const TopkPlan& plan, const TopkMemory& memory, const Perturbation& p, bool write, Stream stream);
void topk_finish(const TopkMemory& memory, const Perturbation& p, TopkMode mode, int32_t* thresholds, int64_t* stats, Stream stream);

}  // namespace cuda
}  // namespace cram
