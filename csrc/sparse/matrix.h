// A sparse matrix times a dense one on the CPU, torch-free: the data, and the kernels of each SIMD level.
#pragma once

#include <cstdint>

namespace cram {

// Compressed rows: the values of row 0, then those of row 1, ..., each row by ascending column.
struct SparseMatrix {
  int64_t rows, columns;   // columns <= 65535
  const float* values;     // [nonzeros]
  const uint16_t* column;  // [nonzeros]
  const uint16_t* counts;  // [rows]: non-zeros of each row
  int64_t nonzeros;
};

// How a product is cut, found by trials; the result hardly depends on it (only the order of the sums does).
struct Plan {
  int tile;         // columns of the dense matrix that stay in registers: 8, 16, 32, 64, 128; 1: a dot product a row
  int64_t k_block;  // rows of the dense matrix that are packed at a time, to stay in the L1 cache
  int64_t chunk;    // rows of the sparse matrix that pass over a packed block
};

// Of one SIMD level. `tile` is one of Plan's.
struct SparseKernels {
  const char* name;

  // out[r] = bias[r] + row r * x for rows [begin, end), whose first non-zero is number `start`. Returns whether all columns were in range.
  bool (*dot)(const SparseMatrix&, int64_t begin, int64_t end, int64_t start, const float* x, const float* bias, float* out);

  // sums[r][tile] (+)= the part of row r whose columns are in [first, last) times the panel, whose first row is column `first` of the matrix.
  // cursors[r], r in [0, rows], is where that part begins, and is moved to its end; stops[r] is the end of row r; both count from `start`.
  void (*accumulate)(int tile, const SparseMatrix&, int64_t start, uint32_t* cursors, const uint32_t* stops, int64_t rows, const float* panel,
                     int64_t first, int64_t last, float* sums);

  // to[c * to_stride + r] = from[r * from_stride + c] (+ bias[r], where given).
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* bias, float* to, int64_t to_stride);

  // to[r * to_stride + c] = from[r * from_stride + c] (+ bias[r], where given).
  void (*copy_rows)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* bias, float* to, int64_t to_stride);

  // Whether all columns are in range and ascend within their rows. counts are known to add up to the number of non-zeros.
  bool (*well_formed)(const SparseMatrix&);

  // panel[i][tile] = from[offsets[i] ...], i in [0, rows); zeros behind the first `valid` of each row.
  void (*gather_rows)(int tile, const float* from, const int64_t* offsets, int64_t rows, int64_t valid, float* panel);
};

const SparseKernels& sparse_portable();
#if defined(__x86_64__)
const SparseKernels& sparse_avx2();
const SparseKernels& sparse_avx512();
#endif

}  // namespace cram
