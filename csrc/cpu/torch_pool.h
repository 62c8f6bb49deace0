// torch's own threads for the CPU backend's ops.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>

#include "drivers.h"
#include "simd.h"

namespace cram {

// Inside another parallel region, one thread.
inline void run_in_torch(int threads, void (*body)(void*, int), void* context) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, static_cast<int>(worker));
  });
}

struct TorchContext {
  explicit TorchContext(int64_t most = INT_MAX) : pool{static_cast<int>(std::min<int64_t>(most, torch::stable::get_num_threads())), run_in_torch} {}

  Pool pool;
  Context context{pool, kernels()};
};

}  // namespace cram
