// A boxed function for each op and backend: take the arguments from torch's stack, check and translate them, let the backend run, return the results.
#pragma once

#include "check.h"
#include "ops.h"

namespace cram {

// Backend::run(op, like): like, a tensor on the device of the call, none where it has none.
template <class Op, class Backend>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Op op;
  Arguments arguments(Op::kName, op.items, signature<Op>().unbox(stack), !Backend::kOnlyChecks);
  op.visit(arguments);
  op.finish();
  arguments.no_overlap();
  if constexpr (!Backend::kOnlyChecks) {
    op.results(arguments);
    Backend::run(op, arguments.like());
  }
  for (const Tensor& result : arguments.results()) *stack++ = torch::stable::detail::from(result);
}

template <class Backend, class... Op>
void register_ops(torch::stable::detail::StableLibrary& m, List<Op...>) {
  (m.impl((std::string(Backend::kPrefix) + Op::kName).c_str(), &boxed<Op, Backend>), ...);
}

}  // namespace cram
