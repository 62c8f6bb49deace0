#include "product.h"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cram {

#if defined(__x86_64__)
namespace {

// A Zen 4 does: family 25. A Zen 3, of the same family, has no AVX-512.
bool halves_registers() {
  unsigned a = 0, b, c, d;
  __get_cpuid(1, &a, &b, &c, &d);
  return (a >> 8 & 15) + (a >> 20 & 255) == 25;
}

}  // namespace
#endif

const SparseKernels& sparse_kernels(const char* level) {
#if defined(__x86_64__)
  static const bool halved = halves_registers();
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && strcmp(level, "avx512") == 0) return __builtin_cpu_supports("avx512vbmi") ? sparse_vbmi(halved) : sparse_avx512(halved);
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

int64_t steps_of(const Piece& piece) {
  int64_t steps = 0;
  for (int64_t slice = 0; slice < SparseMatrix::slices(piece.rows); ++slice) steps += piece.steps_of[slice];
  return steps;
}

Piece piece_of(const SparseMatrix& a, const std::vector<int64_t>& starts, int64_t section, int64_t block) {
  const int64_t rows = a.rows_of(section), start = starts[section * a.blocks() + block] * kLanes;
  const int64_t places = section * a.section * a.blocks() + block * rows;
  const int64_t slice = section * SparseMatrix::slices(a.section) * a.blocks() + block * SparseMatrix::slices(rows);
  const float* values = a.values == nullptr ? nullptr : a.values + start;
  const uint16_t* half = a.half == nullptr ? nullptr : a.half + start;
  return {rows, values, half, a.column + start, a.order + places, a.place + places, a.steps_of + slice};
}

Piece widened(const SparseKernels& kernels, const Piece& piece) {
  if (piece.half == nullptr) return piece;
  const int64_t n = steps_of(piece) * kLanes;
  Piece found = piece;
  float* values = Scratch::mine().values(n);
  kernels.widen(piece.half, n, values);
  found.values = values;
  return found;
}

namespace {

void refuse(const char* what, int64_t limit, int64_t found) {
  throw std::invalid_argument(std::string("packed must have ") + what + std::to_string(limit) + ", got " + std::to_string(found));
}

}  // namespace

void validate(const SparseKernels& kernels, const SparseMatrix& a, const Piece& piece) {
  if (const int largest = kernels.largest(piece.column, steps_of(piece) * kLanes); largest > a.block) refuse("columns of at most ", a.block, largest);
}

void validate_order(const SparseKernels& kernels, const Piece& piece) {
  if (!kernels.ordered(piece)) throw std::invalid_argument("packed must have each row once in the order of a block, and its place, got another order");
}

void validate(const SparseKernels& kernels, const SparseMatrix& a) {
  if (a.rows == 0) return;
  int64_t steps = 0;
  for (int64_t slice = 0; slice < a.all_slices(); ++slice) steps += a.steps_of[slice];
  if (steps != a.steps) refuse("numbers of steps that add up to ", a.steps, steps);
  const int64_t whole = (a.sections() - 1) * a.section * a.blocks(), last = a.rows_of(a.sections() - 1);
  for (const uint8_t* rows : {a.order, a.place}) {
    if (const int largest = kernels.largest(rows, whole); whole > 0 && largest >= a.section) refuse("places of rows below ", a.section, largest);
    if (const int largest = kernels.largest(rows + whole, last * a.blocks()); largest >= last) refuse("places of rows below ", last, largest);
  }
}

namespace {

constexpr int64_t kSpread = kMaxBlock + 1;

struct Rows {
  const SparseKernels& kernels;
  const float* x;
  int64_t columns;
  float* out;
  int64_t out_columns;

  void prepare(const Tile&) const {}

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
  const int64_t blocks = a.blocks();
  const Pool team = team_of(pool, work_of(a.steps * kLanes, 1) * n);
  // Each thread spreads x for itself: to write what another one reads takes longer.
  std::vector<char> has_spread(static_cast<size_t>(team.threads));
  for_stretches(team, a.sections(), [&](int worker, int64_t section) {
    const int64_t row = section * a.section;
    float* spread = Scratch::mine().panel(n * blocks * kSpread);
    for (int64_t i = 0; i < n && !has_spread[worker]; ++i)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t k = block * a.block, width = k + a.block < a.columns ? a.block : a.columns - k;
        kernels.spread(x + i * a.columns + k, width, a.block, spread + (i * blocks + block) * kSpread);
      }
    has_spread[worker] = 1;
    for (int64_t block = 0; block < blocks; ++block) {
      const bool half = a.half != nullptr && kernels.dot_half != nullptr;
      Piece piece = piece_of(a, starts, section, block);
      validate_order(kernels, piece);
      if (!half) piece = widened(kernels, piece);
      for (int64_t i = 0; i < n; ++i) {
        float* to = out + i * a.rows + row;
        const int largest = (half ? kernels.dot_half : kernels.dot)(piece, a.block, spread + (i * blocks + block) * kSpread,
                                                                    Sums{bias + row, block == 0, to, 1, to, 1, false});
        if (largest > a.block) refuse("columns of at most ", a.block, largest);
      }
    }
  });
}

}  // namespace cram
