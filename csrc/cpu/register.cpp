// The ops of the CPU backend.
#include "../register.h"

#include "torch_pool.h"

namespace {

constexpr int64_t kWeightsPerThread = 16384;  // to wake a thread for fewer, and to wait for it, takes longer than they do

struct Cpu {
  static constexpr bool kOnlyChecks = false;
  static constexpr const char* kPrefix = "";

  template <class Op>
  static void run(Op& op, const std::optional<cram::Tensor>&) {
    int64_t weights = 0;
    for (const cram::Item& item : op.items) weights += item.numel;
    op.run(cram::TorchContext(1 + weights / kWeightsPerThread).context);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) { cram::register_ops<Cpu>(m, cram::Ops()); }
