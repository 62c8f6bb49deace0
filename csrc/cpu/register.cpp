// The ops of the CPU backend: check, translate, run. One function an op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../arguments.h"
#include "drivers.h"
#include "torch_pool.h"

namespace cram {
namespace {

using torch::headeronly::ScalarType;

float at(const Tensor& values, size_t i) { return static_cast<const float*>(values.data_ptr())[values.numel() == 1 ? 0 : i]; }

// ---- Perturb and prune ----

Perturbation perturbation(const PerturbArguments& a, std::vector<Item>& items, const char* op) {
  Perturbation p;
  p.inv_scale = float_or_null(a.inv_scale);
  p.found_inf = const_cast<float*>(float_or_null(a.found_inf));
  p.perturbed = static_cast<int32_t*>(a.perturbed.data_ptr());
  p.past_cache = past_cache(items);
  for (size_t i = 0; i < items.size(); ++i) items[i].rho = at(a.rho, i);
  if (*p.perturbed != 0)
    Check(op).refuse("perturbed", "be 0", std::to_string(*p.perturbed) + ": the weights are perturbed already; restore_ them first");
  return p;
}

Tensor topk_threshold_cpu(const Tensors& weights, const Integers& sets, const Tensor& k) {
  Check check("topk_threshold");
  const std::vector<Item> items = topk_items(check, weights, {}, sets, k, false);
  Tensor thresholds = torch::stable::new_zeros(k, {k.numel()}, ScalarType::Int);
  topk_threshold(TorchContext().context, items, k.const_data_ptr<int64_t>(), k.numel(), thresholds.mutable_data_ptr<int32_t>());
  return thresholds;
}

Tensor topk_histogram_cpu(CRAM_HISTOGRAM_ARGUMENTS) {
  std::vector<Item> items = histogram_items(params, grads, rho, sets, prefix, shift, bits, inv_scale, masters);
  for (size_t i = 0; i < items.size(); ++i) items[i].rho = at(rho, i);
  Perturbation p;
  p.inv_scale = float_or_null(inv_scale);
  Tensor bins = torch::stable::new_zeros(prefix, {prefix.numel(), int64_t{1} << bits}, ScalarType::Long);
  topk_histogram(TorchContext().context, items, p, prefix.const_data_ptr<int64_t>(), prefix.numel(), static_cast<int>(shift), static_cast<int>(bits),
                 bins.mutable_data_ptr<int64_t>());
  return bins;
}

using TopkResult = std::tuple<Tensor, Tensor>;

TopkResult topk_result(const Tensor& k) {
  return {torch::stable::new_zeros(k, {k.numel()}, ScalarType::Int), torch::stable::new_zeros(k, {k.numel(), 3}, ScalarType::Long)};
}

TopkStats* stats_of(TopkResult& result) { return reinterpret_cast<TopkStats*>(std::get<1>(result).mutable_data_ptr<int64_t>()); }

TopkResult prune_topk_cpu(const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k) {
  Check check("prune_topk_");
  const std::vector<Item> items = topk_items(check, weights, masks, sets, k, true);
  TopkResult result = topk_result(k);
  prune_topk(TorchContext().context, items, k.const_data_ptr<int64_t>(), k.numel(), std::get<0>(result).mutable_data_ptr<int32_t>(),
             stats_of(result));
  return result;
}

TopkResult perturb_topk_cpu(CRAM_PERTURB_LISTS, const Integers& sets, const Tensor& k, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  std::vector<Item> items = perturb_topk_items(arguments, sets, k);
  const Perturbation p = perturbation(arguments, items, "perturb_topk_");
  TopkResult result = topk_result(k);
  perturb_topk(TorchContext().context, items, p, k.const_data_ptr<int64_t>(), k.numel(), std::get<0>(result).mutable_data_ptr<int32_t>(),
               stats_of(result));
  return result;
}

void prune_nm_cpu(const Tensors& weights, const Tensors& masks, const Integers& prune, int64_t n, int64_t m) {
  prune_nm(TorchContext().context, prune_nm_items(weights, masks, prune, n, m), static_cast<int>(n), static_cast<int>(m));
}

void perturb_nm_cpu(CRAM_PERTURB_LISTS, const Integers& prune, int64_t n, int64_t m, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  std::vector<Item> items = perturb_nm_items(arguments, prune, n, m);
  const Perturbation p = perturbation(arguments, items, "perturb_nm_");
  perturb_nm(TorchContext().context, items, p, static_cast<int>(n), static_cast<int>(m));
}

void perturb_masked_cpu(CRAM_PERTURB_LISTS, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  std::vector<Item> items = perturb_masked_items(arguments);
  const Perturbation p = perturbation(arguments, items, "perturb_masked_");
  perturb_masked(TorchContext().context, items, p);
}

// ---- Restore and update ----

void restore_cpu(const Tensors& params, const Tensors& saved, const Tensor& perturbed, const Tensors& masters) {
  restore(TorchContext().context, restore_items(params, saved, perturbed, masters), static_cast<int32_t*>(perturbed.data_ptr()));
}

Update update_of(const UpdateArguments& a) {
  Update update;
  if (const float* scale = float_or_null(a.inv_scale)) update.scales.grad = *scale, update.scales.has_grad = true;
  if (const float* scale = float_or_null(a.first_inv_scale)) update.scales.first_grad = *scale, update.scales.has_first_grad = true;
  const float* found_inf = float_or_null(a.found_inf);
  PlainArithmetic plain;  // a denormal is not 0
  update.skip = found_inf != nullptr && *found_inf != 0;
  update.perturbed = static_cast<int32_t*>(a.perturbed.data_ptr());
  return update;
}

void restore_combine_cpu(CRAM_UPDATE_LISTS, CRAM_UPDATE_OPTIONS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  restore_combine(TorchContext().context, restore_combine_items(arguments), update_of(arguments));
}

void restore_sgd_cpu(CRAM_SGD_ARGUMENTS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  Sgd sgd = sgd_of(arguments, momentum_buffers, fresh, lr, momentum, dampening, weight_decay, nesterov, maximize);
  for (size_t i = 0; i < sgd.items.size(); ++i) sgd.options[i].lr = at(lr, i);
  restore_sgd(TorchContext().context, sgd.items, update_of(arguments), sgd.options);
}

void restore_adam_cpu(CRAM_ADAM_ARGUMENTS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  Adam adam = adam_of(arguments, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize);
  for (size_t i = 0; i < adam.items.size(); ++i) adam.hyper[i].lr = at(lr, i);
  restore_adam(TorchContext().context, adam.items, update_of(arguments), adam.options, adam.hyper);
}

// ---- Norm ----

Tensor grad_norm_cpu(const Tensors& grads, const MaybeTensor& inv_scale) {
  const std::vector<Item> items = norm_items(grads, inv_scale);
  const float norm = grad_norm(TorchContext().context, items, float_or_null(inv_scale));
  Tensor result = torch::stable::empty({}, ScalarType::Float);
  *result.mutable_data_ptr<float>() = norm;
  return result;
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) {
  m.impl("topk_threshold", TORCH_BOX(&cram::topk_threshold_cpu));
  m.impl("topk_histogram", TORCH_BOX(&cram::topk_histogram_cpu));
  m.impl("prune_topk_", TORCH_BOX(&cram::prune_topk_cpu));
  m.impl("perturb_topk_", TORCH_BOX(&cram::perturb_topk_cpu));
  m.impl("prune_nm_", TORCH_BOX(&cram::prune_nm_cpu));
  m.impl("perturb_nm_", TORCH_BOX(&cram::perturb_nm_cpu));
  m.impl("perturb_masked_", TORCH_BOX(&cram::perturb_masked_cpu));
  m.impl("restore_", TORCH_BOX(&cram::restore_cpu));
  m.impl("restore_combine_", TORCH_BOX(&cram::restore_combine_cpu));
  m.impl("restore_sgd_", TORCH_BOX(&cram::restore_sgd_cpu));
  m.impl("restore_adam_", TORCH_BOX(&cram::restore_adam_cpu));
  m.impl("grad_norm", TORCH_BOX(&cram::grad_norm_cpu));
}
