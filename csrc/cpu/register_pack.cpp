// The ops on packed 2:4 weights.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"
#include "drivers.h"
#include "torch_pool.h"

namespace cram {
namespace {

void pack_24_cpu(const Tensors& weights, const Tensors& packed, const Tensors& metas) {
  pack_24(TorchContext().context, pack_items(weights, packed, metas));
}

void unpack_24_cpu(const Tensors& weights, const Tensors& packed, const Tensors& metas) {
  unpack_24(TorchContext().context, unpack_items(weights, packed, metas));
}

Tensor nm_violations_cpu(const Tensors& weights, int64_t n, int64_t m) {
  const std::vector<GroupItem> items = violation_items(weights, n, m);
  std::vector<Violations> found(items.size());
  nm_violations(TorchContext().context, items, static_cast<int>(n), static_cast<int>(m), found.data());
  Tensor result = torch::stable::empty({static_cast<int64_t>(items.size()), 3}, torch::headeronly::ScalarType::Long);
  int64_t* rows = result.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < items.size(); ++i) {
    rows[3 * i] = found[i].groups;
    rows[3 * i + 1] = found[i].groups > 0 ? found[i].first : -1;
    rows[3 * i + 2] = found[i].nonzeros;
  }
  return result;
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) {
  m.impl("pack_24_", TORCH_BOX(&cram::pack_24_cpu));
  m.impl("unpack_24_", TORCH_BOX(&cram::unpack_24_cpu));
  m.impl("nm_violations", TORCH_BOX(&cram::nm_violations_cpu));
}
