// N:M. Included by kernels_impl.h.
#pragma once

#include "batch.h"
#include "blocks.h"

namespace cram {
namespace CRAM_ISA {

// Keys of one row: 16 of float32; of 16-bit types 16 at `u` and 16 at `u + second`.
CRAM_INLINE I load_keys(const float* u, int64_t) { return both(load(reinterpret_cast<const int32_t*>(u)), I(Batch<float>::kMagnitude)); }
template <class T>
CRAM_INLINE H load_keys(const T* u, int64_t second) {
  return both(load_halves(u, u + second), H(Batch<T>::kMagnitude));
}

// Flags of `rows` rows of lanes. Lanes beyond a row's end are garbage that what is written next overwrites: the row below, or the tile behind.
template <class T, int rows>
CRAM_INLINE void store_rows(uint8_t* keep, const Bits* bits, int64_t inner, int64_t second) {
  if (sizeof(T) == 4 || second < inner) {  // one tile
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      store_flags(keep + row * inner, bits[row] & 0xffff);
      if (sizeof(T) == 2) store_flags(keep + row * inner + second, bits[row] >> 16);
    }
    return;
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) store_flags(keep + row * inner, bits[row] & 0xffff);
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) store_flags(keep + second + row * inner, bits[row] >> 16);
}

// How many of the group of each number rank below it (stable ascending) decides: it is kept where they are m - n or more.

// Groups of M neighbours, M a divisor of 8: in registers.
template <class T, int M>
struct Neighbours {
  using V = typename Batch<T>::Vec;
  using Number = typename Batch<T>::Number;
  V from[M], wins_ties[M];  // [d]: the lane d places on, round the group; 1 where that is an earlier one, which wins ties

  CRAM_INLINE_MEMBER Neighbours() {
    for (int d = 1; d < M; ++d) {
      Number index[Batch<T>::kLanes], wins[Batch<T>::kLanes];
      for (int lane = 0; lane < Batch<T>::kLanes; ++lane) {
        const int place = lane % M;
        index[lane] = static_cast<Number>(lane - place + (place + d) % M);
        wins[lane] = place + d >= M;
      }
      memcpy(&from[d], index, sizeof index);
      memcpy(&wins_ties[d], wins, sizeof wins);
    }
  }

  CRAM_INLINE_MEMBER Bits kept(V key, int dropped) const {
    V rank(0);
    for (int d = 1; d < M; ++d) rank = add_if_less(rank, permute(key, from[d]), add(key, wins_ties[d]));
    return greater_bits(rank, V(static_cast<Number>(dropped - 1)));
  }
};

// Lanes of a tile of m rows of `inner` numbers; a column is a group. keep: a flag a number. With M rows known, every pair of them is compared once.
template <class T, int M>
CRAM_INLINE void rank_rows(const T* tile, int64_t inner, int m, int dropped, int64_t second, uint8_t* keep) {
  using V = typename Batch<T>::Vec;
  const V last_dropped(static_cast<typename Batch<T>::Number>(dropped - 1));
  if constexpr (M != 0) {
    V keys[M], ranks[M];
#pragma GCC unroll 8
    for (int row = 0; row < M; ++row) {
      keys[row] = load_keys(tile + row * inner, second);
      ranks[row] = V(static_cast<typename Batch<T>::Number>(row));  // as if all before it ranked below
    }
#pragma GCC unroll 8
    for (int row = 0; row < M; ++row)
#pragma GCC unroll 8
      for (int later = row + 1; later < M; ++later) swap_if_less(ranks[row], ranks[later], keys[later], keys[row]);
    Bits bits[M];
#pragma GCC unroll 8
    for (int row = 0; row < M; ++row) bits[row] = greater_bits(ranks[row], last_dropped);
    store_rows<T, M>(keep, bits, inner, second);
  } else {
    for (int row = 0; row < m; ++row) {
      const V own = load_keys(tile + row * inner, second), own_or_equal = add(own, V(1));
      V rank(0);
      for (int other = 0; other < m; ++other)
        if (other != row) rank = add_if_less(rank, load_keys(tile + other * inner, second), other < row ? own_or_equal : own);
      const Bits bits = greater_bits(rank, last_dropped);
      store_rows<T, 1>(keep + row * inner, &bits, inner, second);
    }
  }
}

template <class T, int M>
CRAM_INLINE void rank_tiles_of(const T* u, int64_t size, int64_t inner, int m, int dropped, uint8_t* keep) {
  const int64_t tile = m * inner;
  // The second half of 32 lanes: of the next tile where a row fits into the first.
  const bool two_tiles = sizeof(T) == 2 && M != 0 && inner <= kBlock;
  const int64_t second = two_tiles ? tile : kBlock, columns = two_tiles ? kBlock : Batch<T>::kLanes;
  for (int64_t i = 0; i < size; i += two_tiles ? 2 * tile : tile)
    for (int64_t column = (inner - 1) / columns * columns; column >= 0; column -= columns)
      rank_rows<T, M>(u + i + column, inner, m, dropped, second, keep + i + column);
}

