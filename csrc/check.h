// Checks of op arguments, from metadata alone, and their translation to Items. Shared by every backend.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "facts.h"
#include "signature.h"

namespace cram {

// Says what is wrong with a call.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}
  [[noreturn]] void refuse(Place place, const std::string& wanted, const std::string& found) const { cram::refuse(op_, place, wanted, found); }

 private:
  const char* op_;
};

// Checks one call, from metadata alone, and fills the op. Each method throws std::runtime_error "op: argument must ..., got ..." before anything is
// changed; words are made only then. Nothing is remembered from call to call: to find out whether a tensor has changed costs as much as to check it.
class Arguments : public Visitor, private Check {
 public:
  // buffers: lists may be handed over as a buffer, see Parts.
  Arguments(const char* op, std::vector<Item>& items, std::vector<Value> values, bool buffers);
  Arguments(const Arguments&) = delete;
  ~Arguments() override;

  void main(const char* name, Access) override;
  void list(const char* name, void* Item::*field, Access) override;
  void needed(const char* name, void* Item::*field, Access) override;
  void masks(Access) override;
  void masters(Access) override;
  void state(const char* name, int slot) override;
  void steps(const char* name) override;
  void flag(const char* name, int32_t*&) override;
  void scalar(const char* name, float*&, Access) override;
  void per_item(const char* name, PerItem&) override;
  void sets(const char* name, const int64_t*&, int64_t& num_sets) override;
  void nm(int& n, int& m) override;
  void integer(const char*, int64_t& value) override { value = next<int64_t>(); }
  void boolean(const char*, bool& value, const char*) override { value = next<bool>(); }
  void options(const char* name, Integers&, const char*) override;
  void options(const char* name, Numbers&, const char*) override;
  void result(const char*, int32_t*& data, std::initializer_list<int64_t> sizes) override;
  void result(const char*, int64_t*& data, std::initializer_list<int64_t> sizes, Content) override;
  void result(const char*, float*& data, std::initializer_list<int64_t> sizes) override;

  // No written tensor shares memory with another of the call. Last, when all arguments are known.
  void no_overlap();

  // The first tensor of the call; none where there is none.
  std::optional<Tensor> like() const;
  const std::vector<Tensor>& results() const { return results_; }

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

  template <class T>
  const T& next() {
    return std::get<T>(values_[next_++]);
  }
  // Fills one pointer of each item from a list as long as the items; entries with 0 elements, or an empty list, leave it null.
  template <class Wanted, class Set>
  void attach(const char* name, const Tensors& tensors, Access, Wanted wanted, Set set);
  bool present(const char* name, const Tensors& tensors) const;
  // What stands for a list of tensors that lie in one uint8 buffer: the buffer and, on the CPU, an int64 table of them: where it begins, the dtype (a
  // DType, or 3: uint8), dim, sizes, strides; then the next. To hand a tensor over costs torch more than to check it here.
  struct Parts {
    uint8_t* buffer;
    int64_t bytes;
    const int64_t *next, *end;
  };
  std::optional<Parts> parts_of(const char* name, const Tensors& tensors);
  std::pair<Facts, void*> next_part(Place place, Parts& parts) const;
  // Calls use(place, item, facts, data) for each tensor of a list that is not absent.
  template <class Use>
  void for_each(const char* name, const Tensors& tensors, Use use);
  // One for all or one each.
  template <class T>
  const std::vector<T>& per_tensor(const char* name);
  // One element of `dtype` on the device of the call.
  void* scalar(Place place, AtenTensorHandle t, ScalarType dtype, Access);
  Facts strided(Place place, AtenTensorHandle t) const;
  void on_device(Place place, AtenTensorHandle t);
  Facts dense(Place place, AtenTensorHandle t);
  // Where the tensor's memory is; no_overlap looks at it.
  void* remember(Place place, void* data, int64_t bytes, Access);
  // The memory of a new result.
  void* made(ScalarType type, std::initializer_list<int64_t> sizes, Content content);
  void sort_starts();

  std::vector<Item>& items_;
  const std::vector<Value> values_;
  size_t next_ = 0;
  AtenTensorHandle like_ = nullptr;
  std::vector<Tensor> results_;
  bool writes_ = false;
  const bool buffers_;
  Device device_;  // of like_
  // Their memory, not what is in it, goes from call to call of a thread: new memory of the system would cost as much as the checks.
  struct Lists {
    std::vector<Facts> like;  // of the list that the others must match
    std::vector<Extent> extents;
    std::vector<Start> starts, sorted;
  } lists_;
  static thread_local Lists spare_;
};

}  // namespace cram
