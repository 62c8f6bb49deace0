// Products of a sparse matrix: cut into tasks that threads claim. Torch-free.
#pragma once

#include <cstring>
#include <vector>

#include "../cpu/parallel.h"
#include "matrix.h"

namespace cram {

const SparseKernels& sparse_kernels(const char* level);  // of a name in simd_levels()

// out[n, rows] = x[n, columns] * matrix^T + bias[rows]. tile: how many rows of x are handled together: 8, 16, 32, 64 or 128, or 1 for another kernel.
void sparse_linear(const Pool&, const SparseKernels&, const SparseMatrix&, const float* x, int64_t n, const float* bias, int tile, float* out);

struct Convolution {
  int64_t batch, channels, height, width;  // of the input, contiguous
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t out_size(int axis) const {
    const int64_t size = (axis == 0 ? height : width) + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    return size < 0 ? 0 : size / stride[axis] + 1;
  }
};

// The matrix is the weight [out_channels, channels * kernel[0] * kernel[1]]; out: [batch, out_channels, out_size(0), out_size(1)].
// tile: how many output positions are handled together, 8 to 128.
void sparse_conv2d(const Pool&, const SparseKernels&, const SparseMatrix&, const Convolution&, const float* x, const float* bias, int tile, float* out);

// Throw std::invalid_argument, which says what, where a number in the matrix would lead out of it. The columns are looked at piece by piece,
// just before they are used, which also brings them into the cache.
void validate(const SparseKernels&, const SparseMatrix&);
void validate(const SparseKernels&, const SparseMatrix&, const Piece&);
void validate_order(const SparseKernels&, const Piece&);  // each row once, where the places of rows are within the section

// The first step of every (section, block), in the order of their storage.
std::vector<int64_t> piece_starts(const SparseMatrix&);

Piece piece_of(const SparseMatrix&, const std::vector<int64_t>& starts, int64_t section, int64_t block);
int64_t steps_of(const Piece&);
Piece widened(const SparseKernels&, const Piece&);  // bfloat16 values as float, in this thread's memory

// The columns [first, first + valid) of a dense matrix, or less than a tile of them.
struct Tile {
  int64_t image, first;
  int width;
  int64_t valid;
};

// n columns in tiles of at most `tile`; what is left over is cut into narrower ones, unless little would be padded.
void append_tiles(std::vector<Tile>&, int64_t image, int64_t n, int tile);

// A bit for each column of a tile.
struct Bits {
  uint64_t word[2] = {0, 0};
  void set(int64_t begin, int64_t end) {
    for (int64_t w = 0; w < 2; ++w) {
      const int64_t first = begin < 64 * w ? 0 : begin - 64 * w, stop = end > 64 * w + 64 ? 64 : end - 64 * w;
      if (first < stop) word[w] |= ~uint64_t{0} >> (64 - (stop - first)) << first;
    }
  }
  // `lanes`, at most 16, from `first` on.
  uint16_t of(int64_t first, int64_t lanes) const {
    uint64_t found = word[first / 64] >> first % 64;
    if (first > 48 && first < 64) found |= word[1] << (64 - first);
    return static_cast<uint16_t>(found & ((uint64_t{1} << lanes) - 1));
  }
};

// Memory of a thread that stays for its next call; numbers are 64-byte aligned.
struct Scratch {
  float* panel(int64_t floats) { return grown(panel_, floats); }
  float* sums(int64_t floats) { return grown(sums_, floats); }
  float* values(int64_t floats) { return grown(values_, floats); }
  std::vector<Run> runs;
  std::vector<Bits> bits;
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  static float* grown(std::vector<float>& memory, int64_t floats) {
    if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(static_cast<size_t>(floats) + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  std::vector<float> panel_, sums_, values_;
};

// Work is counted in units of about 1/80 ns. A stored number is decoded once for a tile, then multiplied by each of its columns. To copy a number
// takes about as long as to multiply one in a single column.
inline int64_t work_of(int64_t stored, int width) { return stored * (width == 1 ? 7 : 12 + width); }

// So many threads that each has enough to do to be worth handing it over, which takes torch's pool 3 to 6 us: 10 us.
inline Pool team_of(Pool pool, int64_t work) {
  const int64_t worth = work / 800000 + 1;
  if (worth < pool.threads) pool.threads = static_cast<int>(worth);
  return pool;
}

// Where a block of results goes: `to` is null where they have to be rearranged.
struct Target {
  float* to;
  int64_t stride;
  bool stream;
};

// b.prepare(tile), then b.pack(tile, k_begin, k_end, panel) copies a block of the dense matrix; b.target(tile, row) is where results of a row and
// those behind it go as they are; where it is nowhere, b.unpack(tile, row_begin, row_end, sums) stores them.
template <class Dense>
void multiply(const Pool& pool, const SparseKernels& kernels, const SparseMatrix& a, const std::vector<Tile>& tiles, int widest, const float* bias,
              const Dense& b) {
  validate(kernels, a);
  const std::vector<int64_t> starts = piece_starts(a);
  const int64_t sections = a.sections(), blocks = a.blocks(), units = static_cast<int64_t>(tiles.size()) * sections;
  int64_t work = 0;
  for (const Tile& tile : tiles) work += work_of(a.steps * kLanes, tile.width);
  const Pool team = team_of(pool, work);
  // Where several sections pass over a tile, it is packed once, else block by block, to stay in the first-level cache.
  const bool whole = sections > 1;
  struct alignas(64) Worker {
    int64_t packed = -1;             // the tile that is packed in its memory
    std::vector<bool> is_validated;  // of each section
  };
  std::vector<Worker> workers(static_cast<size_t>(team.threads));
  // Neighbours share a tile, which is then packed by few. A layer's results lie as its tiles do: the next layer finds them in the same thread's cache.
  for_stretches(team, units, [&](int worker, int64_t unit) {
    Scratch& scratch = Scratch::mine();
    float* sums = scratch.sums(a.section * widest);
    float* panels = scratch.panel((whole ? blocks : 1) * (a.block + 1) * widest);
    Worker& own = workers[static_cast<size_t>(worker)];
    own.is_validated.resize(static_cast<size_t>(sections));
    const int64_t section = unit % sections, row = section * a.section, rows = a.rows_of(section);
    const Tile& tile = tiles[unit / sections];
    const auto pack = [&](int64_t block, float* panel) {
      const int64_t k = block * a.block, k_end = k + a.block < a.columns ? k + a.block : a.columns;
      b.pack(tile, k, k_end, panel);
      memset(panel + (k_end - k) * tile.width, 0, static_cast<size_t>((a.block + 1 - (k_end - k)) * tile.width) * sizeof(float));
    };
    if (own.packed != unit / sections) {
      own.packed = unit / sections;
      b.prepare(tile);
      for (int64_t block = 0; whole && block < blocks; ++block) pack(block, panels + block * (a.block + 1) * tile.width);
    }
    const Target target = b.target(tile, row);
    for (int64_t block = 0; block < blocks; ++block) {
      float* panel = panels + (whole ? block * (a.block + 1) * tile.width : 0);
      if (!whole) pack(block, panel);
      Sums s{bias + row, block == 0, sums, tile.width, sums, tile.width, false};
      if (block == blocks - 1 && target.to != nullptr) s.to = target.to, s.to_stride = target.stride, s.stream = target.stream;
      const Piece piece = piece_of(a, starts, section, block);
      if (!own.is_validated[section]) validate(kernels, a, piece), validate_order(kernels, piece);
      kernels.accumulate(tile.width, widened(kernels, piece), panel, s);
    }
    own.is_validated[section] = true;
    if (target.to == nullptr) b.unpack(tile, row, row + rows, sums);
  });
}

}  // namespace cram
