// What an op is made of, torch-free: an Op holds a call as kernels see it, pointers and numbers, and tells a Visitor its arguments.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "item.h"

namespace cram {

// What messages call an argument, or the entry of a list.
struct Place {
  Place(const char* name, int64_t index = -1) : name(name), index(static_cast<int32_t>(index)) {}
  const char* name;
  int32_t index;  // -1: no list
};

inline std::string show(Place place) { return place.name + (place.index < 0 ? "" : "[" + std::to_string(place.index) + "]"); }

[[noreturn]] inline void refuse(const char* op, Place place, const std::string& wanted, const std::string& found) {
  throw std::runtime_error(std::string(op) + ": " + show(place) + " must " + wanted + ", got " + found);
}

// A float32 for all tensors, or one each, on their device.
struct PerItem {
  const float* values = nullptr;
  bool each = false;

  float at(size_t i) const { return values[each ? i : 0]; }
};

// The entry of tensor i in a list that has one entry for all tensors, or one each.
template <class T>
T at(const std::vector<T>& values, size_t i) {
  return values[values.size() == 1 ? 0 : i];
}

enum class Access { kRead, kWrite };

// One method a role that an argument can have. Ops call them in the order in which their arguments are checked; the schema has that order too, but
// for keyword arguments (those with a default, and masters), which come last. Lists are translated to a field of the Items; a tensor of 0 elements,
// or an empty list, leaves it null.
class Visitor {
 public:
  virtual ~Visitor() = default;

  virtual void main(const char* name, Access) = 0;                         // the list that the others must match; Item::param
  virtual void list(const char* name, void* Item::*field, Access) = 0;     // tensors like the main list's
  virtual void needed(const char* name, void* Item::*field, Access) = 0;   // the same, and none may be absent
  virtual void masks(Access) = 0;                                          // bits
  virtual void masters(Access) = 0;                                        // float32, beside 16-bit parameters
  virtual void state(const char* name, int slot) = 0;                      // written; of the parameter's dtype, float32 beside a master
  virtual void steps(const char* name) = 0;                                // written; a float32 each
  virtual void flag(const char* name, int32_t*&) = 0;                      // written; an int32
  virtual void scalar(const char* name, float*&, Access) = 0;              // optional, keyword: a float32
  virtual void per_item(const char* name, PerItem&) = 0;                   // float32 [] or [items]
  virtual void sets(const char* name, const int64_t*&, int64_t& num_sets) = 0;  // two arguments: Item::set, and `name`, an int64 a set
  virtual void nm(int& n, int& m) = 0;                                     // three arguments: prune, for Item::inner, and n, m
  virtual void integer(const char* name, int64_t&) = 0;
  virtual void boolean(const char* name, bool&, const char* standard) = 0;
  // A number for all tensors, or one each; with a default a keyword.
  virtual void options(const char* name, std::vector<int64_t>&, const char* standard = nullptr) = 0;
  virtual void options(const char* name, std::vector<double>&, const char* standard) = 0;

  enum class Content { kAny, kZeros };
  virtual void result(const char* name, int32_t*&, std::initializer_list<int64_t> sizes) = 0;
  virtual void result(const char* name, int64_t*&, std::initializer_list<int64_t> sizes, Content = Content::kAny) = 0;
  virtual void result(const char* name, float*&, std::initializer_list<int64_t> sizes) = 0;
};

struct Context;
namespace cuda {
struct Context;
}

// What every op has. Its own: kName; visit(), its arguments; finish(), what is checked or computed once they are known; results(), what it returns;
// and run(), once a backend.
struct Op {
  std::vector<Item> items;

  void finish() {}
  void results(Visitor&) {}
};

}  // namespace cram
