// The sparse products of inference without torch: each SIMD level and tile, with 1 and with 4 threads, against a plain sum in double.
#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "../../csrc/cpu/simd.h"
#include "../../csrc/sparse/product.h"

namespace {

using namespace cram;

// Exactly as large as their contents: a stray access is seen.
struct Weight {
  std::vector<float> dense, values;
  std::vector<uint16_t> half;  // the same values, which bfloat16 can express
  std::vector<uint8_t> column, order, place, steps_of;
  int64_t rows, columns, block, section;
  SparseMatrix matrix(bool as_half) const {
    SparseMatrix a{rows, columns, block, section, nullptr, nullptr, column.data(), order.data(), place.data(), steps_of.data(), 0};
    a.values = as_half ? nullptr : values.data();
    a.half = as_half ? half.data() : nullptr;
    a.steps = static_cast<int64_t>(values.size()) / kLanes;
    return a;
  }
};

float bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits &= 0xffff0000;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

Weight make(int64_t rows, int64_t columns, int64_t block, double density, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::bernoulli_distribution kept(density);
  Weight w{std::vector<float>(static_cast<size_t>(rows * columns)), {}, {}, {}, {}, {}, {}, rows, columns, block, 64};
  for (float& v : w.dense) v = kept(random) ? bfloat16(normal(random)) : 0.0f;
  for (int64_t top = 0; top < rows; top += w.section)
    for (int64_t left = 0; left < columns; left += w.block) {
      const int64_t here = std::min(w.section, rows - top), right = std::min(left + w.block, columns);
      std::vector<std::vector<uint8_t>> kept_columns(static_cast<size_t>(here));
      for (int64_t r = 0; r < here; ++r)
        for (int64_t c = left; c < right; ++c)
          if (w.dense[(top + r) * columns + c] != 0) kept_columns[r].push_back(static_cast<uint8_t>(c - left));
      std::vector<uint8_t> order(static_cast<size_t>(here)), place(static_cast<size_t>(here));
      for (int64_t r = 0; r < here; ++r) order[r] = static_cast<uint8_t>(r);
      std::stable_sort(order.begin(), order.end(), [&](uint8_t a, uint8_t b) { return kept_columns[a].size() > kept_columns[b].size(); });
      for (int64_t r = 0; r < here; ++r) place[order[r]] = static_cast<uint8_t>(r);
      w.order.insert(w.order.end(), order.begin(), order.end());
      w.place.insert(w.place.end(), place.begin(), place.end());
      for (int64_t first = 0; first < here; first += kLanes) {
        const size_t steps = kept_columns[order[first]].size();
        w.steps_of.push_back(static_cast<uint8_t>(steps));
        for (size_t step = 0; step < steps; ++step)
          for (int64_t i = first; i < first + kLanes; ++i) {
            const bool full = i < here && step < kept_columns[order[i]].size();
            w.column.push_back(full ? kept_columns[order[i]][step] : static_cast<uint8_t>(w.block));
            w.values.push_back(full ? w.dense[(top + order[i]) * columns + left + w.column.back()] : 0.0f);
          }
      }
    }
  for (float v : w.values) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    w.half.push_back(static_cast<uint16_t>(bits >> 16));
  }
  w.values.shrink_to_fit(), w.half.shrink_to_fit(), w.column.shrink_to_fit();
  w.order.shrink_to_fit(), w.place.shrink_to_fit(), w.steps_of.shrink_to_fit();
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

bool linear_is_right(const Pool& pool, const SparseKernels& kernels, int tile, int64_t block, bool half, std::mt19937& random) {
  const Weight w = make(300, 330, block, 0.2, random);
  const int64_t n = 77, rows = 300;
  const std::vector<float> x = numbers(n * w.columns, random), bias = numbers(rows, random);
  std::vector<float> out(static_cast<size_t>(n * rows));
  sparse_linear(pool, kernels, w.matrix(half), x.data(), n, bias.data(), tile, out.data());
  bool right = true;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bias[r], magnitudes = std::fabs(bias[r]);
      for (int64_t k = 0; k < w.columns; ++k) {
        const double term = static_cast<double>(w.dense[r * w.columns + k]) * x[i * w.columns + k];
        sum += term, magnitudes += std::fabs(term);
      }
      right &= close(out[i * rows + r], sum, magnitudes, w.columns);
    }
  }
  return right;
}

bool convolution_is_right(const Pool& pool, const SparseKernels& kernels, int tile, std::mt19937& random) {
  const Convolution c{3, 20, 23, 21, {3, 2}, {2, 1}, {1, 1}, {1, 2}};
  const int64_t rows = 70, height = c.out_size(0), width = c.out_size(1);
  const Weight w = make(rows, c.channels * 6, 48, 0.2, random);
  const std::vector<float> x = numbers(c.batch * c.channels * c.height * c.width, random);
  std::vector<float> out(static_cast<size_t>(c.batch * rows * height * width));
  sparse_conv2d(pool, kernels, w.matrix(false), c, x.data(), std::vector<float>(static_cast<size_t>(rows)).data(), tile, out.data());
  bool right = true;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t oy = 0; oy < height; ++oy)
        for (int64_t ox = 0; ox < width; ++ox) {
          double sum = 0, magnitudes = 0;
          for (int64_t k = 0; k < w.columns; ++k) {
            const int64_t y = oy * 2 - 1 + k % 6 / 2, xx = ox - 1 + k % 2 * 2;
            if (y < 0 || y >= c.height || xx < 0 || xx >= c.width) continue;
            const double term = static_cast<double>(w.dense[r * w.columns + k]) * x[((b * c.channels + k / 6) * c.height + y) * c.width + xx];
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
  std::vector<const SparseKernels*> all;
  for (const std::string& level : simd_levels()) all.push_back(&sparse_kernels(level.c_str()));
#if defined(__x86_64__)
  if (simd_levels().back() == "avx512") all.insert(all.end(), {&sparse_avx512(false), &sparse_avx512(true)});  // of CPUs that permute no bytes
#endif
  for (const SparseKernels* kernels : all)
    for (int threads : {1, 4})
      for (int tile : {1, 8, 16, 32, 64, 128}) {
        std::mt19937 random(7);
        const Pool pool{threads, run_threads};
        bool right = tile == 1 || convolution_is_right(pool, *kernels, tile, random);
        for (int64_t block : {48, 127, 255})
          for (bool half : {false, true}) right = right && linear_is_right(pool, *kernels, tile, block, half, random);
        ++checks;
        failures += !right;
        if (!right) printf("FAILED: sparse product, %s, %d threads, tile %d\n", kernels->name, threads, tile);
      }
  return failures;
}
