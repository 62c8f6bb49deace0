// The ops of sparse inference: schemas, checks, and their kernels for the CPU. cram_kernels/inference/ops.py says what they mean.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "../check.h"
#include "../cpu/torch_pool.h"
#include "product.h"

namespace cram {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kLargest = int64_t{1} << 28;  // rows, columns

// packed and layout, checked but for what is in them: validate() looks at that.
SparseMatrix matrix_of(const Check& check, const Tensor& packed, const Integers& layout, int64_t columns) {
  if (packed.scalar_type() != ScalarType::Byte || packed.dim() != 1 || !packed.is_contiguous())
    check.refuse("packed", "be a contiguous vector of " + show(ScalarType::Byte), show(packed.scalar_type()) + " of shape " + show(packed.sizes()));
  if (layout.size() != 5) check.refuse("layout", "have 5 numbers", std::to_string(layout.size()));
  SparseMatrix a{layout[0], layout[1], layout[2], layout[3], nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  const int64_t value_bytes = layout[4];
  if (a.rows < 0 || a.rows > kLargest || a.columns < 1 || a.columns > kLargest || a.block < 1 || a.block > kMaxBlock || a.section < kLanes ||
      a.section > kMaxSection || a.section % kLanes != 0 || (value_bytes != 2 && value_bytes != 4))
    check.refuse("layout", "be rows, columns, a block of 1 to 255, a section of 16 to 128, divisible by 16, and values of 2 or 4 bytes",
                 show(torch::headeronly::IntHeaderOnlyArrayRef(layout.data(), layout.size())));
  if (columns != a.columns) check.refuse("input", "meet " + std::to_string(a.columns) + " columns of the weight", std::to_string(columns));
  const int64_t bytes = packed.numel(), places = a.rows * a.blocks(), tables = 2 * places + a.all_slices(), step = kLanes * (value_bytes + 1);
  if (bytes < tables || (bytes - tables) % step != 0)
    check.refuse("packed", "have " + std::to_string(tables) + " bytes and " + std::to_string(step) + " a step", std::to_string(bytes));
  a.steps = (bytes - tables) / step;
  const char* memory = static_cast<const char*>(packed.data_ptr());
  if (reinterpret_cast<uintptr_t>(memory) % sizeof(float) != 0) check.refuse("packed", "begin at a multiple of 4 bytes", "another address");
  if (value_bytes == 4)
    a.values = reinterpret_cast<const float*>(memory);
  else
    a.half = reinterpret_cast<const uint16_t*>(memory);
  a.column = reinterpret_cast<const uint8_t*>(memory) + a.steps * kLanes * value_bytes;
  a.order = a.column + a.steps * kLanes;
  a.place = a.order + places;
  a.steps_of = a.place + places;
  return a;
}

const float* bias_of(const Check& check, const MaybeTensor& bias, int64_t rows) {
  if (!bias.has_value()) return nullptr;
  if (bias->scalar_type() != ScalarType::Float || bias->dim() != 1 || bias->numel() != rows || !bias->is_contiguous())
    check.refuse("bias", "be a contiguous vector of " + std::to_string(rows) + " float32", show(bias->scalar_type()) + " of shape " + show(bias->sizes()));
  return bias->const_data_ptr<float>();
}

void check_input(const Check& check, const Tensor& input) {
  if (input.scalar_type() != ScalarType::Float) check.refuse("input", "be float32", show(input.scalar_type()));
  if (!input.is_contiguous()) check.refuse("input", "be contiguous", "strides " + show(input.strides()));
}

// plan: (largest n, tile), ... by ascending n; the tile for n columns, or what usually is good where it says nothing of them.
int tile_of(const Check& check, const Integers& plan, int64_t n, int64_t smallest) {
  if (plan.size() % 2 != 0) check.refuse("plan", "have 2 numbers an entry", std::to_string(plan.size()));
  for (size_t i = 0; i < plan.size(); i += 2) {
    const int64_t tile = plan[i + 1];
    const bool known = tile == 8 || tile == 16 || tile == 32 || tile == 64 || tile == 128 || (tile == 1 && smallest == 1);
    if (!known) check.refuse("plan", "have a tile of 8, 16, 32, 64 or 128" + std::string(smallest == 1 ? ", or 1" : ""), std::to_string(tile));
    if (n <= plan[i]) return static_cast<int>(tile);
  }
  return n == 1 && smallest == 1 ? 1 : n <= 8 ? 8 : n <= 16 ? 16 : n <= 32 ? 32 : 64;
}

// What the product finds impossible is an argument of the op.
template <class Run>
void run(const char* op, Run product) {
  try {
    product();
  } catch (const std::invalid_argument& wrong) {
    throw std::runtime_error(std::string(op) + ": " + wrong.what());
  }
}

std::vector<int64_t> list(torch::headeronly::IntHeaderOnlyArrayRef sizes) { return {sizes.begin(), sizes.end()}; }

Tensor sparse_linear_cpu(const Tensor& input, const Tensor& packed, const MaybeTensor& bias, const Integers& layout, const Integers& plan) {
  Check check("sparse_linear");
  check_input(check, input);
  if (input.dim() < 1) check.refuse("input", "have 1 or more dims", "a scalar");
  std::vector<int64_t> shape = list(input.sizes());
  const SparseMatrix a = matrix_of(check, packed, layout, shape.back());
  const float* b = bias_of(check, bias, a.rows);
  const int64_t n = input.numel() / a.columns;
  const int tile = tile_of(check, plan, n, 1);
  shape.back() = a.rows;
  Tensor out = torch::stable::new_empty(input, shape);
  if (out.numel() == 0) return out;
  TorchContext torch;
  run("sparse_linear", [&] {
    sparse_linear(torch.context.pool, sparse_kernels(kernels().name), a, input.const_data_ptr<float>(), n, b, tile, out.mutable_data_ptr<float>());
  });
  return out;
}

Tensor sparse_conv2d_cpu(const Tensor& input, const Tensor& packed, const MaybeTensor& bias, const Integers& layout,
                         const Integers& kernel_size, const Integers& stride, const Integers& padding, const Integers& dilation, const Integers& plan) {
  Check check("sparse_conv2d");
  check_input(check, input);
  if (input.dim() != 4) check.refuse("input", "be [batch, channels, height, width]", "shape " + show(input.sizes()));
  const std::vector<int64_t> size = list(input.sizes());
  Convolution c{size[0], size[1], size[2], size[3], {}, {}, {}, {}};
  const struct {
    const char* name;
    const Integers& given;
    int64_t* to;
    int64_t least;
  } pairs[] = {{"kernel_size", kernel_size, c.kernel, 1}, {"stride", stride, c.stride, 1}, {"padding", padding, c.padding, 0}, {"dilation", dilation, c.dilation, 1}};
  for (const auto& pair : pairs) {
    if (pair.given.size() != 2) check.refuse(pair.name, "have 2 numbers", std::to_string(pair.given.size()));
    for (int axis = 0; axis < 2; ++axis) {
      if (pair.given[axis] < pair.least || pair.given[axis] > 65535)
        check.refuse(pair.name, "be from " + std::to_string(pair.least) + " to 65535", std::to_string(pair.given[axis]));
      pair.to[axis] = pair.given[axis];
    }
  }
  const int64_t window = c.kernel[0] * c.kernel[1];
  const SparseMatrix a = matrix_of(check, packed, layout, c.channels > kLargest ? c.channels : c.channels * window);
  const float* b = bias_of(check, bias, a.rows);
  const int64_t height = c.out_size(0), width = c.out_size(1);
  if (height < 1 || width < 1) check.refuse("input", "be at least as large as the kernel", "shape " + show(input.sizes()));
  const int tile = tile_of(check, plan, height * width, 8);
  Tensor out = torch::stable::new_empty(input, {c.batch, a.rows, height, width});
  if (out.numel() == 0) return out;
  TorchContext torch;
  run("sparse_conv2d", [&] {
    sparse_conv2d(torch.context.pool, sparse_kernels(kernels().name), a, c, input.const_data_ptr<float>(), b, tile, out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_FRAGMENT(cram_kernels, m) {
  m.def("sparse_linear(Tensor input, Tensor packed, Tensor? bias, int[] layout, int[] plan) -> Tensor");
  m.def(
      "sparse_conv2d(Tensor input, Tensor packed, Tensor? bias, int[] layout, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int[] plan) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&cram::sparse_linear_cpu));
  m.impl("sparse_conv2d", TORCH_BOX(&cram::sparse_conv2d_cpu));
}
