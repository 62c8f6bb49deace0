// One tensor of a list, as kernels see it: pointers and numbers, no torch.
#pragma once

#include "number.h"

namespace cram {

struct Item {
  int64_t numel = 0;
  DType dtype = DType::kFloat32;  // of param, grad, first_grad, saved; of the states too where there is no master
  void* param = nullptr;
  void* grad = nullptr;              // optional
  void* first_grad = nullptr;        // optional
  void* saved = nullptr;             // optional
  uint8_t* mask = nullptr;           // optional, bits
  float* master = nullptr;           // optional
  void* state[3] = {};               // optional: momentum; exp_avg, exp_avg_sq, max_exp_avg_sq
  float* step = nullptr;             // Adam's
  float rho = 0;
  int64_t set = -1;                // top-k: its selection set
  int64_t inner = 0;               // N:M: elements between neighbours along axis 1; 0: not pruned
};

}  // namespace cram