template <class T>
static __attribute__((noinline)) void rank_tiles(const T* u, int64_t size, int64_t inner, int n, int m, uint8_t* keep) {
  if (m == 4) return rank_tiles_of<T, 4>(u, size, inner, m, m - n, keep);
  if (m == 8) return rank_tiles_of<T, 8>(u, size, inner, m, m - n, keep);
  rank_tiles_of<T, 0>(u, size, inner, m, m - n, keep);
}

// Any N:M by way of memory that stays in the first-level cache: u, then flags, then what is written. scratch: nm_scratch(size) bytes.
template <class T, class W>
static __attribute__((noinline)) void nm_strip(Source source, Uphill<T, W>& source_u, int64_t begin, int64_t end, int64_t inner, int n, int m, T* out,
                                               T* saved, uint8_t* mask, char* scratch, bool* nonfinite) {
  const int64_t size = end - begin;
  T* moved = reinterpret_cast<T*>(scratch);
  uint8_t* flags = reinterpret_cast<uint8_t*>(scratch) + sizeof(T) * (size + kNmPadding);
  bool nan = false;
  const auto block = [&](int64_t i, auto, F u) CRAM_INLINE_LAMBDA { store(moved + (i - begin), u); };
  int64_t i = begin;
  for (; i + kBatch <= end; i += kBatch) {
    Batch<T> u;
    if (source_u.batch(i, u)) {
      memcpy(moved + (i - begin), &u, sizeof u);
    } else {
      nan = true;
      for_u<T, W>(source, i, i + kBatch, nonfinite, block);
    }
  }
  for_u<T, W>(source, i, end, nonfinite, block);

  rank_tiles(moved, size, inner, n, m, flags);

  i = begin;
  if (!nan && source.grad != nullptr)
    for (; i + kBatch <= end; i += kBatch) {
      Batch<T> u;
      memcpy(&u, moved + (i - begin), sizeof u);
      const uint64_t kept = load_flags64(flags + (i - begin));
      write(source, out + i, saved == nullptr ? nullptr : saved + i, u, kept);
      if (mask != nullptr) store_bits64(mask, i, kept);
    }
  const I largest(kInfKey);
  for_blocks(i, end, [&](int64_t j, auto lanes) CRAM_INLINE_LAMBDA {
    const F u = load(moved + (j - begin));
    const Bits is_nan = greater_bits(magnitude_key(u), largest);
    const Bits kept = load_flags(flags + (j - begin)) & ~is_nan & lanes_below(lanes);
    write<T>(source, j, lanes, u, kept | is_nan, out, saved);
    if (mask != nullptr) store_bits(mask, j, kept, lanes);
  });
}

template <class T, class W, int M>
static __attribute__((noinline)) void nm_neighbours(Source source, int64_t begin, int64_t end, int n, T* out, T* saved, uint8_t* mask, char* scratch,
                                                    bool* nonfinite) {
  const Neighbours<T, M> neighbours;
  Uphill<T, W> source_u(source);
  int64_t i = begin;
  for (; i + kBatch <= end; i += kBatch) {
    Batch<T> u;
    if (__builtin_expect(!source_u.batch(i, u), 0)) {
      nm_strip(source, source_u, i, i + kBatch, 1, n, M, out, saved, mask, scratch, nonfinite);
      continue;
    }
    const Batch<T> keys = keys_of(u);
    uint64_t kept = 0;
    CRAM_VECS kept |= static_cast<uint64_t>(neighbours.kept(keys.v[vec], M - n)) << (Batch<T>::kLanes * vec);
    write(source, out + i, saved == nullptr ? nullptr : saved + i, u, kept);
    if (mask != nullptr) store_bits64(mask, i, kept);
  }
  if (i < end) nm_strip(source, source_u, i, end, 1, n, M, out, saved, mask, scratch, nonfinite);
  if (source_u.nonfinite()) *nonfinite = true;
}

template <class T, class W>
CRAM_INLINE void nm_as(const Source& source, int64_t begin, int64_t end, int64_t inner, int n, int m, T* out, T* saved, uint8_t* mask, char* scratch,
                       bool* nonfinite) {
  if (inner == 1 && m == 4) return nm_neighbours<T, W, 4>(source, begin, end, n, out, saved, mask, scratch, nonfinite);
  if (inner == 1 && m == 8) return nm_neighbours<T, W, 8>(source, begin, end, n, out, saved, mask, scratch, nonfinite);
  Uphill<T, W> source_u(source);
  nm_strip(source, source_u, begin, end, inner, n, m, out, saved, mask, scratch, nonfinite);
  if (source_u.nonfinite()) *nonfinite = true;
}

static void nm(Source source, DType dtype, int64_t begin, int64_t end, int64_t inner, int n, int m, void* out, void* saved, uint8_t* mask,
               char* scratch, bool* nonfinite) {
  with_types(dtype, source.master, [&](auto t, auto w) CRAM_INLINE_LAMBDA {
    using T = decltype(t);
    nm_as<T, decltype(w)>(source, begin, end, inner, n, m, static_cast<T*>(out), static_cast<T*>(saved), mask, scratch, nonfinite);
  });
}

}  // namespace CRAM_ISA
}  // namespace cram
