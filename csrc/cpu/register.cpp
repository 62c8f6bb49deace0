// The ops of the CPU backend.
#include "../register.h"

#include "torch_pool.h"

namespace {

struct Cpu {
  static constexpr bool kOnlyChecks = false;
  static constexpr const char* kPrefix = "";

  template <class Op>
  static void run(Op& op, const std::optional<cram::Tensor>&) {
    op.run(cram::TorchContext().context);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) { cram::register_ops<Cpu>(m, cram::Ops()); }
