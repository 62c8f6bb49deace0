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

// On the CPU and contiguous: the other devices have no such kernel, but a call of several tensors may mix them.
bool is_vector(const Tensor& t, int32_t dtype) {
  int32_t found, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &found));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device));
  return found == dtype && device == kCpu && t.dim() == 1 && t.is_contiguous();
}

[[noreturn]] void refuse_vector(const Check& check, const char* name, const std::string& wanted, const Tensor& t) {
  check.refuse(name, "be a contiguous vector of " + wanted, show(t.scalar_type()) + " of shape " + show(t.sizes()));
}

// The numbers of `form`, which hold for one call.
struct Form {
  const int64_t* numbers;  // rows, columns, block, section, bytes of a value; then (largest n, tile), ... by ascending n
  int64_t entries;
};

constexpr int64_t kLayout = 5;  // numbers before the plan

Form form_of(const Check& check, const Tensor& form) {
  if (!is_vector(form, kLong)) refuse_vector(check, "form", show(ScalarType::Long), form);
  const int64_t n = form.numel();
  if (n < kLayout || (n - kLayout) % 2 != 0) check.refuse("form", "have 5 numbers of the layout and 2 an entry of the plan", std::to_string(n));
  return {static_cast<const int64_t*>(form.data_ptr()), (n - kLayout) / 2};
}

// packed, checked but for what is in it: validate() looks at that.
SparseMatrix matrix_of(const Check& check, const Tensor& packed, const Form& form, int64_t columns) {
  if (!is_vector(packed, kByte)) refuse_vector(check, "packed", show(ScalarType::Byte), packed);
  const int64_t* layout = form.numbers;
  SparseMatrix a{layout[0], layout[1], layout[2], layout[3], nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
  const int64_t value_bytes = layout[4];
  if (a.rows < 0 || a.rows > kLargest || a.columns < 1 || a.columns > kLargest || a.block < 1 || a.block > kMaxBlock || a.section < kLanes ||
      a.section > kMaxSection || a.section % kLanes != 0 || (value_bytes != 2 && value_bytes != 4))
    check.refuse("form", "begin with rows, columns, a block of 1 to 255, a section of 16 to 128, divisible by 16, and values of 2 or 4 bytes",
                 show(torch::headeronly::IntHeaderOnlyArrayRef(layout, kLayout)));
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

const float* bias_of(const Check& check, const Tensor& bias, int64_t rows) {
  if (!is_vector(bias, kFloat) || bias.numel() != rows) refuse_vector(check, "bias", std::to_string(rows) + " float32", bias);
  return bias.const_data_ptr<float>();
}

void check_input(const Check& check, const Tensor& input) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  if (dtype != kFloat) check.refuse("input", "be float32", show(input.scalar_type()));
  if (!input.is_contiguous()) check.refuse("input", "be contiguous", "strides " + show(input.strides()));
}

// The tile for n columns, or what usually is good where the plan says nothing of them.
int tile_of(const Check& check, const Form& form, int64_t n, int64_t smallest) {
  for (const int64_t *entry = form.numbers + kLayout, *end = entry + 2 * form.entries; entry < end; entry += 2) {
    const int64_t tile = entry[1];
    const bool known = tile == 8 || tile == 16 || tile == 32 || tile == 64 || tile == 128 || (tile == 1 && smallest == 1);
    if (!known) check.refuse("form", "have a tile of 8, 16, 32, 64 or 128" + std::string(smallest == 1 ? ", or 1" : ""), std::to_string(tile));
    if (n <= entry[0]) return static_cast<int>(tile);
  }
  return n == 1 && smallest == 1 ? 1 : n <= 8 ? 8 : n <= 16 ? 16 : n <= 32 ? 32 : 64;
}

// Not new_empty, which finds its op by name: three times as long.
Tensor empty(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), kFloat, kCpu, 0, &made));
  return Tensor(made);
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

Tensor sparse_linear_cpu(const Tensor& input, const Tensor& packed, const Tensor& bias, const Tensor& form) {
  Check check("sparse_linear");
  check_input(check, input);
  if (input.dim() < 1) check.refuse("input", "have 1 or more dims", "a scalar");
  std::vector<int64_t> shape = list(input.sizes());
  const Form numbers = form_of(check, form);
  const SparseMatrix a = matrix_of(check, packed, numbers, shape.back());
  const float* b = bias_of(check, bias, a.rows);
  const int64_t n = input.numel() / a.columns;
  const int tile = tile_of(check, numbers, n, 1);
  shape.back() = a.rows;
  Tensor out = empty(shape);
  if (out.numel() == 0) return out;
  TorchContext torch;
  run("sparse_linear", [&] {
    sparse_linear(torch.context.pool, sparse_kernels(kernels().name), a, input.const_data_ptr<float>(), n, b, tile, out.mutable_data_ptr<float>());
  });
  return out;
}

Tensor sparse_conv2d_cpu(const Tensor& input, const Tensor& packed, const Tensor& bias, const Tensor& form,
                         const Integers& kernel_size, const Integers& stride, const Integers& padding, const Integers& dilation) {
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
  const Form numbers = form_of(check, form);
  const SparseMatrix a = matrix_of(check, packed, numbers, c.channels > kLargest ? c.channels : c.channels * window);
  const float* b = bias_of(check, bias, a.rows);
  const int64_t height = c.out_size(0), width = c.out_size(1);
  if (height < 1 || width < 1) check.refuse("input", "be at least as large as the kernel", "shape " + show(input.sizes()));
  const int tile = tile_of(check, numbers, height * width, 8);
  Tensor out = empty({c.batch, a.rows, height, width});
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
  m.def("sparse_linear(Tensor input, Tensor packed, Tensor bias, Tensor form) -> Tensor");
  m.def(
      "sparse_conv2d(Tensor input, Tensor packed, Tensor bias, Tensor form, int[] kernel_size, int[] stride, int[] padding, int[] dilation) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&cram::sparse_linear_cpu));
  m.impl("sparse_conv2d", TORCH_BOX(&cram::sparse_conv2d_cpu));
}
