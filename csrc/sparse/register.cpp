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

// The arguments that describe the matrix, checked but for what is in them: validate() looks at that.
SparseMatrix matrix_of(const Check& check, const Tensor& values, const Tensor& columns, const Tensor& counts, int64_t width) {
  const auto vector_of = [&](const char* name, const Tensor& t, ScalarType dtype) {
    if (t.scalar_type() != dtype || t.dim() != 1 || !t.is_contiguous())
      check.refuse(name, "be a contiguous vector of " + show(dtype), show(t.scalar_type()) + " of shape " + show(t.sizes()));
  };
  vector_of("values", values, ScalarType::Float);
  vector_of("columns", columns, ScalarType::Short);
  vector_of("counts", counts, ScalarType::Short);
  if (columns.numel() != values.numel()) check.refuse("columns", "be as many as the values, " + std::to_string(values.numel()), std::to_string(columns.numel()));
  if (width < 1 || width > 65535) check.refuse("input", "meet 1 to 65535 columns of the weight", std::to_string(width));
  return {counts.numel(),
          width,
          values.const_data_ptr<float>(),
          static_cast<const uint16_t*>(columns.data_ptr()),
          static_cast<const uint16_t*>(counts.data_ptr()),
          values.numel()};
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

constexpr int64_t kL1 = 40 * 1024;

// plan: (largest n, tile, k_block, chunk), ... by ascending n; of `n` columns, or what usually is good where it says nothing of them.
Plan plan_of(const Check& check, const Integers& plan, int64_t n, int64_t smallest_tile) {
  if (plan.size() % 4 != 0) check.refuse("plan", "have 4 numbers an entry", std::to_string(plan.size()));
  Plan chosen{n == 1 && smallest_tile == 1 ? 1 : n <= 8 ? 8 : n <= 16 ? 16 : n <= 32 ? 32 : 64, 0, 256};
  chosen.k_block = kL1 / 4 / chosen.tile;
  for (size_t i = 0; i < plan.size(); i += 4) {
    const int64_t tile = plan[i + 1], k_block = plan[i + 2], chunk = plan[i + 3];
    const bool known = tile == 8 || tile == 16 || tile == 32 || tile == 64 || tile == 128 || (tile == 1 && smallest_tile == 1);
    if (!known || k_block < 1 || k_block > 65535 || chunk < 1 || chunk > 65536)
      check.refuse("plan", "have a tile of 8 to 128, a k_block of 1 to 65535 and a chunk of 1 to 65536",
                   std::to_string(tile) + ", " + std::to_string(k_block) + ", " + std::to_string(chunk));
    if (n <= plan[i]) return {static_cast<int>(tile), k_block, chunk};
  }
  return chosen;
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

Tensor sparse_linear_cpu(const Tensor& input, const Tensor& values, const Tensor& columns, const Tensor& counts, const MaybeTensor& bias,
                         const Integers& plan) {
  Check check("sparse_linear");
  check_input(check, input);
  if (input.dim() < 1) check.refuse("input", "have 1 or more dims", "a scalar");
  std::vector<int64_t> shape = list(input.sizes());
  const SparseMatrix a = matrix_of(check, values, columns, counts, shape.back());
  const float* b = bias_of(check, bias, a.rows);
  const int64_t n = input.numel() / a.columns;
  const Plan chosen = plan_of(check, plan, n, 1);
  shape.back() = a.rows;
  Tensor out = torch::stable::new_empty(input, shape);
  if (out.numel() == 0) return out;
  TorchContext torch;
  run("sparse_linear", [&] {
    sparse_linear(torch.context.pool, sparse_kernels(kernels().name), a, input.const_data_ptr<float>(), n, b, chosen, out.mutable_data_ptr<float>());
  });
  return out;
}

Tensor sparse_conv2d_cpu(const Tensor& input, const Tensor& values, const Tensor& columns, const Tensor& counts, const MaybeTensor& bias,
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
  const SparseMatrix a = matrix_of(check, values, columns, counts, c.channels > 65535 ? c.channels : c.channels * window);
  const float* b = bias_of(check, bias, a.rows);
  const int64_t height = c.out_size(0), width = c.out_size(1);
  if (height < 1 || width < 1) check.refuse("input", "be at least as large as the kernel", "shape " + show(input.sizes()));
  const Plan chosen = plan_of(check, plan, height * width, 8);
  Tensor out = torch::stable::new_empty(input, {c.batch, a.rows, height, width});
  if (out.numel() == 0) return out;
  TorchContext torch;
  run("sparse_conv2d", [&] {
    sparse_conv2d(torch.context.pool, sparse_kernels(kernels().name), a, c, input.const_data_ptr<float>(), b, chosen, out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_FRAGMENT(cram_kernels, m) {
  m.def("sparse_linear(Tensor input, Tensor values, Tensor columns, Tensor counts, Tensor? bias, int[] plan) -> Tensor");
  m.def(
      "sparse_conv2d(Tensor input, Tensor values, Tensor columns, Tensor counts, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int[] plan) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&cram::sparse_linear_cpu));
  m.impl("sparse_conv2d", TORCH_BOX(&cram::sparse_conv2d_cpu));
}
