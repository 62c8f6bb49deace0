// The tensors and settings of one updating launch (restore_, restore_combine_, restore_sgd_, restore_adam_), passed by value.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "../adam.h"
#include "../sgd.h"
#include "launchers.h"
#include "table.h"

namespace cram {
namespace cuda {

// 48 bits of an address or a size: with 64, 450 tensors of Adam would not fit into a launch.
class Bits48 {
 public:
  Bits48() = default;
  explicit Bits48(uint64_t value) : words_{static_cast<uint16_t>(value), static_cast<uint16_t>(value >> 16), static_cast<uint16_t>(value >> 32)} {
    if (value >> 48 != 0) throw std::runtime_error("updates on CUDA: an address or a size must be below 2^48, got " + std::to_string(value));
  }
  explicit Bits48(const void* p) : Bits48(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p))) {}

  CRAM_HOST_DEVICE uint64_t value() const { return words_[0] | static_cast<uint64_t>(words_[1]) << 16 | static_cast<uint64_t>(words_[2]) << 32; }
  template <class T>
  CRAM_HOST_DEVICE T* as() const {
    return reinterpret_cast<T*>(value());
  }

 private:
  uint16_t words_[3];
};

constexpr int kStates = 3;
constexpr int kSettings = 16;  // different ones in a launch

// A tensor of an updating launch.
struct UpdateEntry {
  Bits48 param;
  Bits48 grad;        // optional
  Bits48 first_grad;  // optional
  Bits48 origin;      // the master weight, or else the saved one; optional
  Bits48 mask;        // optional
  Bits48 state[kStates];
  Bits48 step;
  Bits48 numel;
  uint16_t index[2];  // in the list of the call, low and high half
  uint16_t dtype : 2;
  uint16_t has_master : 1;
  uint16_t whole : 1;  // all arrays are aligned to 16 bytes, numel is a multiple of 8: no vector is cut (WholeChunk)
  uint16_t setting : 12;

  CRAM_HOST_DEVICE bool has_gradient() const { return grad.value() != 0 || first_grad.value() != 0; }
};

using UpdateTable = Table<UpdateEntry>;
static_assert(UpdateTable::kCapacity == kMaxTensors, "450 tensors in one launch");

inline UpdateEntry update_entry(const Item& item, size_t index, int setting) {
  UpdateEntry entry;
  entry.param = Bits48(item.param);
  entry.grad = Bits48(item.grad);
  entry.first_grad = Bits48(item.first_grad);
  entry.origin = Bits48(item.master != nullptr ? item.master : item.saved);
  entry.mask = Bits48(item.mask);
  for (int s = 0; s < kStates; ++s) entry.state[s] = Bits48(item.state[s]);
  entry.step = Bits48(item.step);
  entry.numel = Bits48(static_cast<uint64_t>(item.numel));
  entry.index[0] = static_cast<uint16_t>(index);
  entry.index[1] = static_cast<uint16_t>(index >> 16);
  entry.dtype = static_cast<uint16_t>(item.dtype);
  entry.has_master = item.master != nullptr;
  entry.whole = whole_vectors(item.numel, {item.param, item.grad, item.first_grad, item.master, item.saved, item.state[0], item.state[1], item.state[2]});
  entry.setting = static_cast<uint16_t>(setting);
  return entry;
}

// What a launch has beside its tensors. Setting: the numbers of an optimizer that several tensors share.
template <class Setting>
struct UpdateCall {
  Update update;
  PerItem lr;
  bool last;  // of the launches of the op: it lowers the flag
  Setting settings[kSettings];
};

template <class Setting>
struct UpdateLaunch {
  UpdateTable table;
  UpdateCall<Setting> call;
};

// The launches of a list; settings: one an item. At least one, since the flag must be lowered whatever the list.
template <class Setting>
std::vector<UpdateLaunch<Setting>> update_launches(const std::vector<Item>& items, const Update& update, const PerItem& lr,
                                                   const std::vector<Setting>& settings) {
  static_assert(sizeof(UpdateTable) + sizeof(UpdateCall<Setting>) + alignof(UpdateCall<Setting>) <= kArgumentBytes, "the arguments of a kernel");
  std::vector<UpdateLaunch<Setting>> launches;
  for (size_t begin = 0; begin < items.size();) {
    UpdateCall<Setting> call = {update, lr, false, {}};
    std::vector<int> chosen;  // the setting of each item from begin on
    int known = 0;
    for (size_t i = begin; i < items.size(); ++i) {
      int s = 0;
      while (s < known && !(call.settings[s] == settings[i])) ++s;
      if (s == kSettings) break;
      if (s == known) call.settings[known++] = settings[i];
      chosen.push_back(s);
    }
    const auto tables = make_tables<UpdateEntry>(
        chosen.size(), [&](size_t i) { return update_entry(items[begin + i], begin + i, chosen[i]); },
        [&](size_t i) { return chunks_of(items[begin + i].param, items[begin + i].numel); });
    for (const UpdateTable& table : tables) launches.push_back({table, call});
    begin += chosen.size();
  }
  if (launches.empty()) launches.push_back({{}, {update, lr, false, {}}});
  launches.back().call.last = true;
  return launches;
}

}  // namespace cuda
}  // namespace cram
