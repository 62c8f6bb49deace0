// Products of a sparse matrix: cut into tasks that threads claim. Torch-free.
#pragma once

#include <vector>

#include "../cpu/parallel.h"
#include "matrix.h"

namespace cram {

const SparseKernels& sparse_kernels(const char* level);  // of a name in simd_levels()

// out[n, rows] = x[n, columns] * matrix^T + bias.
void sparse_linear(const Pool&, const SparseKernels&, const SparseMatrix&, const float* x, int64_t n, const float* bias, Plan, float* out);

struct Convolution {
  int64_t batch, channels, height, width;  // of the input, contiguous
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t out_size(int axis) const {
    const int64_t size = (axis == 0 ? height : width) + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    return size < 0 ? 0 : size / stride[axis] + 1;
  }
};

// The matrix is the weight [out_channels, channels * kernel[0] * kernel[1]]; out: [batch, out_channels, out_size(0), out_size(1)].
void sparse_conv2d(const Pool&, const SparseKernels&, const SparseMatrix&, const Convolution&, const float* x, const float* bias, Plan, float* out);

// Throws std::invalid_argument, which says what, where counts or columns are impossible.
void validate(const SparseKernels&, const SparseMatrix&);

// The columns [first, first + valid) of a dense matrix, or less than a tile of them.
struct Tile {
  int64_t image, first;
  int width;
  int64_t valid;
};

// n columns in tiles of at most `tile`; what is left over is cut into narrower ones, unless little would be padded.
void append_tiles(std::vector<Tile>&, int64_t image, int64_t n, int tile);

// Memory of a thread, 64-byte aligned, that stays for its next call.
struct Scratch {
  std::vector<uint32_t> stops, cursors;
  float* panel(int64_t floats) { return grown(panel_, floats); }
  float* sums(int64_t floats) { return grown(sums_, floats); }
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  static float* grown(std::vector<float>& memory, int64_t floats) {
    if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(static_cast<size_t>(floats) + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  std::vector<float> panel_, sums_;
};

// Where each row of [begin, end) ends, behind the first non-zero of the first one; stops[0] is 0.
void row_stops(const SparseMatrix&, int64_t begin, int64_t end, std::vector<uint32_t>& stops);

// The number of the first non-zero of every `chunk`-th row.
std::vector<int64_t> chunk_starts(const SparseMatrix&, int64_t chunk);

constexpr int64_t kWorkOfThread = 200000;  // multiplications that are worth waking a thread for

// b.pack(tile, k_begin, k_end, panel) copies a block of the dense matrix, b.unpack(tile, row_begin, row_end, sums) stores a block of results.
template <class Dense>
void multiply(const Pool& pool, const SparseKernels& kernels, const SparseMatrix& a, const std::vector<Tile>& tiles, Plan plan, const Dense& b) {
  const std::vector<int64_t> starts = chunk_starts(a, plan.chunk);
  const int64_t chunks = static_cast<int64_t>(starts.size()), all = static_cast<int64_t>(tiles.size());
  int64_t columns = 0;
  for (const Tile& tile : tiles) columns += tile.width;
  Pool team = pool;
  const int64_t worth = a.nonzeros * columns / kWorkOfThread + 1;
  if (worth < team.threads) team.threads = static_cast<int>(worth);
  int64_t group = (all * chunks + 4 * team.threads - 1) / (4 * team.threads);  // tiles a task: about 4 tasks a thread
  group = team.threads == 1 || group > all ? all : group < 1 ? 1 : group;
  const int64_t groups = (all + group - 1) / group, k_block = plan.k_block < a.columns ? plan.k_block : a.columns;
  for_tasks(team, groups * chunks, [&](int, int64_t task) {
    Scratch& scratch = Scratch::mine();
    const int64_t chunk = task / groups, row = chunk * plan.chunk, end = row + plan.chunk < a.rows ? row + plan.chunk : a.rows, rows = end - row;
    float* sums = scratch.sums(rows * plan.tile);
    float* panel = scratch.panel(k_block * plan.tile);
    row_stops(a, row, end, scratch.stops);
    const uint32_t* stops = scratch.stops.data();
    const int64_t last = (task % groups + 1) * group < all ? (task % groups + 1) * group : all;
    for (int64_t t = task % groups * group; t < last; ++t) {
      const Tile& tile = tiles[t];
      scratch.cursors.assign(stops, stops + rows);
      for (int64_t k = 0; k < a.columns; k += k_block) {
        const int64_t k_end = k + k_block < a.columns ? k + k_block : a.columns;
        b.pack(tile, k, k_end, panel);
        kernels.accumulate(tile.width, a, starts[chunk], scratch.cursors.data(), stops + 1, rows, panel, k, k_end, sums);
      }
      b.unpack(tile, row, end, sums);
    }
  });
}

}  // namespace cram
