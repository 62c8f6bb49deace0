#include "signature.h"

namespace cram {

Tensors::Tensors(StableListHandle list) {
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
}

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
      values.emplace_back(Tensors(to<StableListHandle>(value)));
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
