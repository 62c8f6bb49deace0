// Packing, unpacking and counting for the instruction set that this file is compiled for: plain loops that the compiler vectorises.
// Included by kernels_impl.h.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace cram {
namespace CRAM_ISA {

// A row of `groups` groups: the numbers that stay, and the 4 bits of each group.
template <int bytes>
CRAM_INLINE void pack_row(const char* dense, int64_t groups, uint32_t magnitude, char* packed, uint8_t* places) {
  for (int64_t i = 0; i < groups; ++i) {
    typename Word<bytes>::Group x;
    memcpy(&x, dense + i * sizeof x, sizeof x);
    uint32_t place;
    const auto pair = pack_group<bytes>(x, magnitude, &place);
    memcpy(packed + i * sizeof pair, &pair, sizeof pair);
    places[i] = static_cast<uint8_t>(place);
  }
}

template <int bytes>
CRAM_INLINE void unpack_row(const char* packed, int64_t groups, const uint8_t* places, char* dense) {
  for (int64_t i = 0; i < groups; ++i) {
    typename Word<bytes>::Pair pair;
    memcpy(&pair, packed + i * sizeof pair, sizeof pair);
    const auto x = unpack_group<bytes>(pair, places[i]);
    memcpy(dense + i * sizeof x, &x, sizeof x);
  }
}

CRAM_INLINE void pack_pairs(const char* dense, int64_t pairs, char* packed, uint8_t* places) {
  for (int64_t i = 0; i < pairs; ++i) {
    uint32_t x[2];
    memcpy(x, dense + i * sizeof x, sizeof x);
    uint32_t place;
    const uint32_t kept = pack_pair(x[0], x[1], &place);
    memcpy(packed + i * sizeof kept, &kept, sizeof kept);
    places[i] = static_cast<uint8_t>(place);
  }
}

CRAM_INLINE void unpack_pairs(const char* packed, int64_t pairs, const uint8_t* places, char* dense) {
  for (int64_t i = 0; i < pairs; ++i) {
    uint32_t kept;
    memcpy(&kept, packed + i * sizeof kept, sizeof kept);
    const bool first = is_first_of_pair(places[i]);
    const uint32_t x[2] = {first ? kept : 0, first ? 0 : kept};
    memcpy(dense + i * sizeof x, x, sizeof x);
  }
}

// A metadata word <-> the 4 bits of its 4 or 8 groups, a byte each.
CRAM_INLINE uint16_t join(uint32_t x) {
  x = (x | x >> 4) & 0x00ff00ffu;
  return static_cast<uint16_t>(x | x >> 8);
}
CRAM_INLINE uint32_t join(uint64_t x) {
  x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
  x = (x | x >> 8) & 0x0000ffff0000ffffu;
  return static_cast<uint32_t>(x | x >> 16);
}
CRAM_INLINE uint32_t split(uint16_t word) {
  const uint32_t x = (word | static_cast<uint32_t>(word) << 8) & 0x00ff00ffu;
  return (x | x << 4) & 0x0f0f0f0fu;
}
CRAM_INLINE uint64_t split(uint32_t word) {
  uint64_t x = (word | static_cast<uint64_t>(word) << 16) & 0x0000ffff0000ffffu;
  x = (x | x << 8) & 0x00ff00ff00ff00ffu;
  return (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
}

// The metadata of a block of rows, a line of 128 bytes for each pair of columns: f(word, the bytes of its groups). Bytes: uint32_t or uint64_t.
template <class Word, class Bytes, class F>
CRAM_INLINE void for_meta(const PackItem& item, int64_t begin, uint8_t* places, F f) {
  constexpr int64_t group = 64 / sizeof(Word);
  const int64_t cols = meta_cols(item.slot, item.cols);
  int64_t offsets[2 * group];  // in `places`, of each word of a line
  for (int64_t row = 0; row < group; ++row)
    for (int64_t col = 0; col < 2; ++col) offsets[meta_place(row, col, group, group)] = (row * cols + col) * sizeof(Bytes);
  for (int64_t col = 0; col < cols; col += 2) {
    Word* line = static_cast<Word*>(item.meta) + col * item.rows + 2 * begin;
    for (int64_t i = 0; i < 2 * group; ++i) f(line[i], places + offsets[i] + col * sizeof(Bytes));
  }
}

template <class Word, class Bytes>
CRAM_INLINE void join_all(const PackItem& item, int64_t begin, uint8_t* places) {
  for_meta<Word, Bytes>(item, begin, places, [](Word& word, const uint8_t* own) CRAM_MELT {
    Bytes x;
    memcpy(&x, own, sizeof x);
    word = join(x);
  });
}

template <class Word, class Bytes>
CRAM_INLINE void split_all(const PackItem& item, int64_t begin, uint8_t* places) {
  for_meta<Word, Bytes>(item, begin, places, [](const Word& word, uint8_t* own) CRAM_MELT {
    const Bytes x = split(word);
    memcpy(own, &x, sizeof x);
  });
}

static int64_t row_groups(const PackItem& item) { return item.cols / (item.slot == Slot::kFloat32 ? 2 : 4); }

static void pack_24(const PackItem& item, int64_t begin, uint8_t* places) {
  const int64_t groups = row_groups(item), dense_bytes = item.cols * size_of(item.slot);
  for (int64_t row = 0; row < rows_multiple(item.slot); ++row) {
    const char* dense = static_cast<const char*>(item.dense) + (begin + row) * dense_bytes;
    char* packed = static_cast<char*>(item.packed) + (begin + row) * dense_bytes / 2;
    uint8_t* own = places + row * groups;
    if (item.slot == Slot::kFloat32)
      pack_pairs(dense, groups, packed, own);
    else if (item.slot == Slot::kFloat16)
      pack_row<2>(dense, groups, 0x7fff, packed, own);
    else
      pack_row<1>(dense, groups, 0xff, packed, own);
  }
  item.slot == Slot::kInt8 ? join_all<uint32_t, uint64_t>(item, begin, places) : join_all<uint16_t, uint32_t>(item, begin, places);
}

static void unpack_24(const PackItem& item, int64_t begin, uint8_t* places) {
  const int64_t groups = row_groups(item), dense_bytes = item.cols * size_of(item.slot);
  item.slot == Slot::kInt8 ? split_all<uint32_t, uint64_t>(item, begin, places) : split_all<uint16_t, uint32_t>(item, begin, places);
  for (int64_t row = 0; row < rows_multiple(item.slot); ++row) {
    char* dense = static_cast<char*>(item.dense) + (begin + row) * dense_bytes;
    const char* packed = static_cast<const char*>(item.packed) + (begin + row) * dense_bytes / 2;
    const uint8_t* own = places + row * groups;
    if (item.slot == Slot::kFloat32)
      unpack_pairs(packed, groups, own, dense);
    else if (item.slot == Slot::kFloat16)
      unpack_row<2>(packed, groups, own, dense);
    else
      unpack_row<1>(packed, groups, own, dense);
  }
}

constexpr int64_t kSmallTile = 4096;  // numbers

// The counts of the groups that begin at place, place + 1, ...; ranges are noted in ascending order.
CRAM_INLINE void note(const uint16_t* counts, int64_t size, int64_t place, int n, Violations& found) {
  int64_t groups = 0;
  for (int64_t i = 0; i < size; ++i) groups += counts[i] > n;
  found.groups += groups;
  if (groups == 0 || found.first != INT64_MAX) return;
  while (*counts <= n) ++counts, ++place;
  found.first = place;
}

// Tiles of m rows of `inner` numbers; a group is a column. Rows are taken in strips, so that the counts stay in the first-level cache.
template <class T, int kM>
CRAM_INLINE void count_groups(const T* x, T magnitude, int64_t begin, int64_t end, int64_t inner, int n, int m, Violations& found) {
  constexpr int64_t kStrip = 512;
  if (kM > 0) m = kM;
  for (int64_t tile = begin; tile < end; tile += m * inner)
    for (int64_t strip = 0; strip < inner; strip += kStrip) {
      const int64_t width = inner - strip < kStrip ? inner - strip : kStrip;
      uint16_t counts[kStrip];
      memset(counts, 0, 2 * width);
      for (int row = 0; row < m; ++row)
        for (int64_t i = 0; i < width; ++i) counts[i] = static_cast<uint16_t>(counts[i] + ((x[tile + row * inner + strip + i] & magnitude) != 0));
      for (int64_t i = 0; i < width; ++i) found.nonzeros += counts[i];
      note(counts, width, tile + strip, n, found);
    }
}

// The same for small tiles, several at once: loops as long as a block, not as a row.
template <class T, int kM>
CRAM_INLINE void count_small_tiles(const T* x, T magnitude, int64_t begin, int64_t end, int64_t inner, int n, int m, Violations& found) {
  if (kM > 0) m = kM;
  const int64_t tile = m * inner, block = kSmallTile / tile * tile;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t size = end - first < block ? end - first : block;
    uint8_t nonzero[kSmallTile];
    uint16_t counts[kSmallTile];  // of the group that begins at i, where one does
    int64_t nonzeros = 0;
    for (int64_t i = 0; i < size; ++i) nonzero[i] = (x[first + i] & magnitude) != 0;
    for (int64_t i = 0; i < size; ++i) nonzeros += nonzero[i];
    found.nonzeros += nonzeros;
    const int64_t beginnings = size - (m - 1) * inner;
    for (int64_t i = 0; i < beginnings; ++i) {
      int count = 0;
      for (int row = 0; row < m; ++row) count += nonzero[i + row * inner];
      counts[i] = static_cast<uint16_t>(count);
    }
    for (int64_t start = 0; start < size; start += tile) note(counts + start, inner, first + start, n, found);
  }
}

// The same where a group is m neighbours.
template <class T, int kM>
CRAM_INLINE void count_neighbours(const T* x, T magnitude, int64_t begin, int64_t end, int n, int m, Violations& found) {
  if (kM > 0) m = kM;
  int64_t groups = 0, nonzeros = 0;
  for (int64_t i = begin; i < end; i += m) {
    int count = 0;
    for (int j = 0; j < m; ++j) count += (x[i + j] & magnitude) != 0;
    nonzeros += count;
    groups += count > n;
  }
  found.nonzeros += nonzeros;
  found.groups += groups;
  for (int64_t i = begin; groups > 0; i += m) {
    int count = 0;
    for (int j = 0; j < m; ++j) count += (x[i + j] & magnitude) != 0;
    if (count > n) {
      found.first = i;
      return;
    }
  }
}

template <class T>
CRAM_INLINE void count_of(const GroupItem& item, T magnitude, int64_t begin, int64_t end, int n, int m, Violations& found) {
  const T* x = static_cast<const T*>(item.data);
  if (item.inner == 1)
    m == 4 ? count_neighbours<T, 4>(x, magnitude, begin, end, n, m, found) : count_neighbours<T, 0>(x, magnitude, begin, end, n, m, found);
  else if (m * item.inner <= kSmallTile)
    m == 4 ? count_small_tiles<T, 4>(x, magnitude, begin, end, item.inner, n, m, found)
           : count_small_tiles<T, 0>(x, magnitude, begin, end, item.inner, n, m, found);
  else
    m == 4 ? count_groups<T, 4>(x, magnitude, begin, end, item.inner, n, m, found)
           : count_groups<T, 0>(x, magnitude, begin, end, item.inner, n, m, found);
}

static void violations(const GroupItem& item, int64_t begin, int64_t end, int n, int m, Violations& found) {
  switch (item.slot) {
    case Slot::kInt8:
      return count_of<uint8_t>(item, 0xff, begin, end, n, m, found);
    case Slot::kFloat8:
      return count_of<uint8_t>(item, 0x7f, begin, end, n, m, found);
    case Slot::kFloat16:
      return count_of<uint16_t>(item, 0x7fff, begin, end, n, m, found);
    case Slot::kFloat32:
      return count_of<uint32_t>(item, 0x7fffffffu, begin, end, n, m, found);
  }
}

}  // namespace CRAM_ISA
}  // namespace cram
