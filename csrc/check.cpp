#include "check.h"

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace cram {

using torch::headeronly::ScalarType;

std::string show(Place place) { return place.name + (place.index < 0 ? "" : "[" + std::to_string(place.index) + "]"); }

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

ScalarType scalar_type_of(DType t) {
  return t == DType::kFloat32 ? ScalarType::Float : t == DType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;
}

// Libtorch's numbers. It does not change them while it is loaded.
int32_t number_of(ScalarType t) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(t)); }
const int32_t kStrided = aoti_torch_layout_strided(), kCpu = aoti_torch_device_type_cpu(), kCuda = aoti_torch_device_type_cuda();
const int32_t kDtypes[] = {number_of(ScalarType::Float), number_of(ScalarType::BFloat16), number_of(ScalarType::Half)};  // by DType
const int32_t kByte = number_of(ScalarType::Byte), kFloat = kDtypes[0];

int32_t number_of(DType t) { return kDtypes[static_cast<int>(t)]; }

std::optional<DType> dtype_of(int32_t number) {
  for (DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    if (number == number_of(t)) return t;
  return std::nullopt;
}

// Type and index.
std::pair<int32_t, int32_t> device_of(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return {type, type == kCpu ? 0 : t.get_device_index()};
}

std::string show(std::pair<int32_t, int32_t> device) {
  if (device.first == kCpu) return "cpu";
  const std::string type = device.first == kCuda ? "cuda" : "device type " + std::to_string(device.first);
  return type + ":" + std::to_string(device.second);
}

DType own_dtype(const Item& item) { return item.dtype; }

bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)  // std::equal would call memcmp for two numbers
    if (a[d] != b[d]) return false;
  return true;
}

