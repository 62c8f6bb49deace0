#include "check.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace cram {

using torch::headeronly::ScalarType;

std::string show(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
  return out.str();
}

std::string show(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::ComplexFloat:
      return "complex64";
    default:
      return "dtype number " + std::to_string(static_cast<int>(t));
  }
}

namespace {

std::string show(DType t) { return t == DType::kFloat32 ? "float32" : t == DType::kBFloat16 ? "bfloat16" : "float16"; }

std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

int32_t layout_of(const Tensor& t) {
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout;
}

std::pair<int32_t, int32_t> device_of(const Tensor& t) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return {type, t.get_device_index()};
}

std::string show(std::pair<int32_t, int32_t> device) {
  if (device.first == aoti_torch_device_type_cpu()) return "cpu";
  const std::string type = device.first == aoti_torch_device_type_cuda() ? "cuda" : "device type " + std::to_string(device.first);
  return type + ":" + std::to_string(device.second);
}

DType own_dtype(const Item& item) { return item.dtype; }

bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Equal but for dims of one element, whose stride means nothing.
bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && x[d] != y[d]) return false;
  return true;
}

// Non-overlapping and without holes.
bool is_dense(const Tensor& t) {
  if (t.numel() < 2 || t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1) dims.push_back({strides[d], sizes[d]});
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

std::string Check::entry(const char* name, int64_t index) {
  return index < 0 ? std::string(name) : std::string(name) + "[" + std::to_string(index) + "]";
}

void Check::require(bool holds, const std::string& what, const std::string& wanted, const std::string& found) const {
  if (!holds) throw std::runtime_error(std::string(op_) + ": " + what + " must " + wanted + ", got " + found);
}

void Check::strided(const std::string& what, const Tensor& t) {
  require(layout_of(t) == aoti_torch_layout_strided(), what, "be a dense (strided) tensor", "a sparse or other layout");
}

void Check::on_device(const std::string& what, const Tensor& t) {
  const auto device = device_of(t);
  if (!device_.has_value()) device_ = device;
  require(device == *device_, what, "be on " + show(*device_) + " like the tensors before it", show(device));
}

void Check::dense(const std::string& what, const Tensor& t) {
  strided(what, t);
  on_device(what, t);
  require(is_dense(t), what, "be dense (non-overlapping, without holes, in any memory order)",
          "shape " + show(t.sizes()) + " with strides " + show(t.strides()));
}

void Check::remember(const char* name, int64_t index, const Tensor& t, bool written) {
  if (t.numel() == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  extents_.push_back({begin, begin + t.numel() * t.element_size(), name, index, written});
}

std::vector<Item> Check::list(const char* name, const Tensors& tensors, bool written) {
  like_ = &tensors;
  std::vector<Item> items(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const std::string what = entry(name, i);
    dense(what, t);
    const auto dtype = dtype_of(t);
    require(dtype.has_value(), what, "be float32, bfloat16 or float16", show(t.scalar_type()));
    items[i].numel = t.numel();
    items[i].dtype = *dtype;
    items[i].param = t.data_ptr();
    remember(name, i, t, written);
  }
  return items;
}

void Check::attach(std::vector<Item>& items, const char* name, const Tensors& tensors, bool written, DType (*wanted)(const Item&),
                   const std::function<void(Item&, void*)>& set) {
  if (!present(name, tensors, items)) return;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const Tensor& like = (*like_)[i];
    const std::string what = entry(name, i);
    strided(what, t);
    if (t.numel() == 0) continue;
    on_device(what, t);
    require(dtype_of(t) == wanted(items[i]), what, "be " + show(wanted(items[i])), show(t.scalar_type()));
    require(same(t.sizes(), like.sizes()), what, "have the shape " + show(like.sizes()) + " of its parameter", show(t.sizes()));
    require(same_strides(t, like), what, "have the strides " + show(like.strides()) + " of its parameter", show(t.strides()));
    set(items[i], t.data_ptr());
    remember(name, i, t, written);
  }
}

bool Check::present(const char* name, const Tensors& tensors, const std::vector<Item>& items) const {
  require(tensors.empty() || tensors.size() == items.size(), name, "be empty or have one tensor a parameter (" + std::to_string(items.size()) + ")",
          std::to_string(tensors.size()));
  return !tensors.empty();
}

void Check::masks(std::vector<Item>& items, const Tensors& masks, bool written) {
  if (!present("masks", masks, items)) return;
  for (size_t i = 0; i < masks.size(); ++i) {
    const Tensor& t = masks[i];
    const std::string what = entry("masks", i);
    strided(what, t);
    if (t.numel() == 0) continue;
    on_device(what, t);
    require(t.scalar_type() == ScalarType::Byte, what, "be uint8", show(t.scalar_type()));
    require(t.dim() == 1 && t.numel() == mask_bytes(items[i].numel) && t.is_contiguous(), what,
            "be contiguous of shape [" + std::to_string(mask_bytes(items[i].numel)) + "], one bit a weight", show(t.sizes()));
    items[i].mask = static_cast<uint8_t*>(t.data_ptr());
    remember("masks", i, t, written);
  }
}

void Check::masters(std::vector<Item>& items, const Tensors& masters, bool written) {
  attach(items, "masters", masters, written, [](const Item&) { return DType::kFloat32; },
         [](Item& item, void* p) { item.master = static_cast<float*>(p); });
  for (size_t i = 0; i < items.size(); ++i)
    require(items[i].master == nullptr || items[i].dtype != DType::kFloat32, entry("masters", i), "be absent for a float32 parameter",
            "a master weight");
}

void Check::state(std::vector<Item>& items, const char* name, const Tensors& tensors, int slot) {
  attach(items, name, tensors, true, [](const Item& item) { return item.master != nullptr ? DType::kFloat32 : item.dtype; },
         [slot](Item& item, void* p) { item.state[slot] = p; });
}

void Check::steps(std::vector<Item>& items, const Tensors& steps) {
  require(steps.size() == items.size(), "steps", "have one tensor a parameter (" + std::to_string(items.size()) + ")",
          std::to_string(steps.size()));
  for (size_t i = 0; i < steps.size(); ++i) {
    items[i].step = static_cast<float*>(scalar("steps", steps[i], "float32", true, i));
  }
}

void Check::sets(std::vector<Item>& items, const Integers& sets, const Tensor& k, const char* name) {
  strided(name, k);
  require(k.scalar_type() == ScalarType::Long, name, "be int64", show(k.scalar_type()));
  require(k.dim() == 1 && k.is_contiguous(), name, "be contiguous of shape [number of selection sets]", show(k.sizes()));
  on_device(name, k);
  remember(name, -1, k, false);
  require(sets.size() == items.size(), "sets", "have one entry a tensor (" + std::to_string(items.size()) + ")", std::to_string(sets.size()));
  for (size_t i = 0; i < sets.size(); ++i) {
    require(sets[i] >= -1 && sets[i] < k.numel(), entry("sets", i), "be in [-1, " + std::to_string(k.numel()) + ")", std::to_string(sets[i]));
    items[i].set = sets[i];
  }
}

void Check::nm(std::vector<Item>& items, const Integers& prune, int64_t n, int64_t m) {
  require(1 <= n && n < m && m <= 1024, "n, m", "satisfy 1 <= n < m <= 1024", "n=" + std::to_string(n) + ", m=" + std::to_string(m));
  require(prune.size() == items.size(), "prune", "have one entry a tensor (" + std::to_string(items.size()) + ")", std::to_string(prune.size()));
  for (size_t i = 0; i < prune.size(); ++i) {
    require(prune[i] == 0 || prune[i] == 1, entry("prune", i), "be 0 or 1", std::to_string(prune[i]));
    const Tensor& t = (*like_)[i];
    if (prune[i] == 0 || t.numel() == 0) continue;
    require(t.dim() >= 2 && t.sizes()[1] % m == 0, entry("prune", i),
            "be 0 for a tensor whose axis 1 is not a multiple of m=" + std::to_string(m), "1 for shape " + show(t.sizes()));
    items[i].inner = t.strides()[1];  // a dense tensor, and axis 1 has at least m > 1 elements
  }
}

void* Check::scalar(const char* name, const Tensor& t, const char* dtype, bool written, int64_t index) {
  const std::string what = entry(name, index);
  strided(what, t);
  require(show(t.scalar_type()) == dtype, what, std::string("be ") + dtype, show(t.scalar_type()));
  require(t.numel() == 1, what, "have one element", "shape " + show(t.sizes()));
  on_device(what, t);
  remember(name, index, t, written);
  return t.data_ptr();
}

void Check::per_item(const char* name, const Tensor& t, size_t items) {
  strided(name, t);
  require(t.scalar_type() == ScalarType::Float, name, "be float32", show(t.scalar_type()));
  require(t.dim() == 0 || (t.dim() == 1 && static_cast<size_t>(t.numel()) == items && t.is_contiguous()), name,
          "have shape [] or [" + std::to_string(items) + "]", show(t.sizes()));
  on_device(name, t);
  remember(name, -1, t, false);
}

std::vector<Item> Check::uphill(const Tensors& params, const Tensors& grads, const Tensor& rho, const MaybeTensor& inv_scale,
                                const Tensors& masters) {
  std::vector<Item> items = list("params", params, false);
  attach(items, "grads", grads, false, own_dtype, [](Item& item, void* p) { item.grad = p; });
  this->masters(items, masters, false);
  per_item("rho", rho, items.size());
  scalar("inv_scale", inv_scale, false);
  return items;
}

std::vector<Item> Check::perturb(const PerturbArguments& a, bool masks_written) {
  std::vector<Item> items = list("params", a.params, true);
  require(a.grads.size() == items.size(), "grads", "have one tensor a parameter (" + std::to_string(items.size()) + ")",
          std::to_string(a.grads.size()));
  attach(items, "grads", a.grads, false, own_dtype, [](Item& item, void* p) { item.grad = p; });
  attach(items, "saved", a.saved, true, own_dtype, [](Item& item, void* p) { item.saved = p; });
  masks(items, a.masks, masks_written);
  masters(items, a.masters, false);
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].numel == 0) continue;
    require(items[i].grad != nullptr, entry("grads", i), "be there", "a tensor with 0 elements");
    require(items[i].saved != nullptr || items[i].master != nullptr, entry("saved", i), "be there (or a master weight)", "neither");
  }
  scalar("perturbed", a.perturbed, "int32", true);
  per_item("rho", a.rho, items.size());
  scalar("inv_scale", a.inv_scale, false);
  scalar("found_inf", a.found_inf, true);
  return items;
}

