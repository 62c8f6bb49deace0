#include "signature.h"

namespace cram {

std::string Signature::arguments() const {
  std::string positional, keywords;
  char alias = 'a';
  for (const Argument& a : arguments_) {
    std::string type = a.type;
    if (a.written) type.insert(std::string("Tensor").size(), std::string("(") + alias++ + "!)");
    std::string& text = a.keyword ? keywords : positional;
    text += (text.empty() ? "" : ", ") + type + " " + a.name + a.standard;
  }
  return "(" + positional + (keywords.empty() ? "" : ", *, ") + keywords + ") -> ";
}

std::vector<Value> Signature::unbox(StableIValue* stack) const {
  using torch::stable::detail::to;
  std::vector<Value> values;
  values.reserve(arguments_.size());
  size_t positional = 0, keyword = positional_;
  for (const Argument& a : arguments_) {
    const StableIValue value = stack[a.keyword ? keyword++ : positional++];
    if (a.type == "Tensor[]")
      values.emplace_back(to<Tensors>(value));
    else if (a.type == "Tensor?")
      values.emplace_back(to<MaybeTensor>(value));
    else if (a.type == "Tensor")
      values.emplace_back(MaybeTensor(to<Tensor>(value)));
    else if (a.type == "int[]")
      values.emplace_back(to<Integers>(value));
    else if (a.type == "float[]")
      values.emplace_back(to<Numbers>(value));
    else if (a.type == "int")
      values.emplace_back(to<int64_t>(value));
    else
      values.emplace_back(to<bool>(value));
  }
  return values;
}

}  // namespace cram