// Of tensors of one shape: equal but for dims of one element, whose stride means nothing.
bool same_strides(const Facts& a, const Facts& b) {
  for (size_t d = 0; d < a.sizes.size(); ++d)
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

bool is_contiguous(const Facts& t) {
  if (t.numel < 2) return true;
  int64_t expected = 1;
  for (size_t d = t.sizes.size(); d-- > 0;) {
    if (t.sizes[d] > 1 && t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

// Non-overlapping and without holes.
bool is_dense(const Facts& t) {
  if (is_contiguous(t)) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < t.sizes.size(); ++d)
    if (t.sizes[d] > 1) dims.push_back({t.strides[d], t.sizes[d]});
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

thread_local Check::Lists Check::spare_;

Check::Check(const char* op) : op_(op) { std::swap(lists_, spare_); }

Check::~Check() {
  lists_.like.clear();
  lists_.extents.clear();
  std::swap(lists_, spare_);
}

void Check::refuse(Place place, const std::string& wanted, const std::string& found) const {
  throw std::runtime_error(std::string(op_) + ": " + show(place) + " must " + wanted + ", got " + found);
}

Facts Check::strided(Place place, const Tensor& t) const {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  if (layout != kStrided) refuse(place, "be a dense (strided) tensor", "a sparse or other layout");
  Facts facts;
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &facts.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  const size_t dim = t.dim();
  facts.sizes = {sizes, dim};
  facts.strides = {strides, dim};
  facts.numel = 1;
  for (size_t d = 0; d < dim; ++d) facts.numel *= sizes[d];
  return facts;
}

void Check::on_device(Place place, const Tensor& t) {
  const auto device = device_of(t);
  if (!device_.has_value()) device_ = device;
  if (device != *device_) refuse(place, "be on " + show(*device_) + " like the tensors before it", show(device));
}

Facts Check::dense(Place place, const Tensor& t) {
  const Facts facts = strided(place, t);
  on_device(place, t);
  if (!is_dense(facts))
    refuse(place, "be dense (non-overlapping, without holes, in any memory order)",
           "shape " + show(facts.sizes) + " with strides " + show(facts.strides));
  return facts;
}

void* Check::remember(Place place, const Tensor& t, int64_t bytes, bool written) {
  void* data = t.data_ptr();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (bytes > 0) lists_.extents.push_back({begin, begin + bytes, place, written});
  return data;
}

std::vector<Item> Check::list(const char* name, const Tensors& tensors, bool written) {
  std::vector<Item> items(tensors.size());
  lists_.like.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const Place place(name, i);
    const Facts facts = dense(place, t);
    const auto dtype = dtype_of(facts.dtype);
    if (!dtype.has_value()) refuse(place, "be float32, bfloat16 or float16", show(t.scalar_type()));
    items[i].numel = facts.numel;
    items[i].dtype = *dtype;
    items[i].param = remember(place, t, facts.numel * size_of(*dtype), written);
    lists_.like.push_back(facts);
  }
  return items;
}

template <class Wanted, class Set>
void Check::attach(std::vector<Item>& items, const char* name, const Tensors& tensors, bool written, Wanted wanted, Set set) {
  if (!present(name, tensors, items)) return;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const Facts& like = lists_.like[i];
    const Place place(name, i);
    const Facts facts = strided(place, t);
    if (facts.numel == 0) continue;
    on_device(place, t);
    const DType dtype = wanted(items[i]);
    if (facts.dtype != number_of(dtype)) refuse(place, "be " + show(scalar_type_of(dtype)), show(t.scalar_type()));
    if (!same(facts.sizes, like.sizes)) refuse(place, "have the shape " + show(like.sizes) + " of its parameter", show(facts.sizes));
    if (!same_strides(facts, like)) refuse(place, "have the strides " + show(like.strides) + " of its parameter", show(facts.strides));
    set(items[i], remember(place, t, facts.numel * size_of(dtype), written));
  }
}

bool Check::present(const char* name, const Tensors& tensors, const std::vector<Item>& items) const {
  if (!tensors.empty() && tensors.size() != items.size())
    refuse(name, "be empty or have one tensor a parameter (" + std::to_string(items.size()) + ")", std::to_string(tensors.size()));
  return !tensors.empty();
}

void Check::masks(std::vector<Item>& items, const Tensors& masks, bool written) {
  if (!present("masks", masks, items)) return;
  for (size_t i = 0; i < masks.size(); ++i) {
    const Tensor& t = masks[i];
    const Place place("masks", i);
    const Facts facts = strided(place, t);
    if (facts.numel == 0) continue;
    on_device(place, t);
    const int64_t bytes = mask_bytes(items[i].numel);
    if (facts.dtype != kByte) refuse(place, "be uint8", show(t.scalar_type()));
    if (facts.sizes.size() != 1 || facts.numel != bytes || !is_contiguous(facts))
      refuse(place, "be contiguous of shape [" + std::to_string(bytes) + "], one bit a weight", show(facts.sizes));
    items[i].mask = static_cast<uint8_t*>(remember(place, t, bytes, written));
  }
}

void Check::masters(std::vector<Item>& items, const Tensors& masters, bool written) {
  attach(
      items, "masters", masters, written, [](const Item&) { return DType::kFloat32; },
      [](Item& item, void* p) { item.master = static_cast<float*>(p); });
  for (size_t i = 0; i < items.size(); ++i)
    if (items[i].master != nullptr && items[i].dtype == DType::kFloat32)
      refuse({"masters", static_cast<int64_t>(i)}, "be absent for a float32 parameter", "a master weight");
}

void Check::state(std::vector<Item>& items, const char* name, const Tensors& tensors, int slot) {
  attach(
      items, name, tensors, true, [](const Item& item) { return item.master != nullptr ? DType::kFloat32 : item.dtype; },
      [slot](Item& item, void* p) { item.state[slot] = p; });
}

void Check::steps(std::vector<Item>& items, const Tensors& steps) {
  if (steps.size() != items.size())
    refuse("steps", "have one tensor a parameter (" + std::to_string(items.size()) + ")", std::to_string(steps.size()));
  for (size_t i = 0; i < steps.size(); ++i) items[i].step = static_cast<float*>(scalar(Place("steps", i), steps[i], ScalarType::Float, true));
}

void Check::sets(std::vector<Item>& items, const Integers& sets, const Tensor& k, const char* name) {
  const Facts facts = strided(name, k);
  if (facts.dtype != number_of(ScalarType::Long)) refuse(name, "be int64", show(k.scalar_type()));
  if (facts.sizes.size() != 1 || !is_contiguous(facts)) refuse(name, "be contiguous of shape [number of selection sets]", show(facts.sizes));
  on_device(name, k);
  remember(name, k, facts.numel * sizeof(int64_t), false);
  if (sets.size() != items.size()) refuse("sets", "have one entry a tensor (" + std::to_string(items.size()) + ")", std::to_string(sets.size()));
  for (size_t i = 0; i < sets.size(); ++i) {
    if (sets[i] < -1 || sets[i] >= facts.numel) refuse(Place("sets", i), "be in [-1, " + std::to_string(facts.numel) + ")", std::to_string(sets[i]));
    items[i].set = sets[i];
  }
}

void Check::nm(std::vector<Item>& items, const Integers& prune, int64_t n, int64_t m) {
  satisfy_nm(n, m);
  if (prune.size() != items.size()) refuse("prune", "have one entry a tensor (" + std::to_string(items.size()) + ")", std::to_string(prune.size()));
  for (size_t i = 0; i < prune.size(); ++i) {
    if (prune[i] != 0 && prune[i] != 1) refuse(Place("prune", i), "be 0 or 1", std::to_string(prune[i]));
    const Facts& like = lists_.like[i];
    if (prune[i] == 0 || like.numel == 0) continue;
    if (like.sizes.size() < 2 || like.sizes[1] % m != 0)
      refuse(Place("prune", i), "be 0 for a tensor whose axis 1 is not a multiple of m=" + std::to_string(m), "1 for shape " + show(like.sizes));
    items[i].inner = like.strides[1];  // a dense tensor, and axis 1 has at least m > 1 elements
  }
}

void Check::satisfy_nm(int64_t n, int64_t m) const {
  if (n < 1 || n >= m || m > 1024) refuse("n, m", "satisfy 1 <= n < m <= 1024", "n=" + std::to_string(n) + ", m=" + std::to_string(m));
}

void* Check::scalar(Place place, const Tensor& t, ScalarType dtype, bool written) {
  const Facts facts = strided(place, t);
  if (facts.dtype != number_of(dtype)) refuse(place, "be " + show(dtype), show(t.scalar_type()));
  if (facts.numel != 1) refuse(place, "have one element", "shape " + show(facts.sizes));
  on_device(place, t);
  return remember(place, t, t.element_size(), written);
}

void Check::per_item(const char* name, const Tensor& t, size_t items) {
  const Facts facts = strided(name, t);
  if (facts.dtype != kFloat) refuse(name, "be float32", show(t.scalar_type()));
  const size_t dim = facts.sizes.size();
  if (dim > 1 || (dim == 1 && (static_cast<size_t>(facts.numel) != items || !is_contiguous(facts))))
    refuse(name, "have shape [] or [" + std::to_string(items) + "]", show(facts.sizes));
  on_device(name, t);
  remember(name, t, facts.numel * sizeof(float), false);
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
  if (a.grads.size() != items.size())
    refuse("grads", "have one tensor a parameter (" + std::to_string(items.size()) + ")", std::to_string(a.grads.size()));
  attach(items, "grads", a.grads, false, own_dtype, [](Item& item, void* p) { item.grad = p; });
  attach(items, "saved", a.saved, true, own_dtype, [](Item& item, void* p) { item.saved = p; });
  masks(items, a.masks, masks_written);
  masters(items, a.masters, false);
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].numel == 0) continue;
    if (items[i].grad == nullptr) refuse(Place("grads", i), "be there", "a tensor with 0 elements");
    if (items[i].saved == nullptr && items[i].master == nullptr) refuse(Place("saved", i), "be there (or a master weight)", "neither");
  }
  scalar("perturbed", a.perturbed, ScalarType::Int, true);
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
  scalar("perturbed", a.perturbed, ScalarType::Int, true);
  scalar("inv_scale", a.inv_scale, false);
  scalar("first_inv_scale", a.first_inv_scale, false);
  scalar("found_inf", a.found_inf, false);
  return items;
}

