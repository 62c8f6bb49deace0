// A convolution as a sparse product. The dense matrix has a row for each (channel, kernel row, kernel column) and a column for each output
// position; a tile of it is contiguous in the padded input, since output positions are counted with the padded input's row length. The few
// positions beyond each output row are computed and dropped. A stride takes the input apart into its phases first.
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
  std::vector<int64_t> offsets;
  offsets.reserve(static_cast<size_t>(a.columns));
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t ky = 0; ky < c.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < c.kernel[1]; ++kx) {
        const int64_t y = ky * c.dilation[0], x = kx * c.dilation[1];
        const int64_t phase = y % c.stride[0] * phases[1] + x % c.stride[1];
        offsets.push_back((phase * c.channels + channel) * plane + y / c.stride[0] * size[1] + x / c.stride[1]);
      }
  const bool as_it_is = c.stride[0] == 1 && c.stride[1] == 1 && c.padding[0] == 0 && c.padding[1] == 0;
  static thread_local std::vector<float> memory;  // stays for the next call, as all layers of a network want it
  const float* padded = x;
  if (!as_it_is) {
    if (static_cast<int64_t>(memory.size()) < c.batch * image_size) memory.resize(static_cast<size_t>(c.batch * image_size));
    float* to = memory.data();
    padded = to;
    Pool team = pool;
    if (c.batch * image_size < kWorkOfThread) team.threads = 1;
    for_tasks(team, c.batch * c.channels, [&](int, int64_t task) {
      const int64_t image = task / c.channels, channel = task % c.channels;
      for (int64_t phase = 0; phase < phases[0] * phases[1]; ++phase)
        for (int64_t row = 0; row < size[0]; ++row) {
          const int64_t y = row * c.stride[0] + phase / phases[1] - c.padding[0];
          float* line = to + image * image_size + (phase * c.channels + channel) * plane + row * size[1];
          if (y < 0 || y >= c.height)
            memset(line, 0, static_cast<size_t>(size[1]) * sizeof(float));
          else
            kernels.split_row(x + (task * c.height + y) * c.width, c.width, c.stride[1], phase % phases[1] - c.padding[1], line, size[1]);
        }
    });
  }
  std::vector<Tile> tiles;
  for (int64_t image = 0; image < c.batch; ++image) append_tiles(tiles, image, (out_height - 1) * size[1] + out_width, tile);
  multiply(pool, kernels, a, tiles, tile, bias, Image{kernels, padded, image_size, size[1], offsets.data(), out, a.rows, out_height, out_width});
}

}  // namespace cram
