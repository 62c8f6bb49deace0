// The tensors of perturbing and pruning launches.
#pragma once

#include "table.h"

namespace cram {
namespace cuda {

struct PerturbEntry {
  void* param;
  const void* grad;     // optional: without one, u is the weight as it is
  void* saved;          // optional
  uint8_t* mask;        // optional
  const float* master;  // optional
  int64_t numel;
  int64_t extra;        // top-k: place of its first weight within its selection set; N:M: elements between neighbours along axis 1, 0: not pruned
  int32_t set;          // top-k: its selection set, -1: none
  uint32_t index : 29;  // in the list of the call
  uint32_t whole : 1;   // all arrays are aligned to 16 bytes, numel is a multiple of 8: no vector is cut (WholeChunk)
  uint32_t dtype : 2;
};

inline PerturbEntry perturb_entry(const Item& item, size_t index, int64_t extra = 0) {
  return {item.param,
          item.grad,
          item.saved,
          item.mask,
          item.master,
          item.numel,
          extra,
          static_cast<int32_t>(item.set),
          static_cast<uint32_t>(index),
          whole_vectors(item.numel, {item.param, item.grad, item.saved, item.master}),
          static_cast<uint32_t>(item.dtype)};
}

using PerturbTable = Table<PerturbEntry>;

}  // namespace cuda
}  // namespace cram
