// A convolution as a sparse product. The dense matrix has a row for each (channel, kernel row, kernel column) and a column for each output
// position. It is never made as a whole: a tile of its columns is gathered from the image, with zeros where the window reaches beyond it. No
// padded copy of the image is made, either: threads would share it, and to write a cache line that another core has read takes some 28 ns
// (Zen 4), as long as 16 multiplications of it.
#include "product.h"

namespace cram {
namespace {

// An output larger than this is written past the caches: the lines that are written need not be read then.
constexpr int64_t kBeyondCache = 1 << 20;

struct Image {
  const SparseKernels& kernels;
  const Convolution& c;
  const float* x;
  float* out;
  int64_t out_channels, out_height, out_width;

  // Of an axis, the first output position where a place of the window is within the image, or from where on it is beyond it.
  int64_t border(int axis, int64_t place, int64_t size) const {
    const int64_t at = size - place * c.dilation[axis] + c.padding[axis];
    return at <= 0 ? 0 : (at + c.stride[axis] - 1) / c.stride[axis];
  }

  // The runs of all places of the window, for the columns of a tile.
  void prepare(const Tile& tile) const {
    Scratch& scratch = Scratch::mine();
    std::vector<Run>& runs = scratch.runs;
    runs.clear();
    const int64_t stop = tile.first + tile.valid;
    // Where an output row is as long as an input row, runs go on from row to row, else they end with the row.
    const bool on = c.stride[0] == 1 && c.stride[1] == 1 && out_width == c.width;
    std::vector<Bits>& there = scratch.bits;
    there.assign(static_cast<size_t>(c.kernel[0] + c.kernel[1]), Bits());
    for (int64_t at = tile.first; at < stop;) {
      const int64_t y = at / out_width, x0 = at - y * out_width, row_end = y * out_width + out_width < stop ? y * out_width + out_width : stop;
      const int64_t x1 = x0 + row_end - at, own = at - tile.first;
      for (int64_t ky = 0; ky < c.kernel[0]; ++ky) {
        const int64_t from = y * c.stride[0] + ky * c.dilation[0] - c.padding[0];
        if (from >= 0 && from < c.height) there[ky].set(own, own + x1 - x0);
      }
      for (int64_t kx = 0; kx < c.kernel[1]; ++kx) {
        const int64_t low = border(1, kx, 0), high = border(1, kx, c.width), first = low > x0 ? low : x0, last = high < x1 ? high : x1;
        if (first < last) there[c.kernel[0] + kx].set(own + first - x0, own + last - x0);
      }
      at = row_end;
    }
    for (int64_t ky = 0; ky < c.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < c.kernel[1]; ++kx) {
        const Bits &in_y = there[ky], &in_x = there[c.kernel[0] + kx];
        for (int64_t at = 0; at < tile.width;) {
          const int64_t position = tile.first + at, y = position / out_width, x0 = position - y * out_width;
          int64_t lanes = tile.width - at < kLanes ? tile.width - at : kLanes;
          if (!on && position < stop && lanes > out_width - x0) lanes = out_width - x0;
          if (!on && position < stop && lanes > stop - position) lanes = stop - position;
          const int64_t from = (y * c.stride[0] + ky * c.dilation[0] - c.padding[0]) * c.width + x0 * c.stride[1] + kx * c.dilation[1] - c.padding[1];
          const auto both = static_cast<uint16_t>(in_y.of(at, lanes) & in_x.of(at, lanes));
          runs.push_back({from, static_cast<int32_t>(at), static_cast<uint16_t>(lanes), both});
          at += lanes;
        }
      }
  }

  void pack(const Tile& tile, int64_t begin, int64_t end, float* panel) const {
    const std::vector<Run>& runs = Scratch::mine().runs;
    const int64_t plane = c.height * c.width, places = c.kernel[0] * c.kernel[1];
    const View view{x + tile.image * c.channels * plane, plane, places, c.stride[1], runs.data(), static_cast<int64_t>(runs.size()) / places};
    kernels.gather(view, begin, end, tile.width, panel);
  }

  float* place(const Tile& tile, int64_t row) const { return out + (tile.image * out_channels + row) * out_height * out_width + tile.first; }

  Target target(const Tile& tile, int64_t row) const {
    const int64_t plane = out_height * out_width;
    if (tile.valid != tile.width) return {nullptr, 0, false};
    float* to = place(tile, row);
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && plane % 16 == 0;
    return {to, plane, aligned && out_channels * plane * static_cast<int64_t>(sizeof(float)) > kBeyondCache};
  }

  void unpack(const Tile& tile, int64_t begin, int64_t end, const float* sums) const {
    kernels.copy_rows(sums, tile.width, end - begin, tile.valid, place(tile, begin), out_height * out_width);
  }
};

}  // namespace

void sparse_conv2d(const Pool& pool, const SparseKernels& kernels, const SparseMatrix& a, const Convolution& c, const float* x, const float* bias,
                   int tile, float* out) {
  const int64_t out_height = c.out_size(0), out_width = c.out_size(1);
  std::vector<Tile> tiles;
  for (int64_t image = 0; image < c.batch; ++image) append_tiles(tiles, image, out_height * out_width, tile);
  multiply(pool, kernels, a, tiles, tile, bias, Image{kernels, c, x, out, a.rows, out_height, out_width});
}

}  // namespace cram