void Check::no_overlap() {
  const Extent* last = nullptr;          // the one that reaches furthest
  const Extent* last_written = nullptr;  // likewise, of the written ones
  sort_starts();
  for (const Start& start : lists_.starts) {
    const Extent& e = lists_.extents[start.extent];
    const Extent* other = e.written ? last : last_written;
    if (other != nullptr && e.begin < other->end)
      refuse(e.place, "not share memory with " + show(other->place), "tensors that overlap (tied weights appear once in a list)");
    if (last == nullptr || e.end > last->end) last = &e;
    if (e.written && (last_written == nullptr || e.end > last_written->end)) last_written = &e;
  }
}

// By address. A radix sort, byte by byte: in whatever order an allocator gives out memory, thousands of tensors take a fraction of the time
// of std::sort.
void Check::sort_starts() {
  auto &starts = lists_.starts, &sorted = lists_.sorted;
  starts.clear();
  uintptr_t lowest = UINTPTR_MAX, highest = 0;
  for (const Extent& e : lists_.extents) {
    starts.push_back({e.begin, static_cast<uint32_t>(starts.size())});
    lowest = std::min(lowest, e.begin);
    highest = std::max(highest, e.begin);
  }
  sorted.resize(starts.size());
  for (int shift = 0; shift < 64 && highest > lowest && (highest - lowest) >> shift != 0; shift += 8) {
    const auto digit = [=](const Start& s) { return (s.address - lowest) >> shift & 255; };
    size_t next[257] = {};  // where the next start with this digit goes
    for (const Start& s : starts) ++next[digit(s) + 1];
    if (next[digit(starts[0]) + 1] == starts.size()) continue;  // the same in all
    for (size_t d = 1; d < 257; ++d) next[d] += next[d - 1];
    for (const Start& s : starts) sorted[next[digit(s)]++] = s;
    starts.swap(sorted);
  }
}

}  // namespace cram
