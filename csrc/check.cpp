#include "check.h"

namespace cram {
namespace {

std::string show_dtype(int32_t number) { return show(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(number))); }

}  // namespace

thread_local Arguments::Lists Arguments::spare_;

Arguments::Arguments(const char* op, std::vector<Item>& items, std::vector<Value> values, bool buffers)
    : Check(op), items_(items), values_(std::move(values)), buffers_(buffers) {
  std::swap(lists_, spare_);
}

Arguments::~Arguments() {
  lists_.like.clear();
  lists_.extents.clear();
  std::swap(lists_, spare_);
}

Facts Arguments::strided(Place place, AtenTensorHandle t) const {
  if (!is_strided(t)) refuse(place, "be a dense (strided) tensor", "a sparse or other layout");
  return facts_of(t);
}

void Arguments::on_device(Place place, AtenTensorHandle t) {
  const Device device = device_of(t);
  if (like_ == nullptr) like_ = t, device_ = device;
  if (device != device_) refuse(place, "be on " + show(device_) + " like the tensors before it", show(device));
}

Facts Arguments::dense(Place place, AtenTensorHandle t) {
  const Facts facts = strided(place, t);
  on_device(place, t);
  if (!is_dense(facts))
    refuse(place, "be dense (non-overlapping, without holes, in any memory order)",
           "shape " + show(facts.sizes) + " with strides " + show(facts.strides));
  return facts;
}

void* Arguments::remember(Place place, void* data, int64_t bytes, Access access) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (bytes > 0) lists_.extents.push_back({begin, begin + bytes, place, access == Access::kWrite});
  writes_ |= access == Access::kWrite;
  return data;
}

// ---- Lists ----

void Arguments::main(const char* name, Access access) {
  const Tensors& tensors = next<Tensors>();
  items_.resize(tensors.size());
  lists_.like.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    AtenTensorHandle t = tensors[i];
    const Place place(name, i);
    const Facts facts = dense(place, t);
    const auto dtype = dtype_of(facts.dtype);
    if (!dtype.has_value()) refuse(place, "be float32, bfloat16 or float16", show_dtype(facts.dtype));
    items_[i].numel = facts.numel;
    items_[i].dtype = *dtype;
    items_[i].param = remember(place, data_of(t), facts.numel * size_of(*dtype), access);
    lists_.like.push_back(facts);
  }
}

std::optional<Arguments::Parts> Arguments::parts_of(const char* name, const Tensors& tensors) {
  if (!buffers_ || tensors.size() != 2) return std::nullopt;
  const Facts buffer = strided({name, 0}, tensors[0]), table = strided({name, 1}, tensors[1]);
  if (buffer.dtype != kByte || table.dtype != kLong) return std::nullopt;
  if (!is_contiguous(buffer) || !is_contiguous(table) || device_of(tensors[1]).first != kCpu)
    refuse(name, "be a contiguous buffer and a contiguous table on the CPU", show(buffer.strides) + ", " + show(table.strides) + " as strides");
  on_device({name, 0}, tensors[0]);
  const int64_t* begin = static_cast<const int64_t*>(data_of(tensors[1]));
  return Parts{static_cast<uint8_t*>(data_of(tensors[0])), buffer.numel, begin, begin + table.numel};
}

std::pair<Facts, void*> Arguments::next_part(Place place, Parts& parts) const {
  const int64_t left = parts.end - parts.next;
  if (left < 3 || parts.next[1] < 0 || parts.next[1] > 3 || parts.next[2] < 0 || parts.next[2] > (left - 3) / 2)
    refuse(place, "be in the table of its buffer", std::to_string(left) + " numbers there");
  const int64_t begin = parts.next[0], dtype = parts.next[1], dim = parts.next[2];
  Facts facts{dtype == 3 ? kByte : kDtypes[dtype], 1, {parts.next + 3, static_cast<size_t>(dim)}, {parts.next + 3 + dim, static_cast<size_t>(dim)}};
  for (int64_t size : facts.sizes) facts.numel *= size;
  parts.next += 3 + 2 * dim;
  const int64_t bytes = facts.numel * static_cast<int64_t>(aoti_torch_dtype_element_size(facts.dtype));
  if (begin < 0 || begin % 16 != 0 || begin > parts.bytes - bytes)
    refuse(place, "lie in its buffer of " + std::to_string(parts.bytes) + " bytes, at a multiple of 16",
           std::to_string(bytes) + " bytes at " + std::to_string(begin));
  return {facts, parts.buffer + begin};
}

template <class Use>
void Arguments::for_each(const char* name, const Tensors& tensors, Use use) {
  std::optional<Parts> parts = parts_of(name, tensors);
  if (!parts.has_value() && !present(name, tensors)) return;
  for (size_t i = 0; i < items_.size(); ++i) {
    const Place place(name, i);
    if (parts.has_value()) {
      const auto [facts, data] = next_part(place, *parts);
      if (facts.numel > 0) use(place, i, facts, data);
    } else if (const Facts facts = strided(place, tensors[i]); facts.numel > 0) {
      on_device(place, tensors[i]);
      use(place, i, facts, data_of(tensors[i]));
    }
  }
}

