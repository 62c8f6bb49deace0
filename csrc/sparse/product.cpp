#include "product.h"

#include <stdexcept>
#include <string>

namespace cram {

const SparseKernels& sparse_kernels(const char* level) {
#if defined(__x86_64__)
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && strcmp(level, "avx512") == 0) return sparse_avx512();
  if (fma && strcmp(level, "avx2") == 0) return sparse_avx2();
#endif
  (void)level;
  return sparse_portable();
}

void append_tiles(std::vector<Tile>& tiles, int64_t image, int64_t n, int tile) {
  for (int64_t first = 0; first < n;) {
    const int64_t left = n - first;
    while (tile > 8 && left < tile - tile / 4) tile /= 2;
    const int64_t valid = left < tile ? left : tile;
    tiles.push_back({image, first, tile, valid});
    first += valid;
  }
}

std::vector<int64_t> piece_starts(const SparseMatrix& a) {
  std::vector<int64_t> starts;
  starts.reserve(static_cast<size_t>(a.sections() * a.blocks()));
  const uint8_t* steps_of = a.steps_of;
  int64_t start = 0;
  for (int64_t section = 0; section < a.sections(); ++section)
    for (int64_t block = 0, slices = SparseMatrix::slices(a.rows_of(section)); block < a.blocks(); ++block, steps_of += slices) {
      starts.push_back(start);
      uint32_t sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice) sum += steps_of[slice];
      start += sum;
    }
  return starts;
}

Piece piece_of(const SparseMatrix& a, const std::vector<int64_t>& starts, int64_t section, int64_t block) {
  const int64_t rows = a.rows_of(section), start = starts[section * a.blocks() + block] * kLanes;
  return {rows, a.values + start, a.column + start, a.order + section * a.section * a.blocks() + block * rows,
          a.steps_of + (section * SparseMatrix::slices(a.section) * a.blocks() + block * SparseMatrix::slices(rows))};
}

namespace {

void refuse(const char* what, int64_t limit, int64_t found) {
  throw std::invalid_argument(std::string("packed must have ") + what + std::to_string(limit) + ", got " + std::to_string(found));
}

}  // namespace

void validate(const SparseKernels& kernels, const SparseMatrix& a, const Piece& piece) {
  int64_t steps = 0;
  for (int64_t slice = 0; slice < SparseMatrix::slices(piece.rows); ++slice) steps += piece.steps_of[slice];
  if (const int largest = kernels.largest8(piece.column, steps * kLanes); largest > a.block) refuse("columns of at most ", a.block, largest);
}

void validate(const SparseKernels& kernels, const SparseMatrix& a) {
  if (a.rows == 0) return;
  int64_t steps = 0;
  for (int64_t slice = 0; slice < a.all_slices(); ++slice) steps += a.steps_of[slice];
  if (steps != a.steps) refuse("numbers of steps that add up to ", a.steps, steps);
  const int64_t whole = (a.sections() - 1) * a.section * a.blocks(), last = a.rows_of(a.sections() - 1);
  if (const int largest = kernels.largest16(a.order, whole); whole > 0 && largest >= a.section) refuse("places of rows below ", a.section, largest);
  if (const int largest = kernels.largest16(a.order + whole, last * a.blocks()); largest >= last) refuse("places of rows below ", last, largest);
}

namespace {

struct Rows {
  const SparseKernels& kernels;
  const float* x;
  int64_t columns;
  float* out;
  int64_t out_columns;

  void pack(const Tile& tile, int64_t begin, int64_t end, float* panel) const {
    if (tile.valid < tile.width) memset(panel, 0, static_cast<size_t>((end - begin) * tile.width) * sizeof(float));
    kernels.transpose(x + tile.first * columns + begin, columns, tile.valid, end - begin, panel, tile.width);
  }

  Target target(const Tile&, int64_t) const { return {nullptr, 0, false}; }

  void unpack(const Tile& tile, int64_t begin, int64_t end, const float* sums) const {
    kernels.transpose(sums, tile.width, end - begin, tile.valid, out + tile.first * out_columns + begin, out_columns);
  }
};

}  // namespace

void sparse_linear(const Pool& pool, const SparseKernels& kernels, const SparseMatrix& a, const float* x, int64_t n, const float* bias, int tile,
                   float* out) {
  if (tile > 1) {
    std::vector<Tile> tiles;
    append_tiles(tiles, 0, n, tile);
    return multiply(pool, kernels, a, tiles, tile, bias, Rows{kernels, x, a.columns, out, a.rows});
  }
  validate(kernels, a);
  const std::vector<int64_t> starts = piece_starts(a);
  const Start start(bias, a.rows);
  const int64_t blocks = a.blocks();
  Pool team = pool;
  const int64_t worth = a.steps * kLanes * n / (kWorkOfThread / 4) + 1;  // a gather is slower than a multiplication
  if (worth < team.threads) team.threads = static_cast<int>(worth);
  // Each block of x with a 0 behind it.
  const int64_t length = blocks * (a.block + 1);
  float* spread = Scratch::mine().panel(n * length + kMaxBlock);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k = block * a.block, width = k + a.block < a.columns ? a.block : a.columns - k;
      float* to = spread + i * length + block * (a.block + 1);
      memcpy(to, x + i * a.columns + k, static_cast<size_t>(width) * sizeof(float));
      memset(to + width, 0, static_cast<size_t>(a.block + 1 - width) * sizeof(float));
    }
  for_tasks(team, a.sections(), [&](int, int64_t section) {
    const int64_t row = section * a.section;
    for (int64_t block = 0; block < blocks; ++block) {
      const Piece piece = piece_of(a, starts, section, block);
      validate(kernels, a, piece);
      for (int64_t i = 0; i < n; ++i) {
        float* to = out + i * a.rows + row;
        kernels.dot(piece, a.block, spread + i * length + block * (a.block + 1),
                    Sums{start.data() + row, block == 0, to, 1, to, 1, false});
      }
    }
  });
}

}  // namespace cram
