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

void* Check::matrix(Place place, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols, bool written) {
  const Facts facts = strided(place, t);
  on_device(place, t);
  if (t.scalar_type() != dtype) refuse(place, "be " + show(dtype), show(t.scalar_type()));
  if (facts.sizes.size() != 2 || facts.sizes[0] != rows || facts.sizes[1] != cols)
    refuse(place, "have shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "]", show(facts.sizes));
  if (!t.is_contiguous()) refuse(place, "be contiguous", "strides " + show(facts.strides));
  return remember(place, t, facts.numel * t.element_size(), written);
}

std::vector<PackItem> Check::packed(const Tensors& weights, const Tensors& packed, const Tensors& metas, bool weights_written) {
  const auto one_a_weight = [&](const char* name, const Tensors& tensors) {
    if (tensors.size() != weights.size())
      refuse(name, "have one tensor a weight (" + std::to_string(weights.size()) + ")", std::to_string(tensors.size()));
  };
  one_a_weight("packed", packed);
  one_a_weight("metas", metas);
  std::vector<PackItem> items;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const Place place("weights", i);
    const auto sizes = strided(place, w).sizes;
    const auto slot = slot_of(w);
    if (!slot.has_value() || *slot == Slot::kFloat8) refuse(place, "be int8, float16, bfloat16 or float32", show(w.scalar_type()));
    if (sizes.size() != 2) refuse(place, "have 2 dims", "shape " + show(sizes));
    const int64_t rows = sizes[0], cols = sizes[1];
    if (rows % rows_multiple(*slot) != 0 || cols % cols_multiple(*slot) != 0) refuse(place, multiples(*slot), "shape " + show(sizes));
    const ScalarType dtype = w.scalar_type(), meta_dtype = *slot == Slot::kInt8 ? ScalarType::Int : ScalarType::Short;
    void* weight = matrix(place, w, dtype, rows, cols, weights_written);
    void* numbers = matrix(Place("packed", i), packed[i], dtype, rows, cols / 2, !weights_written);
    void* meta = matrix(Place("metas", i), metas[i], meta_dtype, rows, meta_cols(*slot, cols), !weights_written);
    items.push_back({*slot, rows, cols, weight, numbers, meta});
  }
  return items;
}

std::vector<GroupItem> Check::groups(const Tensors& weights, int64_t n, int64_t m) {
  satisfy_nm(n, m);
  std::vector<GroupItem> items;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const Place place("weights", i);
    const Facts facts = dense(place, w);
    const auto slot = slot_of(w);
    if (!slot.has_value()) refuse(place, "be float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8", show(w.scalar_type()));
    if (facts.sizes.size() < 2 || facts.sizes[1] % m != 0)
      refuse(place, "have an axis 1 that is a multiple of m=" + std::to_string(m), "shape " + show(facts.sizes));
    items.push_back({*slot, facts.numel, facts.numel > 0 ? facts.strides[1] : 0, w.data_ptr()});
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