template <class Wanted, class Set>
void Arguments::attach(const char* name, const Tensors& tensors, Access access, Wanted wanted, Set set) {
  for_each(name, tensors, [&](Place place, size_t i, const Facts& facts, void* data) {
    const Facts& like = lists_.like[i];
    const DType dtype = wanted(items_[i]);
    if (facts.dtype != number_of(dtype)) refuse(place, "be " + show(scalar_type_of(dtype)), show_dtype(facts.dtype));
    if (!same(facts.sizes, like.sizes)) refuse(place, "have the shape " + show(like.sizes) + " of its parameter", show(facts.sizes));
    if (!same_strides(facts, like)) refuse(place, "have the strides " + show(like.strides) + " of its parameter", show(facts.strides));
    set(items_[i], remember(place, data, facts.numel * size_of(dtype), access));
  });
}

bool Arguments::present(const char* name, const Tensors& tensors) const {
  if (tensors.size() > 0 && tensors.size() != items_.size())
    refuse(name, "be empty or have one tensor a parameter (" + std::to_string(items_.size()) + ")", std::to_string(tensors.size()));
  return tensors.size() > 0;
}

void Arguments::list(const char* name, void* Item::*field, Access access) {
  attach(
      name, next<Tensors>(), access, [](const Item& item) { return item.dtype; }, [field](Item& item, void* p) { item.*field = p; });
}

void Arguments::needed(const char* name, void* Item::*field, Access access) {
  const size_t size = std::get<Tensors>(values_[next_]).size();
  if (size != items_.size()) refuse(name, "have one tensor a parameter (" + std::to_string(items_.size()) + ")", std::to_string(size));
  list(name, field, access);
  for (size_t i = 0; i < items_.size(); ++i)
    if (items_[i].numel > 0 && items_[i].*field == nullptr) refuse(Place(name, i), "be there", "a tensor with 0 elements");
}

void Arguments::masks(Access access) {
  for_each("masks", next<Tensors>(), [&](Place place, size_t i, const Facts& facts, void* data) {
    const int64_t bytes = mask_bytes(items_[i].numel);
    if (facts.dtype != kByte) refuse(place, "be uint8", show_dtype(facts.dtype));
    if (facts.sizes.size() != 1 || facts.numel != bytes || !is_contiguous(facts))
      refuse(place, "be contiguous of shape [" + std::to_string(bytes) + "], one bit a weight", show(facts.sizes));
    items_[i].mask = static_cast<uint8_t*>(remember(place, data, bytes, access));
  });
}

void Arguments::masters(Access access) {
  attach(
      "masters", next<Tensors>(), access, [](const Item&) { return DType::kFloat32; },
      [](Item& item, void* p) { item.master = static_cast<float*>(p); });
  for (size_t i = 0; i < items_.size(); ++i)
    if (items_[i].master != nullptr && items_[i].dtype == DType::kFloat32)
      refuse({"masters", static_cast<int64_t>(i)}, "be absent for a float32 parameter", "a master weight");
}

void Arguments::state(const char* name, int slot) {
  attach(
      name, next<Tensors>(), Access::kWrite, [](const Item& item) { return item.master != nullptr ? DType::kFloat32 : item.dtype; },
      [slot](Item& item, void* p) { item.state[slot] = p; });
}

void Arguments::steps(const char* name) {
  const Tensors& steps = next<Tensors>();
  if (steps.size() != items_.size())
    refuse(name, "have one tensor a parameter (" + std::to_string(items_.size()) + ")", std::to_string(steps.size()));
  for (size_t i = 0; i < steps.size(); ++i)
    items_[i].step = static_cast<float*>(scalar(Place(name, i), steps[i], ScalarType::Float, Access::kWrite));
}

// ---- Scalars and numbers ----

void* Arguments::scalar(Place place, AtenTensorHandle t, ScalarType dtype, Access access) {
  const Facts facts = strided(place, t);
  if (facts.dtype != number_of(dtype)) refuse(place, "be " + show(dtype), show_dtype(facts.dtype));
  if (facts.numel != 1) refuse(place, "have one element", "shape " + show(facts.sizes));
  on_device(place, t);
  return remember(place, data_of(t), aoti_torch_dtype_element_size(facts.dtype), access);
}

void Arguments::flag(const char* name, int32_t*& flag) {
  flag = static_cast<int32_t*>(scalar(name, next<MaybeTensor>()->get(), ScalarType::Int, Access::kWrite));
}

void Arguments::scalar(const char* name, float*& data, Access access) {
  const MaybeTensor& t = next<MaybeTensor>();
  data = t.has_value() ? static_cast<float*>(scalar(name, t->get(), ScalarType::Float, access)) : nullptr;
}

