// The arguments of an op as torch passes them, found by a visit: its schema, and their translation from torch's stack.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "op.h"

namespace cram {

using torch::stable::Tensor;

// The tensors of a list as torch hands them over, and their owner. A stable::Tensor for each, a shared pointer, would cost as much as its checks.
class Tensors {
 public:
  explicit Tensors(StableListHandle list);
  Tensors(Tensors&&) = default;
  ~Tensors() {
    for (AtenTensorHandle tensor : handles_) aoti_torch_delete_tensor_object(tensor);
  }

  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<Tensor>;
using Value = std::variant<Tensors, MaybeTensor, Integers, Numbers, int64_t, bool>;

class Signature : public Visitor {
 public:
  // "(Tensor(a!)[] params, ..., *, Tensor[] masters, ...) -> "
  std::string arguments() const;
  // "(Tensor thresholds, ...)"
  std::string returns() const { return "(" + returns_ + ")"; }
  // What torch hands over, in the order of the visit; torch's stack is empty then.
  std::vector<Value> unbox(StableIValue* stack) const;

  void main(const char* name, Access access) override { add("Tensor[]", name, access); }
  void list(const char* name, void* Item::*, Access access) override { add("Tensor[]", name, access); }
  void needed(const char* name, void* Item::*, Access access) override { add("Tensor[]", name, access); }
  void masks(Access access) override { add("Tensor[]", "masks", access); }
  void masters(Access access) override { add("Tensor[]", "masters", access, ""); }
  void state(const char* name, int) override { add("Tensor[]", name, Access::kWrite); }
  void steps(const char* name) override { add("Tensor[]", name, Access::kWrite); }
  void flag(const char* name, int32_t*&) override { add("Tensor", name, Access::kWrite); }
  void scalar(const char* name, float*&, Access access) override { add("Tensor?", name, access, "=None"); }
  void per_item(const char* name, PerItem&) override { add("Tensor", name); }
  void sets(const char* name, const int64_t*&, int64_t&) override { add("int[]", "sets"), add("Tensor", name); }
  void nm(int&, int&) override { add("int[]", "prune"), add("int", "n"), add("int", "m"); }
  void integer(const char* name, int64_t&) override { add("int", name); }
  void boolean(const char* name, bool&, const char* standard) override { add("bool", name, Access::kRead, std::string("=") + standard); }
  void options(const char* name, Integers&, const char* standard) override { add("int[]", name, Access::kRead, default_of(standard)); }
  void options(const char* name, Numbers&, const char* standard) override { add("float[]", name, Access::kRead, default_of(standard)); }
  void result(const char* name, int32_t*&, std::initializer_list<int64_t>) override { add_result(name); }
  void result(const char* name, int64_t*&, std::initializer_list<int64_t>, Content) override { add_result(name); }
  void result(const char* name, float*&, std::initializer_list<int64_t>) override { add_result(name); }

 private:
  struct Argument {
    std::string type, name;
    bool written, keyword;
    std::string standard;  // "=None"
  };

  static std::optional<std::string> default_of(const char* standard) {
    return standard == nullptr ? std::nullopt : std::optional(std::string("=[") + standard + "]");
  }
  void add(const char* type, const char* name, Access access = Access::kRead, std::optional<std::string> standard = std::nullopt) {
    arguments_.push_back({type, name, access == Access::kWrite, standard.has_value(), standard.value_or("")});
    positional_ += !standard.has_value();
  }
  void add_result(const char* name) { returns_ += std::string(returns_.empty() ? "" : ", ") + "Tensor " + name; }

  std::vector<Argument> arguments_;  // as visited
  size_t positional_ = 0;            // how many of them are not keywords
  std::string returns_;
};

template <class Op>
const Signature& signature() {
  static const Signature found = [] {
    Signature s;
    Op op;
    op.visit(s);
    op.results(s);
    return s;
  }();
  return found;
}

}  // namespace cram
