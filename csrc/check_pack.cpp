// The checks of the ops on packed 2:4 weights.
#include "arguments.h"

namespace cram {
namespace {

using torch::headeronly::ScalarType;

std::optional<Slot> slot_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Char:
      return Slot::kInt8;
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
      return Slot::kFloat8;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return Slot::kFloat16;
    case ScalarType::Float:
      return Slot::kFloat32;
    default:
      return std::nullopt;
  }
}

std::string multiples(Slot slot) {
  return "have rows that are a multiple of " + std::to_string(rows_multiple(slot)) + " and columns that are one of " +
         std::to_string(cols_multiple(slot));
}

}  // namespace

void Check::matrix(const char* name, size_t index, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols, bool written) {
  const std::string what = entry(name, index);
  strided(what, t);
  on_device(what, t);
  require(t.scalar_type() == dtype, what, "be " + show(dtype), show(t.scalar_type()));
  const auto sizes = t.sizes();
  require(sizes.size() == 2 && sizes[0] == rows && sizes[1] == cols, what,
          "have shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "]", show(sizes));
  require(t.is_contiguous(), what, "be contiguous", "strides " + show(t.strides()));
  remember(name, index, t, written);
}

std::vector<PackItem> Check::packed(const Tensors& weights, const Tensors& packed, const Tensors& metas, bool weights_written) {
  const std::string wanted = "have one tensor a weight (" + std::to_string(weights.size()) + ")";
  require(packed.size() == weights.size(), "packed", wanted, std::to_string(packed.size()));
  require(metas.size() == weights.size(), "metas", wanted, std::to_string(metas.size()));
  std::vector<PackItem> items;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const std::string what = entry("weights", i);
    strided(what, w);
    const auto slot = slot_of(w);
    require(slot.has_value() && *slot != Slot::kFloat8, what, "be int8, float16, bfloat16 or float32", show(w.scalar_type()));
    const auto sizes = w.sizes();
    require(sizes.size() == 2, what, "have 2 dims", "shape " + show(sizes));
    const int64_t rows = sizes[0], cols = sizes[1];
    require(rows % rows_multiple(*slot) == 0 && cols % cols_multiple(*slot) == 0, what, multiples(*slot), "shape " + show(sizes));
    matrix("weights", i, w, w.scalar_type(), rows, cols, weights_written);
    matrix("packed", i, packed[i], w.scalar_type(), rows, cols / 2, !weights_written);
    matrix("metas", i, metas[i], *slot == Slot::kInt8 ? ScalarType::Int : ScalarType::Short, rows, meta_cols(*slot, cols), !weights_written);
    items.push_back({*slot, rows, cols, w.data_ptr(), packed[i].data_ptr(), metas[i].data_ptr()});
  }
  return items;
}

std::vector<GroupItem> Check::groups(const Tensors& weights, int64_t n, int64_t m) {
  require(1 <= n && n < m && m <= 1024, "n, m", "satisfy 1 <= n < m <= 1024", "n=" + std::to_string(n) + ", m=" + std::to_string(m));
  std::vector<GroupItem> items;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const std::string what = entry("weights", i);
    dense(what, w);
    const auto slot = slot_of(w);
    require(slot.has_value(), what, "be float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8", show(w.scalar_type()));
    const auto sizes = w.sizes();
    require(sizes.size() >= 2 && sizes[1] % m == 0, what, "have an axis 1 that is a multiple of m=" + std::to_string(m), "shape " + show(sizes));
    items.push_back({*slot, w.numel(), w.numel() > 0 ? w.strides()[1] : 0, w.data_ptr()});
  }
  return items;
}

namespace {

std::vector<PackItem> packed_items(const char* op, const Tensors& weights, const Tensors& packed, const Tensors& metas, bool weights_written) {
  Check check(op);
  std::vector<PackItem> items = check.packed(weights, packed, metas, weights_written);
  check.no_overlap();
  return items;
}

}  // namespace

std::vector<PackItem> pack_items(const Tensors& weights, const Tensors& packed, const Tensors& metas) {
  return packed_items("pack_24_", weights, packed, metas, false);
}

void check_pack_24_(const Tensors& weights, const Tensors& packed, const Tensors& metas) { pack_items(weights, packed, metas); }

std::vector<PackItem> unpack_items(const Tensors& weights, const Tensors& packed, const Tensors& metas) {
  return packed_items("unpack_24_", weights, packed, metas, true);
}

void check_unpack_24_(const Tensors& weights, const Tensors& packed, const Tensors& metas) { unpack_items(weights, packed, metas); }

std::vector<GroupItem> violation_items(const Tensors& weights, int64_t n, int64_t m) { return Check("nm_violations").groups(weights, n, m); }

void check_nm_violations(const Tensors& weights, int64_t n, int64_t m) { violation_items(weights, n, m); }

}  // namespace cram
