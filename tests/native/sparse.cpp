// The sparse products of inference without torch: each SIMD level and tile, with 1 and with 4 threads, against a plain sum in double.
#include "sparse.h"

#include <cmath>
#include <cstdio>
#include <random>

#include "../../csrc/cpu/simd.h"
#include "../../csrc/sparse/product.h"

namespace {

using namespace cram;

// Exactly as large as their contents: a stray access is seen.
struct Weight {
  std::vector<float> values;
  std::vector<uint16_t> column, counts;
  int64_t columns;
  SparseMatrix matrix() const {
    return {static_cast<int64_t>(counts.size()), columns, values.data(), column.data(), counts.data(), static_cast<int64_t>(values.size())};
  }
};

Weight make(int64_t rows, int64_t columns, double density, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::bernoulli_distribution kept(density);
  Weight w{{}, {}, {}, columns};
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t count = 0;
    for (int64_t c = 0; c < columns; ++c)
      if (kept(random)) w.values.push_back(normal(random)), w.column.push_back(static_cast<uint16_t>(c)), ++count;
    w.counts.push_back(count);
  }
  w.values.shrink_to_fit(), w.column.shrink_to_fit();
  return w;
}

std::vector<float> numbers(int64_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

bool close(float actual, double expected, double magnitudes, int64_t terms) {
  return std::fabs(actual - expected) <= static_cast<double>(terms + 2) * std::ldexp(1.0, -24) * magnitudes * 1.001;
}

bool linear_is_right(const Pool& pool, const SparseKernels& kernels, Plan plan, std::mt19937& random) {
  const Weight w = make(300, 130, 0.2, random);
  const int64_t n = 77, rows = 300;
  const std::vector<float> x = numbers(n * w.columns, random), bias = numbers(rows, random);
  std::vector<float> out(static_cast<size_t>(n * rows));
  sparse_linear(pool, kernels, w.matrix(), x.data(), n, bias.data(), plan, out.data());
  bool right = true;
  for (int64_t i = 0; i < n; ++i) {
    size_t at = 0;
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bias[r], magnitudes = std::fabs(bias[r]);
      for (uint16_t j = 0; j < w.counts[r]; ++j, ++at) {
        const double term = static_cast<double>(w.values[at]) * x[i * w.columns + w.column[at]];
        sum += term, magnitudes += std::fabs(term);
      }
      right &= close(out[i * rows + r], sum, magnitudes, w.columns);
    }
  }
  return right;
}

bool convolution_is_right(const Pool& pool, const SparseKernels& kernels, Plan plan, std::mt19937& random) {
  const Convolution c{3, 20, 23, 21, {3, 2}, {2, 1}, {1, 1}, {1, 2}};
  const int64_t rows = 70, height = c.out_size(0), width = c.out_size(1);
  const Weight w = make(rows, c.channels * 6, 0.2, random);
  const std::vector<float> x = numbers(c.batch * c.channels * c.height * c.width, random);
  std::vector<float> out(static_cast<size_t>(c.batch * rows * height * width));
  sparse_conv2d(pool, kernels, w.matrix(), c, x.data(), nullptr, plan, out.data());
  bool right = true;
  for (int64_t b = 0; b < c.batch; ++b) {
    size_t start = 0;
    for (int64_t r = 0; r < rows; start += w.counts[r], ++r)
      for (int64_t oy = 0; oy < height; ++oy)
        for (int64_t ox = 0; ox < width; ++ox) {
          double sum = 0, magnitudes = 0;
          for (size_t at = start; at < start + w.counts[r]; ++at) {
            const int64_t k = w.column[at], y = oy * 2 - 1 + k % 6 / 2, xx = ox - 1 + k % 2 * 2;
            if (y < 0 || y >= c.height || xx < 0 || xx >= c.width) continue;
            const double term = static_cast<double>(w.values[at]) * x[((b * c.channels + k / 6) * c.height + y) * c.width + xx];
            sum += term, magnitudes += std::fabs(term);
          }
          right &= close(out[((b * rows + r) * height + oy) * width + ox], sum, magnitudes, w.columns);
        }
  }
  return right;
}

}  // namespace

int sparse_failures(void (*run_threads)(int, void (*)(void*, int), void*), int& checks) {
  int failures = 0;
  for (const std::string& level : simd_levels())
    for (int threads : {1, 4})
      for (int tile : {1, 8, 16, 32, 64, 128}) {
        std::mt19937 random(7);
        const Pool pool{threads, run_threads};
        const Plan plan{tile, 48, 64};
        const SparseKernels& kernels = sparse_kernels(level.c_str());
        const bool right = linear_is_right(pool, kernels, plan, random) && (tile == 1 || convolution_is_right(pool, kernels, plan, random));
        ++checks;
        failures += !right;
        if (!right) printf("FAILED: sparse product, %s, %d threads, tile %d\n", level.c_str(), threads, tile);
      }
  return failures;
}
