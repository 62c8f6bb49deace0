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
CRAM_INLINE constexpr int64_t cols_multiple(Slot slot) { return slot == Slot::kInt8 ? 64 : slot == Slot::kFloat16 ? 32 : 16; }  // two metadata words a row

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
