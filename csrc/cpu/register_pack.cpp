// The ops on packed 2:4 weights: check, translate, run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"
#include "drivers.h"
#include "torch_pool.h"

namespace cram {
namespace {

using torch::headeronly::ScalarType;

std::vector<PackItem> pack_items(const Tensors& weights, const Tensors& packed, const Tensors& metas, const char* op, bool weights_written) {
  Check check(op);
  std::vector<PackItem> items = check.packed(weights, packed, metas, weights_written);
  check.no_overlap();
  return items;
}

void check_pack_24_(const Tensors& weights, const Tensors& packed, const Tensors& metas) { pack_items(weights, packed, metas, "pack_24_", false); }

void pack_24_cpu(const Tensors& weights, const Tensors& packed, const Tensors& metas) {
  pack_24(TorchContext().context, pack_items(weights, packed, metas, "pack_24_", false));
}

void check_unpack_24_(const Tensors& weights, const Tensors& packed, const Tensors& metas) {
  pack_items(weights, packed, metas, "unpack_24_", true);
}

void unpack_24_cpu(const Tensors& weights, const Tensors& packed, const Tensors& metas) {
  unpack_24(TorchContext().context, pack_items(weights, packed, metas, "unpack_24_", true));
}

std::vector<GroupItem> group_items(const Tensors& weights, int64_t n, int64_t m) { return Check("nm_violations").groups(weights, n, m); }

void check_nm_violations(const Tensors& weights, int64_t n, int64_t m) { group_items(weights, n, m); }

Tensor nm_violations_cpu(const Tensors& weights, int64_t n, int64_t m) {
  const std::vector<GroupItem> items = group_items(weights, n, m);
  std::vector<Violations> found(items.size());
  nm_violations(TorchContext().context, items, static_cast<int>(n), static_cast<int>(m), found.data());
  Tensor result = torch::stable::empty({static_cast<int64_t>(items.size()), 3}, ScalarType::Long);
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

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CompositeExplicitAutograd, m) {
  m.impl("check_pack_24_", TORCH_BOX(&cram::check_pack_24_));
  m.impl("check_unpack_24_", TORCH_BOX(&cram::check_unpack_24_));
  m.impl("check_nm_violations", TORCH_BOX(&cram::check_nm_violations));
}

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) {
  m.impl("pack_24_", TORCH_BOX(&cram::pack_24_cpu));
  m.impl("unpack_24_", TORCH_BOX(&cram::unpack_24_cpu));
  m.impl("nm_violations", TORCH_BOX(&cram::nm_violations_cpu));
}
