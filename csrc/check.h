// Checks of op arguments, from metadata alone, and their translation to Items. Shared by every backend.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "item.h"
#include "pack.h"

namespace cram {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<Tensor>;

std::string show(torch::headeronly::IntHeaderOnlyArrayRef values);  // [2, 3]
std::string show(torch::headeronly::ScalarType t);                 // float32

// The arguments that all perturbations share, and those that all updates share.
struct PerturbArguments {
  const Tensors &params, &grads, &saved, &masks;
  const Tensor &perturbed, &rho;
  const MaybeTensor &inv_scale, &found_inf;
  const Tensors& masters;
};

struct UpdateArguments {
  const Tensors &params, &saved, &grads, &first_grads, &masks;
  const Tensor& perturbed;
  const MaybeTensor &inv_scale, &first_inv_scale, &found_inf;
  const Tensors& masters;
};

// Checks one call. Each method throws std::runtime_error "op: argument must ..., got ..." before anything is changed.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // The items of a list `name` of dense tensors of a supported dtype on one device.
  std::vector<Item> list(const char* name, const Tensors& tensors, bool written);
  void masks(std::vector<Item>& items, const Tensors& masks, bool written);
  void masters(std::vector<Item>& items, const Tensors& masters, bool written);
  // Optimizer state: of the parameter's dtype, or float32 beside a master weight.
  void state(std::vector<Item>& items, const char* name, const Tensors& tensors, int slot);
  void steps(std::vector<Item>& items, const Tensors& steps);
  // `name`: of the tensor that has one entry a selection set.
  void sets(std::vector<Item>& items, const Integers& sets, const Tensor& k, const char* name = "k");
  void nm(std::vector<Item>& items, const Integers& prune, int64_t n, int64_t m);

  // 2-D weights with their packed numbers and metadata; either side is written.
  std::vector<PackItem> packed(const Tensors& weights, const Tensors& packed, const Tensors& metas, bool weights_written);
  // Weights whose axis 1 is a multiple of m.
  std::vector<GroupItem> groups(const Tensors& weights, int64_t n, int64_t m);

  // One element of `dtype` on the device of the list.
  void* scalar(const char* name, const Tensor& t, const char* dtype, bool written, int64_t index = -1);
  void* scalar(const char* name, const MaybeTensor& t, bool written) {
    return t.has_value() ? scalar(name, *t, "float32", written) : nullptr;
  }
  // float32, [] or [items].
  void per_item(const char* name, const Tensor& t, size_t items);
  template <class T>
  void per_item(const char* name, const std::vector<T>& values, size_t items) {
    require(values.size() == 1 || values.size() == items, name, "have 1 entry or one a tensor (" + std::to_string(items) + ")",
            std::to_string(values.size()));
  }

  // What u is computed from, read only; grads may be absent.
  std::vector<Item> uphill(const Tensors& params, const Tensors& grads, const Tensor& rho, const MaybeTensor& inv_scale, const Tensors& masters);
  std::vector<Item> perturb(const PerturbArguments&, bool masks_written);
  std::vector<Item> update(const UpdateArguments&, bool grads_written, bool masters_written);

  // No written tensor shares memory with another of the call. Last, when all lists are known.
  void no_overlap();

  void require(bool holds, const std::string& what, const std::string& wanted, const std::string& found) const;

 private:
  struct Extent {
    uintptr_t begin, end;
    const char* name;
    int64_t index;  // -1: no list
    bool written;
  };

  // Fills one pointer of each item from a list as long as the items; entries with 0 elements, or an empty list, leave it null.
  void attach(std::vector<Item>& items, const char* name, const Tensors& tensors, bool written, DType (*wanted)(const Item&),
              const std::function<void(Item&, void*)>& set);
  bool present(const char* name, const Tensors& tensors, const std::vector<Item>& items) const;
  void strided(const std::string& what, const Tensor& t);
  void on_device(const std::string& what, const Tensor& t);
  void dense(const std::string& what, const Tensor& t);
  void remember(const char* name, int64_t index, const Tensor& t, bool written);
  void matrix(const char* name, size_t index, const Tensor& t, torch::headeronly::ScalarType dtype, int64_t rows, int64_t cols, bool written);
  static std::string entry(const char* name, int64_t index);

  const char* op_;
  const Tensors* like_ = nullptr;  // the list that the others must match
  std::optional<std::pair<int32_t, int32_t>> device_;
  std::vector<Extent> extents_;
};

}  // namespace cram
