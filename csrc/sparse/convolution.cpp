// A convolution as a sparse product. The dense matrix has a row for each (channel, kernel row, kernel column) and a column for each output
// position; a tile of it is contiguous in the padded input, since output positions are counted with the padded input's row length. The few
// positions beyond each output row are computed and dropped. A stride takes the input apart into its phases first.
#include <algorithm>

#include "product.h"

namespace cram {
namespace {

// An output larger than this is written past the caches: the lines that are written need not be read then.
constexpr int64_t kBeyondCache = 1 << 20;

struct Image {
  const SparseKernels& kernels;
  const float* padded;  // [batch, phases[0], phases[1], channels, rows, length]
  int64_t image_size, length;
  const int64_t* offsets;  // of each row of the dense matrix
  float* out;
  int64_t out_channels, out_height, out_width;

  void pack(const Tile& tile, int64_t begin, int64_t end, float* panel) const {
    kernels.gather_rows(tile.width, padded + tile.image * image_size + tile.first, offsets + begin, end - begin, tile.valid, panel);
  }

  float* place(const Tile& tile, int64_t row) const { return out + (tile.image * out_channels + row) * out_height * out_width; }

  // A whole tile goes where it belongs as it is, where rows of the output are as long as those of the input.
  Target target(const Tile& tile, int64_t row) const {
    const int64_t plane = out_height * out_width;
    if (length != out_width || tile.valid != tile.width) return {nullptr, 0, false};
    float* to = place(tile, row) + tile.first;
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && plane % 16 == 0;
    return {to, plane, aligned && out_channels * plane * static_cast<int64_t>(sizeof(float)) > kBeyondCache};
  }

  void unpack(const Tile& tile, int64_t begin, int64_t end, const float* sums) const {
    const int64_t plane = out_height * out_width, stop = tile.first + tile.valid;
    float* to = place(tile, begin);
    for (int64_t at = tile.first; at < stop;) {
      const int64_t y = at / length, x = at - y * length, row_end = y * length + out_width < stop ? y * length + out_width : stop;
      if (row_end > at) kernels.copy_rows(sums + at - tile.first, tile.width, end - begin, row_end - at, to + y * out_width + x, plane);
      at = (y + 1) * length;
    }
  }
};

// a / b, rounded up; 0 where a is negative.
int64_t ceiling(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

}  // namespace

void sparse_conv2d(const Pool& pool, const SparseKernels& kernels, const SparseMatrix& a, const Convolution& c, const float* x, const float* bias,
                   int tile, float* out) {
  const int64_t out_height = c.out_size(0), out_width = c.out_size(1);
  int64_t phases[2], size[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = (c.kernel[axis] - 1) * c.dilation[axis] + 1, padded = (axis == 0 ? c.height : c.width) + 2 * c.padding[axis];
    phases[axis] = reach < c.stride[axis] ? reach : c.stride[axis];
    size[axis] = (padded + c.stride[axis] - 1) / c.stride[axis];
  }
  const int64_t plane = size[0] * size[1], image_size = phases[0] * phases[1] * c.channels * plane;
  std::vector<int64_t> window, offsets;  // of the window's places in the first channel, and of all channels
  for (int64_t ky = 0; ky < c.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < c.kernel[1]; ++kx) {
      const int64_t y = ky * c.dilation[0], x = kx * c.dilation[1];
      const int64_t phase = y % c.stride[0] * phases[1] + x % c.stride[1];
      window.push_back(phase * c.channels * plane + y / c.stride[0] * size[1] + x / c.stride[1]);
    }
  offsets.reserve(static_cast<size_t>(a.columns));
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t place : window) offsets.push_back(channel * plane + place);
  const bool as_it_is = c.stride[0] == 1 && c.stride[1] == 1 && c.padding[0] == 0 && c.padding[1] == 0;
  static thread_local std::vector<float> memory;  // stays for the next call, as all layers of a network want it
  const float* padded = x;
  if (!as_it_is) {
    if (static_cast<int64_t>(memory.size()) < c.batch * image_size) memory.resize(static_cast<size_t>(c.batch * image_size));
    float* to = memory.data();
    padded = to;
    for_tasks(team_of(pool, work_of(c.batch * image_size, 1)), c.batch * c.channels, [&](int, int64_t task) {
      const int64_t image = task / c.channels, channel = task % c.channels;
      for (int64_t phase = 0; phase < phases[0] * phases[1]; ++phase) {
        // Row r of the phase is row r * stride + top of the image: those in [first, stop) are there, the others are padding.
        const int64_t top = phase / phases[1] - c.padding[0], left = phase % phases[1] - c.padding[1], above = ceiling(-top, c.stride[0]);
        const int64_t first = above < size[0] ? above : size[0], below = ceiling(c.height - top, c.stride[0]);
        const int64_t stop = below < first ? first : below < size[0] ? below : size[0];
        float* own = to + image * image_size + (phase * c.channels + channel) * plane;
        std::fill(own, own + first * size[1], 0.0f);
        const float* from = x + (task * c.height + first * c.stride[0] + top) * c.width;
        kernels.split_rows(from, c.width, c.stride[1], c.stride[0] * c.width, left, stop - first, own + first * size[1], size[1]);
        std::fill(own + stop * size[1], own + plane, 0.0f);
      }
    });
  }
  std::vector<Tile> tiles;
  for (int64_t image = 0; image < c.batch; ++image) append_tiles(tiles, image, (out_height - 1) * size[1] + out_width, tile);
  multiply(pool, kernels, a, tiles, tile, bias, Image{kernels, padded, image_size, size[1], offsets.data(), out, a.rows, out_height, out_width});
}

}  // namespace cram
