#include "facts.h"

#include <algorithm>
#include <sstream>
#include <vector>

namespace cram {

std::string show(Sizes values) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
  return out.str();
}

std::string show(ScalarType t) {
  static constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Float, "float32"},
      {ScalarType::BFloat16, "bfloat16"},
      {ScalarType::Half, "float16"},
      {ScalarType::Double, "float64"},
      {ScalarType::Byte, "uint8"},
      {ScalarType::Bool, "bool"},
      {ScalarType::Char, "int8"},
      {ScalarType::Short, "int16"},
      {ScalarType::Int, "int32"},
      {ScalarType::Long, "int64"},
      {ScalarType::Float8_e4m3fn, "float8_e4m3fn"},
      {ScalarType::Float8_e5m2, "float8_e5m2"},
      {ScalarType::ComplexFloat, "complex64"},
  };
  for (const auto& [type, name] : kNames)
    if (type == t) return name;
  return "dtype number " + std::to_string(static_cast<int>(t));
}

std::string show(Device device) {
  if (device.first == kCpu) return "cpu";
  const std::string type = device.first == kCuda ? "cuda" : "device type " + std::to_string(device.first);
  return type + ":" + std::to_string(device.second);
}

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

}  // namespace cram
