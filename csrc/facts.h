// What the checks ask of a tensor: its metadata, read once, since every question is a call into libtorch; and the words of messages for it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>

#include "number.h"

namespace cram {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Device = std::pair<int32_t, int32_t>;  // type and index

// Of a strided tensor.
struct Facts {
  int32_t dtype;  // libtorch's number
  int64_t numel;
  Sizes sizes, strides;
};

std::string show(Sizes values);   // [2, 3]
std::string show(ScalarType t);   // float32
std::string show(Device device);  // cuda:0

// Libtorch's numbers. It does not change them while it is loaded.
inline int32_t number_of(ScalarType t) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(t)); }
inline const int32_t kStrided = aoti_torch_layout_strided(), kCpu = aoti_torch_device_type_cpu(), kCuda = aoti_torch_device_type_cuda();
inline const int32_t kDtypes[] = {number_of(ScalarType::Float), number_of(ScalarType::BFloat16), number_of(ScalarType::Half)};  // by DType
inline const int32_t kByte = number_of(ScalarType::Byte), kFloat = kDtypes[0], kLong = number_of(ScalarType::Long);

inline int32_t number_of(DType t) { return kDtypes[static_cast<int>(t)]; }

inline std::optional<DType> dtype_of(int32_t number) {
  for (DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    if (number == number_of(t)) return t;
  return std::nullopt;
}

inline ScalarType scalar_type_of(DType t) {
  return t == DType::kFloat32 ? ScalarType::Float : t == DType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;
}

inline Device device_of(AtenTensorHandle t) {
  int32_t type, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &type));
  if (type != kCpu) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &index));
  return {type, index};
}

inline void* data_of(AtenTensorHandle t) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &data));
  return data;
}

inline bool is_strided(AtenTensorHandle t) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t, &layout));
  return layout == kStrided;
}

inline Facts facts_of(AtenTensorHandle t) {
  Facts facts;
  int64_t *sizes, *strides, dim;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &facts.dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
  facts.sizes = {sizes, static_cast<size_t>(dim)};
  facts.strides = {strides, static_cast<size_t>(dim)};
  facts.numel = 1;
  for (int64_t d = 0; d < dim; ++d) facts.numel *= sizes[d];
  return facts;
}

inline bool same(Sizes a, Sizes b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)  // std::equal would call memcmp for two numbers
    if (a[d] != b[d]) return false;
  return true;
}

// Of tensors of one shape: equal but for dims of one element, whose stride means nothing.
inline bool same_strides(const Facts& a, const Facts& b) {
  for (size_t d = 0; d < a.sizes.size(); ++d)
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

inline bool is_contiguous(const Facts& t) {
  if (t.numel < 2) return true;
  int64_t expected = 1;
  for (size_t d = t.sizes.size(); d-- > 0;) {
    if (t.sizes[d] > 1 && t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

// Non-overlapping and without holes.
bool is_dense(const Facts& t);

}  // namespace cram
