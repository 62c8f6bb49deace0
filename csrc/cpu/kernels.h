// The streaming passes over a range [begin, end) of one tensor, begin a multiple of 8: one table a SIMD level, chosen at run time.
// Torch-free: pointers and numbers. The drivers (topk.cpp, nm.cpp, ...) cut lists into ranges and run them in parallel.
#pragma once

#include "../adam.h"
#include "../item.h"
#include "../restore.h"
#include "../sgd.h"

namespace cram {

// Where u comes from. Without a gradient u is w itself, untouched.
struct Source {
  const void* weights;  // T, or float32 where `master`
  bool master;
  const void* grad;  // T, optional
  float rho;
  float inv_scale;
  bool scaled;      // multiply by inv_scale
  bool past_cache;  // what is saved will have left the caches before it is read
};

// The part of a selection set that is still open: the k-th largest key is in (low, high], if the guess holds. Those in (tie_low, tie_high] are
// candidates. Where many weights share the key `high` or `low + 1`, it is left out of them, and its weights are counted only.
struct Bracket {
  int32_t low;
  int32_t high;
  int32_t cut;  // provisionally kept: key > cut
  int32_t tie_low, tie_high;
  bool append;  // write the candidates down, not only count them

  bool has_ties() const { return tie_low != low || tie_high != high; }
};

struct Counts {
  int64_t above = 0;       // key > high
  int64_t at_high = 0;     // tie_high < key <= high
  int64_t candidates = 0;  // tie_low < key <= tie_high
  int64_t at_low = 0;      // low < key <= tie_low
  int64_t nans = 0;
  bool nonfinite = false;  // a gradient is Inf or NaN
};

struct Candidates {
  int32_t* bits;      // of u as a float; room for the range and 16 more
  uint16_t* offsets;  // from begin
};

// Sources, items and options go by value: through references, all of them would be read again after each store.
struct Kernels {
  const char* name;

  // Top-k. stream: counts and candidates; where out is given, saves w to `saved`, writes u and mask bits, provisionally pruned.
  void (*topk_stream)(Source, DType, int64_t begin, int64_t end, const Bracket&, void* out, void* saved, uint8_t* mask, Candidates, Counts&);
  // u, pruned to key > threshold, and its mask bits. Returns the number kept.
  int64_t (*topk_apply)(Source, DType, int64_t begin, int64_t end, int32_t threshold, void* out, uint8_t* mask);
  // bins[(key >> shift) & (num_bins - 1)] += 1 for the keys with key >> prefix_shift == prefix.
  void (*topk_histogram)(Source, DType, int64_t begin, int64_t end, int shift, int num_bins, int prefix_shift, int32_t prefix, int64_t* bins);

  // u where no mask, else u under the mask. Saves w to `saved` where given.
  void (*masked)(Source, DType, int64_t begin, int64_t end, void* out, void* saved, const uint8_t* mask, bool* nonfinite);

  // N:M on whole tiles of m * inner weights; scratch holds nm_scratch(end - begin) bytes.
  void (*nm)(Source, DType, int64_t begin, int64_t end, int64_t inner, int n, int m, void* out, void* saved, uint8_t* mask, char* scratch,
             bool* nonfinite);

  void (*round_master)(const float* master, DType, int64_t begin, int64_t end, void* out);
  void (*combine)(Item, int64_t begin, int64_t end, Scales);
  // weights: where the unperturbed weights are (saved, master, or the parameter itself). past_cache: write the parameter past the caches.
  void (*sgd)(Item, const void* weights, bool past_cache, int64_t begin, int64_t end, Scales, SgdOptions);
  void (*adam)(Item, const void* weights, bool past_cache, int64_t begin, int64_t end, Scales, AdamOptions, bool decays);

  // sums[c] = folded squares of chunk c of 1024 elements, c in [begin, end).
  void (*norm)(const void* grad, DType, int64_t numel, int64_t begin, int64_t end, float inv_scale, bool scaled, double* sums);
};

constexpr int64_t kNormChunk = 1024;
constexpr int64_t kNmPadding = 256;                                               // numbers: two rows of lanes, and a tile of 8 rows of 16
constexpr int64_t nm_scratch(int64_t range) { return (range + kNmPadding) * 5; }  // bytes: u 4, a flag 1

const Kernels& kernels_portable();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace cram