void Arguments::per_item(const char* name, PerItem& numbers) {
  AtenTensorHandle t = next<MaybeTensor>()->get();
  const Facts facts = strided(name, t);
  if (facts.dtype != kFloat) refuse(name, "be float32", show_dtype(facts.dtype));
  const size_t dim = facts.sizes.size(), items = items_.size();
  if (dim > 1 || (dim == 1 && (static_cast<size_t>(facts.numel) != items || !is_contiguous(facts))))
    refuse(name, "have shape [] or [" + std::to_string(items) + "]", show(facts.sizes));
  on_device(name, t);
  numbers = {static_cast<const float*>(remember(name, data_of(t), facts.numel * sizeof(float), Access::kRead)), facts.numel != 1};
}

void Arguments::sets(const char* name, const int64_t*& per_set, int64_t& num_sets) {
  const Integers& sets = next<Integers>();
  AtenTensorHandle t = next<MaybeTensor>()->get();
  const Facts facts = strided(name, t);
  if (facts.dtype != kLong) refuse(name, "be int64", show_dtype(facts.dtype));
  if (facts.sizes.size() != 1 || !is_contiguous(facts)) refuse(name, "be contiguous of shape [number of selection sets]", show(facts.sizes));
  on_device(name, t);
  per_set = static_cast<const int64_t*>(remember(name, data_of(t), facts.numel * sizeof(int64_t), Access::kRead));
  num_sets = facts.numel;
  if (sets.size() != items_.size()) refuse("sets", "have one entry a tensor (" + std::to_string(items_.size()) + ")", std::to_string(sets.size()));
  for (size_t i = 0; i < sets.size(); ++i) {
    if (sets[i] < -1 || sets[i] >= num_sets) refuse(Place("sets", i), "be in [-1, " + std::to_string(num_sets) + ")", std::to_string(sets[i]));
    items_[i].set = sets[i];
  }
}

void Arguments::nm(int& n_out, int& m_out) {
  const Integers& prune = next<Integers>();
  const int64_t n = next<int64_t>(), m = next<int64_t>();
  if (n < 1 || n >= m || m > 1024) refuse("n, m", "satisfy 1 <= n < m <= 1024", "n=" + std::to_string(n) + ", m=" + std::to_string(m));
  n_out = static_cast<int>(n);
  m_out = static_cast<int>(m);
  if (prune.size() != items_.size()) refuse("prune", "have one entry a tensor (" + std::to_string(items_.size()) + ")", std::to_string(prune.size()));
  for (size_t i = 0; i < prune.size(); ++i) {
    if (prune[i] != 0 && prune[i] != 1) refuse(Place("prune", i), "be 0 or 1", std::to_string(prune[i]));
    const Facts& like = lists_.like[i];
    if (prune[i] == 0 || like.numel == 0) continue;
    if (like.sizes.size() < 2 || like.sizes[1] % m != 0)
      refuse(Place("prune", i), "be 0 for a tensor whose axis 1 is not a multiple of m=" + std::to_string(m), "1 for shape " + show(like.sizes));
    items_[i].inner = like.strides[1];  // a dense tensor, and axis 1 has at least m > 1 elements
  }
}

template <class T>
const std::vector<T>& Arguments::per_tensor(const char* name) {
  const std::vector<T>& values = next<std::vector<T>>();
  if (values.size() != 1 && values.size() != items_.size())
    refuse(name, "have 1 entry or one a tensor (" + std::to_string(items_.size()) + ")", std::to_string(values.size()));
  return values;
}

void Arguments::options(const char* name, Integers& values, const char*) { values = per_tensor<int64_t>(name); }
void Arguments::options(const char* name, Numbers& values, const char*) { values = per_tensor<double>(name); }

// ---- Results ----

std::optional<Tensor> Arguments::like() const {
  if (like_ == nullptr) return std::nullopt;
  AtenTensorHandle owned;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(like_, &owned));
  return Tensor(owned);
}

// Not by torch::stable::new_empty, which looks the op up by its name in each call.
void* Arguments::made(ScalarType type, std::initializer_list<int64_t> sizes, Content content) {
  int32_t dtype = number_of(type), layout = kStrided, device = device_.first;
  const auto make = content == Content::kZeros ? aoti_torch_aten_new_zeros : aoti_torch_aten_new_empty;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(make(like_, sizes.begin(), sizes.size(), &dtype, &layout, &device, device_.second, nullptr, &result));
  results_.emplace_back(result);
  return results_.back().mutable_data_ptr();
}

void Arguments::result(const char*, int32_t*& data, std::initializer_list<int64_t> sizes) {
  data = static_cast<int32_t*>(made(ScalarType::Int, sizes, Content::kAny));
}

void Arguments::result(const char*, int64_t*& data, std::initializer_list<int64_t> sizes, Content content) {
  data = static_cast<int64_t*>(made(ScalarType::Long, sizes, content));
}

void Arguments::result(const char*, float*& data, std::initializer_list<int64_t> sizes) {
  data = static_cast<float*>(made(ScalarType::Float, sizes, Content::kAny));
}

}  // namespace cram
