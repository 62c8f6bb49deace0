// 2:4 as the sparse tensor cores of SM 8.x read it (docs/contract.md: Packed 2:4), for one group and one metadata word; shared by the CPU and CUDA.
// All of it is moves of bits: no number is rounded, a signalling NaN stays one.
#pragma once

#include "number.h"

namespace cram {

// What is packed: the width of a number, and which of its bits are its magnitude (the sign of a zero does not count).
enum class Slot : uint8_t { kInt8, kFloat8, kFloat16, kFloat32 };

struct PackItem {
  Slot slot;
  int64_t rows, cols;  // of the dense matrix
  void* dense;         // [rows, cols]
  void* packed;        // [rows, cols / 2]
  void* meta;          // [rows, cols / 32] of 4 bytes for int8, [rows, cols / 16] of 2 bytes for 16-bit numbers, [rows, cols / 8] for float32
};

struct GroupItem {
  Slot slot;
  int64_t numel;
  int64_t inner;  // elements between neighbours along axis 1
  const void* data;
};

CRAM_INLINE constexpr int64_t size_of(Slot slot) { return slot == Slot::kFloat32 ? 4 : slot == Slot::kFloat16 ? 2 : 1; }
CRAM_INLINE constexpr int64_t meta_cols(Slot slot, int64_t cols) { return cols / (slot == Slot::kInt8 ? 32 : slot == Slot::kFloat16 ? 16 : 8); }
CRAM_INLINE constexpr int64_t rows_multiple(Slot slot) { return slot == Slot::kInt8 ? 16 : 32; }
CRAM_INLINE constexpr int64_t cols_multiple(Slot slot) {
  return slot == Slot::kInt8 ? 64 : slot == Slot::kFloat16 ? 32 : 16;
}  // two metadata words a row

// The 4 bits of a group: where its first and its second number come from, from whether slots 0, 1 and 3 are not zero (1 or 0).
// The choice for groups with fewer than two numbers is torch's (sparse_semi_structured_from_dense_cutlass).
CRAM_INLINE uint32_t group_places(uint32_t m0, uint32_t m1, uint32_t m3) {
  const uint32_t none = (m0 | m1) ^ 1;
  const uint32_t first = ((m0 ^ 1) & m1) | none << 1;
  const uint32_t second = ((m0 & m1) | none | m3) | ((m0 & m1) ^ 1) << 1;
  return first | second << 2;
}

// float32 is 1:2: a pair of numbers is a group of four halves, of which one number is the first two or the last two.
constexpr uint32_t kFirstOfPair = 0x4, kSecondOfPair = 0xe;

// A group of four slots of `bytes` bytes as one word, the two numbers that stay, and one slot.
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using Slot = uint8_t;
  using Group = uint32_t;
  using Pair = uint16_t;
};
template <>
struct Word<2> {
  using Slot = uint16_t;
  using Group = uint64_t;
  using Pair = uint32_t;
};

// What stays of a group, and its 4 bits. magnitude: the bits of a number that make it not zero.
template <int bytes>
CRAM_INLINE typename Word<bytes>::Pair pack_group(typename Word<bytes>::Group x, uint32_t magnitude, uint32_t* place) {
  using W = Word<bytes>;
  using Group = typename W::Group;
  constexpr int bits = 8 * bytes;
  const Group one = static_cast<typename W::Slot>(magnitude);
  const Group m0 = (x & one) != 0, m1 = (x >> bits & one) != 0, m3 = (x >> 3 * bits & one) != 0;
  *place = group_places(m0, m1, m3);
  const Group first = x >> (*place & 3) * bits, second = x >> (*place >> 2) * bits;
  return static_cast<typename W::Pair>(static_cast<typename W::Slot>(first) | second << bits);
}

template <int bytes>
CRAM_INLINE typename Word<bytes>::Group unpack_group(typename Word<bytes>::Pair pair, uint32_t place) {
  using Group = typename Word<bytes>::Group;
  constexpr int bits = 8 * bytes;
  const Group first = static_cast<typename Word<bytes>::Slot>(pair), second = static_cast<Group>(pair) >> bits;
  return first << (place & 3) * bits | second << (place >> 2) * bits;
}

// The same for a pair of float32.
CRAM_INLINE uint32_t pack_pair(uint32_t x0, uint32_t x1, uint32_t* place) {
  const bool first = (x0 & 0x7fffffffu) != 0;
  *place = first ? kFirstOfPair : kSecondOfPair;
  return first ? x0 : x1;
}
CRAM_INLINE bool is_first_of_pair(uint32_t place) { return (place & 3) < 2; }

// Where the metadata word (row, col) of a matrix of `rows` rows lies: rows interleaved within a group, 2x2 blocks transposed, then pairs of
// columns one after the other (CUTLASS: reorder_meta, ColumnMajorInterleaved<2>).
CRAM_INLINE int64_t meta_place(int64_t row, int64_t col, int64_t rows, int64_t group) {
  const int64_t interleave = group / 8;
  int64_t r = row / group * group + row % 8 * interleave + row % group / 8;
  const int64_t move = (r + col) % 2 == 0 ? 0 : r % 2 == 0 ? 1 : -1;  // the corners of a 2x2 block that change places
  r += move;
  col -= move;
  return col / 2 * rows * 2 + r * 2 + col % 2;
}

}  // namespace cram
