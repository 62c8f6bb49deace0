// N:M. Included by kernels_impl.h.
#pragma once

#include "batch.h"
#include "blocks.h"

namespace cram {
namespace CRAM_ISA {

// keep[i] is a set flag where not fewer than m - n of the group of element i rank below it (stable ascending). keys: [tiles * m, inner], padded by kBlock in
// front and behind; keep: written up to kBlock further.
static void nm_rank(const int32_t* keys, int64_t size, int64_t inner, int n, int m, uint8_t* keep) {
  const int dropped = m - n;
  if (inner == 1 && m <= kBlock && kBlock % m == 0) {  // whole groups in a block: the neighbours by shifted loads
    // The neighbour d places on, in the lanes where that is the same group (-1); in the others it wraps to d - m, comes before, and wins ties.
    I ahead[kBlock], wins_ties[kBlock];
    for (int d = 1; d < m; ++d)
      for (int lane = 0; lane < kBlock; ++lane) {
        const int32_t in_group = lane % m + d < m ? -1 : 0;
        ahead[d].v[lane / kWidth][lane % kWidth] = in_group;
        wins_ties[d].v[lane / kWidth][lane % kWidth] = 1 + in_group;
      }
    for (int64_t i = 0; i < size; i += kBlock) {
      const I own = load(keys + i);
      I rank(0);
      for (int d = 1; d < m; ++d)
        rank = sub(rank, less(choose(ahead[d], load(keys + i + d), load(keys + i + d - m)), add(own, wins_ties[d])));
      store_flags(keep + i, greater_bits(rank, I(dropped - 1)));
    }
    return;
  }
  for (int64_t tile = 0; tile < size; tile += m * inner) {
    for (int row = 0; row < m; ++row) {
      const int32_t* own_row = keys + tile + row * inner;
      for (int64_t r = 0; r < inner; r += kBlock) {  // beyond the row's end: garbage that the next row overwrites
        const I own = load(own_row + r), own_or_equal = add(own, I(1));
        I rank(0);
        for (int other = 0; other < m; ++other) {
          if (other == row) continue;
          rank = sub(rank, less(load(keys + tile + other * inner + r), other < row ? own_or_equal : own));
        }
        store_flags(keep + tile + row * inner + r, greater_bits(rank, I(dropped - 1)));
      }
    }
  }
}

static void nm(const Source& source, DType dtype, int64_t begin, int64_t end, int64_t inner, int n, int m, void* out, void* saved, uint8_t* mask,
        char* scratch, bool* nonfinite) {
  const int64_t size = end - begin;
  int32_t* keys = reinterpret_cast<int32_t*>(scratch) + kBlock;
  float* moved = reinterpret_cast<float*>(keys + size + 2 * kBlock);
  uint8_t* kept = reinterpret_cast<uint8_t*>(moved + size + kBlock);
  with_u(source, dtype, begin, end, nonfinite, [&](auto, int64_t i, auto, F u) CRAM_MELT {
    store(keys + (i - begin), magnitude_key(u));
    store(moved + (i - begin), u);
  });
  nm_rank(keys, size, inner, n, m, kept);
  const I largest(kInfKey);
  with_type(dtype, [&](auto t) CRAM_MELT {
    using T = decltype(t);
    for_blocks(0, size, [&](int64_t i, auto lanes) CRAM_MELT {
      const Bits nan = greater_bits(load(keys + i), largest);
      const Bits bits = load_flags(kept + i) & ~nan & lanes_below(lanes);
      write<T>(source, begin + i, lanes, load(moved + i), bits | nan, out, saved);
      if (mask != nullptr) store_bits(mask, begin + i, bits, lanes);
    });
  });
}

}  // namespace CRAM_ISA
}  // namespace cram
