// What the perturbations share.
#include "drivers.h"

namespace cram {

bool past_cache(const std::vector<Item>& items) {
  constexpr int64_t kCaches = 4 << 20;  // bytes: the second level of a few cores; beside the parameters there are gradients and activations
  int64_t bytes = 0;
  for (const Item& item : items) bytes += item.numel * size_of(item.dtype);
  return bytes > kCaches;
}

Perturbation perturbation_of(PerturbOp& op, const char* name) {
  if (*op.perturbed != 0)
    refuse(name, "perturbed", "be 0", std::to_string(*op.perturbed) + ": the weights are perturbed already; restore_ them first");
  for (size_t i = 0; i < op.items.size(); ++i) op.items[i].rho = op.rho.at(i);
  return {op.inv_scale, op.found_inf, op.perturbed, past_cache(op.items)};
}

Source source_of(const Item& item, const Perturbation& p, bool from_saved) {
  const void* weights = item.master != nullptr ? item.master : from_saved ? item.saved : item.param;
  return {weights, item.master != nullptr, item.grad, item.rho, p.inv_scale != nullptr ? *p.inv_scale : 1, p.inv_scale != nullptr, p.past_cache};
}

}  // namespace cram
