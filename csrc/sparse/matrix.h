// A sparse matrix times a dense one on the CPU, torch-free: the data, and the kernels of each SIMD level.
#pragma once

#include <cstdint>

namespace cram {

constexpr int kLanes = 16;           // rows of a slice
constexpr int64_t kMaxBlock = 255;   // a column within a block is 8 bits, and one more number stands for no column
constexpr int64_t kMaxSection = 128;

// Bytes of values that are fetched into the cache ahead of their use: between two calls of a layer others use the cache, and the CPU itself does not
// fetch early enough.
constexpr int64_t kAhead = 8192;

// The matrix is cut into sections of `section` rows and blocks of `block` columns. Within a section and block the rows are ordered by their
// number of non-zeros, and every 16 of them are a slice: all have as many steps as the longest, so that no branch depends on a single row. Element
// 16 * step + lane of a slice is a non-zero of its lane's row. A row that has fewer of them is filled up with values 0 in the column `block`,
// which stands for no column: the panel of activations has a row of zeros there, so that a filler meets no NaN or Inf.
// Slices are stored by section, then block, then number of non-zeros.
struct SparseMatrix {
  int64_t rows, columns, block, section;
  const float* values;      // [steps, 16]; null where they are bfloat16:
  const uint16_t* half;     // [steps, 16]
  const uint8_t* column;    // [steps, 16], within the block
  const uint8_t* order;     // [rows of the matrix * blocks]: of each section and block, which of the section's rows comes first, second, ...
  const uint8_t* place;     // the other way: of each row of the section, which one it is in this order
  const uint8_t* steps_of;  // [slices]
  int64_t steps;            // of all slices

  int64_t blocks() const { return (columns + block - 1) / block; }
  int64_t sections() const { return (rows + section - 1) / section; }
  int64_t rows_of(int64_t s) const { return (s + 1) * section < rows ? section : rows - s * section; }
  static int64_t slices(int64_t rows) { return (rows + kLanes - 1) / kLanes; }
  int64_t all_slices() const {
    const int64_t last = rows_of(sections() - 1);
    return rows == 0 ? 0 : ((sections() - 1) * slices(section) + slices(last)) * blocks();
  }
};

// The slices of one section and block.
struct Piece {
  int64_t rows;
  const float* values;
  const uint16_t* half;
  const uint8_t *column, *order, *place, *steps_of;
};

// What a product with one piece adds to. The first block of a section starts from the bias instead.
struct Sums {
  const float* bias;  // of the section's rows
  bool fresh;
  float* from;  // [rows][from_stride]
  int64_t from_stride;
  float* to;
  int64_t to_stride;
  bool stream;  // past the caches; `to` and to_stride are then divisible by 64 bytes
};

// Up to 16 numbers in a row of a panel, from `to` on: of lane i, if bit i of `there` is set, image[from + i * stride], else 0.
struct Run {
  int64_t from;
  int32_t to;
  uint16_t lanes, there;
};

// What a tile of a convolution sees: row channel * places + p of its dense matrix is made of `runs_each` runs of place p, in that channel.
struct View {
  const float* image;
  int64_t plane, places, stride;
  const Run* runs;
  int64_t runs_each;
};

// Of one SIMD level. `tile` is 8, 16, 32, 64 or 128.
struct SparseKernels {
  const char* name;

  // What dot reads of `width` elements of x, and of a 0 in column `block`: up to 256 numbers in a form of its own.
  void (*spread)(const float* x, int64_t width, int64_t block, float* to);

  // to[row] = from[row] or bias[row], plus the row times what was spread. Returns the largest column, which must not be beyond `block`: the numbers
  // are wrong then, but nothing is read or written that is not there.
  int (*dot)(const Piece&, int64_t block, const float* spread, const Sums&);
  int (*dot_half)(const Piece&, int64_t block, const float* spread, const Sums&);  // of bfloat16 values; null where they are to be widened before

  // to[row][tile] = from[row][tile] or bias[row], plus the row times the panel, [block + 1][tile].
  void (*accumulate)(int tile, const Piece&, const float* panel, const Sums&);

  // to[c * to_stride + r] = from[r * from_stride + c].
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);

  // to[r * to_stride + c] = from[r * from_stride + c].
  void (*copy_rows)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);

  // panel[k - begin][tile], k in [begin, end): what the window's places see of their channels.
  void (*gather)(const View&, int64_t begin, int64_t end, int tile, float* panel);

  // bfloat16 to float.
  void (*widen)(const uint16_t* from, int64_t n, float* to);

  // Whether `order` and `place`, of numbers below piece.rows, are the inverse of each other: both have each row once then.
  bool (*ordered)(const Piece&);

  // The largest of n bytes; 0 where n is 0.
  int (*largest)(const uint8_t*, int64_t n);
};

const SparseKernels& sparse_portable();
#if defined(__x86_64__)
const SparseKernels& sparse_avx2();
// halved: for a CPU that takes an instruction on 16 numbers as two on 8.
const SparseKernels& sparse_avx512(bool halved);
const SparseKernels& sparse_vbmi(bool halved);  // AVX-512 and permutations of bytes
#endif

}  // namespace cram
