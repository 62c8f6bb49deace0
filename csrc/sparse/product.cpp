#include "product.h"

#include <cstring>
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

void row_stops(const SparseMatrix& a, int64_t begin, int64_t end, std::vector<uint32_t>& stops) {
  stops.resize(static_cast<size_t>(end - begin) + 1);
  uint32_t at = 0;
  for (int64_t row = begin; row < end; ++row) {
    stops[row - begin] = at;
    at += a.counts[row];
  }
  stops[end - begin] = at;
}

std::vector<int64_t> chunk_starts(const SparseMatrix& a, int64_t chunk) {
  std::vector<int64_t> starts;
  int64_t start = 0;
  for (int64_t row = 0; row < a.rows; row += chunk) {
    starts.push_back(start);
    const int64_t end = row + chunk < a.rows ? row + chunk : a.rows;
    uint32_t sum = 0;
    for (int64_t r = row; r < end; ++r) sum += a.counts[r];
    start += sum;
  }
  return starts;
}

void validate(const SparseKernels& kernels, const SparseMatrix& a) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
  int64_t total = 0;
  for (int64_t row = 0; row < a.rows; ++row) total += a.counts[row];
  if (total != a.nonzeros) refuse("counts must add up to " + std::to_string(a.nonzeros) + ", the number of values, got " + std::to_string(total));
  if (kernels.well_formed(a)) return;
  uint16_t largest = 0;
  for (int64_t i = 0; i < a.nonzeros; ++i) largest = a.column[i] > largest ? a.column[i] : largest;
  if (a.nonzeros > 0 && largest >= a.columns)
    refuse("columns must be below " + std::to_string(a.columns) + ", got " + std::to_string(largest));
  const uint16_t* column = a.column;
  for (int64_t row = 0; row < a.rows; column += a.counts[row], ++row) {
    bool ascending = true;
    for (int64_t i = 1; i < a.counts[row]; ++i) ascending &= column[i - 1] < column[i];
    if (!ascending) refuse("columns must ascend within each row, got others in row " + std::to_string(row));
  }
}

namespace {

struct Rows {
  const SparseKernels& kernels;
  const float* x;
  int64_t columns;
  const float* bias;
  float* out;
  int64_t out_columns;

  void pack(const Tile& tile, int64_t begin, int64_t end, float* panel) const {
    if (tile.valid < tile.width) memset(panel, 0, static_cast<size_t>((end - begin) * tile.width) * sizeof(float));
    kernels.transpose(x + tile.first * columns + begin, columns, tile.valid, end - begin, nullptr, panel, tile.width);
  }

  void unpack(const Tile& tile, int64_t begin, int64_t end, const float* sums) const {
    kernels.transpose(sums, tile.width, end - begin, tile.valid, bias == nullptr ? nullptr : bias + begin, out + tile.first * out_columns + begin,
                      out_columns);
  }
};

}  // namespace

void sparse_linear(const Pool& pool, const SparseKernels& kernels, const SparseMatrix& a, const float* x, int64_t n, const float* bias, Plan plan,
                   float* out) {
  if (plan.tile > 1) {
    validate(kernels, a);
    std::vector<Tile> tiles;
    append_tiles(tiles, 0, n, plan.tile);
    return multiply(pool, kernels, a, tiles, plan, Rows{kernels, x, a.columns, bias, out, a.rows});
  }
  const std::vector<int64_t> starts = chunk_starts(a, plan.chunk);
  const int64_t chunks = static_cast<int64_t>(starts.size());
  Pool team = pool;
  const int64_t worth = a.nonzeros * n / (kWorkOfThread / 4) + 1;  // a gather is slower than a multiplication
  if (worth < team.threads) team.threads = static_cast<int>(worth);
  int64_t total = starts.empty() ? 0 : starts.back();
  for (int64_t row = (chunks - 1) * plan.chunk; chunks > 0 && row < a.rows; ++row) total += a.counts[row];
  if (total != a.nonzeros) validate(kernels, a);
  std::atomic<bool> in_range{true};
  for_tasks(team, chunks, [&](int, int64_t chunk) {
    const int64_t begin = chunk * plan.chunk, end = begin + plan.chunk < a.rows ? begin + plan.chunk : a.rows;
    for (int64_t i = 0; i < n; ++i)
      if (!kernels.dot(a, begin, end, starts[chunk], x + i * a.columns, bias, out + i * a.rows)) in_range = false;
  });
  if (!in_range) validate(kernels, a);
}

}  // namespace cram
