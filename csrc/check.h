// Checks of op arguments, from metadata alone, and their translation to Items. Shared by every backend.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "item.h"

namespace cram {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<Tensor>;

// What messages call an argument, or the entry of a list.
struct Place {
  Place(const char* name, int64_t index = -1) : name(name), index(static_cast<int32_t>(index)) {}
  const char* name;
  int32_t index;  // -1: no list
};

std::string show(Place place);                                      // grads[3]
std::string show(torch::headeronly::IntHeaderOnlyArrayRef values);  // [2, 3]
std::string show(torch::headeronly::ScalarType t);                  // float32

// The metadata of a strided tensor, read once: every question is a call into libtorch.
struct Facts {
  int32_t dtype;  // libtorch's number
  int64_t numel;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
};

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

// Checks one call. Each method throws std::runtime_error "op: argument must ..., got ..." before anything is changed; words are made only then.
// Nothing is remembered from call to call: to find out whether a tensor has changed costs as much as to check it.
class Check {
 public:
  explicit Check(const char* op);
  Check(const Check&) = delete;
  ~Check();

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
  void satisfy_nm(int64_t n, int64_t m) const;

  // One element of `dtype` on the device of the list.
  void* scalar(Place place, const Tensor& t, torch::headeronly::ScalarType dtype, bool written);
  void* scalar(const char* name, const MaybeTensor& t, bool written) {
    return t.has_value() ? scalar(name, *t, torch::headeronly::ScalarType::Float, written) : nullptr;
  }
  // float32, [] or [items].
  void per_item(const char* name, const Tensor& t, size_t items);
  template <class T>
  void per_item(const char* name, const std::vector<T>& values, size_t items) {
    if (values.size() != 1 && values.size() != items)
      refuse(name, "have 1 entry or one a tensor (" + std::to_string(items) + ")", std::to_string(values.size()));
  }

  // What u is computed from, read only; grads may be absent.
  std::vector<Item> uphill(const Tensors& params, const Tensors& grads, const Tensor& rho, const MaybeTensor& inv_scale, const Tensors& masters);
  std::vector<Item> perturb(const PerturbArguments&, bool masks_written);
  std::vector<Item> update(const UpdateArguments&, bool grads_written, bool masters_written);

  // No written tensor shares memory with another of the call. Last, when all lists are known.
  void no_overlap();

  [[noreturn]] void refuse(Place place, const std::string& wanted, const std::string& found) const;

 private:
  struct Extent {
    uintptr_t begin, end;
    Place place;
    bool written;
  };

  struct Start {
    uintptr_t address;
    uint32_t extent;
  };

  // Fills one pointer of each item from a list as long as the items; entries with 0 elements, or an empty list, leave it null.
  template <class Wanted, class Set>
  void attach(std::vector<Item>& items, const char* name, const Tensors& tensors, bool written, Wanted wanted, Set set);
  bool present(const char* name, const Tensors& tensors, const std::vector<Item>& items) const;
  Facts strided(Place place, const Tensor& t) const;
  void on_device(Place place, const Tensor& t);
  Facts dense(Place place, const Tensor& t);
  // Where the tensor's memory is; no_overlap looks at it.
  void* remember(Place place, const Tensor& t, int64_t bytes, bool written);
  void sort_starts();

  const char* op_;
  std::optional<std::pair<int32_t, int32_t>> device_;
  // Their memory, not what is in it, goes from call to call of a thread: new memory of the system would cost as much as the checks.
  struct Lists {
    std::vector<Facts> like;  // of the list that the others must match
    std::vector<Extent> extents;
    std::vector<Start> starts, sorted;
  } lists_;
  static thread_local Lists spare_;
};

}  // namespace cram