std::vector<Item> Check::update(const UpdateArguments& a, bool grads_written, bool masters_written) {
  std::vector<Item> items = list("params", a.params, true);
  attach(items, "saved", a.saved, false, own_dtype, [](Item& item, void* p) { item.saved = p; });
  attach(items, "grads", a.grads, grads_written, own_dtype, [](Item& item, void* p) { item.grad = p; });
  attach(items, "first_grads", a.first_grads, false, own_dtype, [](Item& item, void* p) { item.first_grad = p; });
  masks(items, a.masks, false);
  masters(items, a.masters, masters_written);
  scalar("perturbed", a.perturbed, "int32", true);
  scalar("inv_scale", a.inv_scale, false);
  scalar("first_inv_scale", a.first_inv_scale, false);
  scalar("found_inf", a.found_inf, false);
  return items;
}

void Check::no_overlap() {
  std::sort(extents_.begin(), extents_.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* last = nullptr;          // the one that reaches furthest
  const Extent* last_written = nullptr;  // likewise, of the written ones
  for (const Extent& e : extents_) {
    const Extent* other = e.written ? last : last_written;
    require(other == nullptr || e.begin >= other->end, entry(e.name, e.index), "not share memory with " + (other ? entry(other->name, other->index) : ""),
            "tensors that overlap (tied weights appear once in a list)");
    if (last == nullptr || e.end > last->end) last = &e;
    if (e.written && (last_written == nullptr || e.end > last_written->end)) last_written = &e;
  }
}

}  // namespace cram
