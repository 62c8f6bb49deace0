// The schemas of the ops. Each op X has a twin check_X with the same arguments that only checks them: backends written in Python run it first, so
// that every backend refuses the same input with the same words.
#include "register.h"

namespace cram {
namespace {

struct OnlyChecks {
  static constexpr bool kOnlyChecks = true;
  static constexpr const char* kPrefix = "check_";
};

template <class... Op>
void define(torch::stable::detail::StableLibrary& m, List<Op...>) {
  const auto define_one = [&](std::string name, const Signature& s) {
    m.def((name + s.arguments() + s.returns()).c_str());
    m.def((OnlyChecks::kPrefix + name + s.arguments() + "()").c_str());
  };
  (define_one(Op::kName, signature<Op>()), ...);
}

template <class... Op>
std::string names(List<Op...>) {
  std::string all;
  ((all += (all.empty() ? "" : " ") + std::string(Op::kName)), ...);
  return all;
}

// What handing lists over costs (benchmarks/growth.py).
void nothing(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  for (int i = 0; i < 4; ++i) Tensors(to<StableListHandle>(stack[i]));
  to<Integers>(stack[4]);
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY(cram_kernels, m) {
  cram::define(m, cram::Ops());
  m.def("nothing(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] saved, Tensor(c!)[] masks, int[] sets) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CompositeExplicitAutograd, m) {
  cram::register_ops<cram::OnlyChecks>(m, cram::Ops());
  m.impl("nothing", &cram::nothing);
}

// Names with a space between them, for Python (cram_kernels/_native.py).
extern "C" __attribute__((visibility("default"))) const char* cram_ops() {
  static const std::string names = cram::names(cram::Ops());
  return names.c_str();
}
