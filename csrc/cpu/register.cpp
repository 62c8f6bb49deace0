// The ops of the CPU backend: check, translate, run. One function an op, and its checking half, which other backends run too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"
#include "drivers.h"
#include "torch_pool.h"

namespace cram {
namespace {

using torch::headeronly::ScalarType;

const float* float_or_null(const MaybeTensor& t) { return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr; }

float at(const Tensor& values, size_t i) { return static_cast<const float*>(values.data_ptr())[values.numel() == 1 ? 0 : i]; }

template <class T>
T at(const std::vector<T>& values, size_t i) {
  return values[values.size() == 1 ? 0 : i];
}

// ---- Perturb and prune ----

Perturbation perturbation(const PerturbArguments& a, std::vector<Item>& items, const char* op) {
  Perturbation p;
  p.inv_scale = float_or_null(a.inv_scale);
  p.found_inf = const_cast<float*>(float_or_null(a.found_inf));
  p.perturbed = static_cast<int32_t*>(a.perturbed.data_ptr());
  for (size_t i = 0; i < items.size(); ++i) items[i].rho = at(a.rho, i);
  Check(op).require(*p.perturbed == 0, "perturbed", "be 0", std::to_string(*p.perturbed) + ": the weights are perturbed already; restore_ them first");
  return p;
}

std::vector<Item> topk_items(Check& check, const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k, bool written) {
  std::vector<Item> items = check.list("weights", weights, written);
  check.masks(items, masks, true);
  check.sets(items, sets, k);
  check.no_overlap();
  return items;
}

void check_topk_threshold(const Tensors& weights, const Integers& sets, const Tensor& k) {
  Check check("topk_threshold");
  topk_items(check, weights, {}, sets, k, false);
}

Tensor topk_threshold_cpu(const Tensors& weights, const Integers& sets, const Tensor& k) {
  Check check("topk_threshold");
  const std::vector<Item> items = topk_items(check, weights, {}, sets, k, false);
  Tensor thresholds = torch::stable::new_zeros(k, {k.numel()}, ScalarType::Int);
  topk_threshold(TorchContext().context, items, k.const_data_ptr<int64_t>(), k.numel(), thresholds.mutable_data_ptr<int32_t>());
  return thresholds;
}

using TopkResult = std::tuple<Tensor, Tensor>;

TopkResult topk_result(const Tensor& k) {
  return {torch::stable::new_zeros(k, {k.numel()}, ScalarType::Int), torch::stable::new_zeros(k, {k.numel(), 3}, ScalarType::Long)};
}

TopkStats* stats_of(TopkResult& result) { return reinterpret_cast<TopkStats*>(std::get<1>(result).mutable_data_ptr<int64_t>()); }

void check_prune_topk_(const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k) {
  Check check("prune_topk_");
  topk_items(check, weights, masks, sets, k, true);
}

TopkResult prune_topk_cpu(const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k) {
  Check check("prune_topk_");
  const std::vector<Item> items = topk_items(check, weights, masks, sets, k, true);
  TopkResult result = topk_result(k);
  prune_topk(TorchContext().context, items, k.const_data_ptr<int64_t>(), k.numel(), std::get<0>(result).mutable_data_ptr<int32_t>(), stats_of(result));
  return result;
}

std::vector<Item> perturb_topk_items(const PerturbArguments& a, const Integers& sets, const Tensor& k) {
  Check check("perturb_topk_");
  std::vector<Item> items = check.perturb(a, true);
  check.sets(items, sets, k);
  check.no_overlap();
  return items;
}

#define CRAM_PERTURB_LISTS \
  const Tensors &params, const Tensors &grads, const Tensors &saved, const Tensors &masks, const Tensor &perturbed, const Tensor &rho
#define CRAM_PERTURB_OPTIONS const MaybeTensor &inv_scale, const MaybeTensor &found_inf, const Tensors &masters
#define CRAM_PERTURB_ARGUMENTS {params, grads, saved, masks, perturbed, rho, inv_scale, found_inf, masters}

void check_perturb_topk_(CRAM_PERTURB_LISTS, const Integers& sets, const Tensor& k, CRAM_PERTURB_OPTIONS) {
  perturb_topk_items(CRAM_PERTURB_ARGUMENTS, sets, k);
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

std::vector<Item> prune_nm_items(const Tensors& weights, const Tensors& masks, const Integers& prune, int64_t n, int64_t m) {
  Check check("prune_nm_");
  std::vector<Item> items = check.list("weights", weights, true);
  check.masks(items, masks, true);
  check.nm(items, prune, n, m);
  check.no_overlap();
  return items;
}

void check_prune_nm_(const Tensors& weights, const Tensors& masks, const Integers& prune, int64_t n, int64_t m) {
  prune_nm_items(weights, masks, prune, n, m);
}

void prune_nm_cpu(const Tensors& weights, const Tensors& masks, const Integers& prune, int64_t n, int64_t m) {
  prune_nm(TorchContext().context, prune_nm_items(weights, masks, prune, n, m), static_cast<int>(n), static_cast<int>(m));
}

std::vector<Item> perturb_nm_items(const PerturbArguments& a, const Integers& prune, int64_t n, int64_t m) {
  Check check("perturb_nm_");
  std::vector<Item> items = check.perturb(a, true);
  check.nm(items, prune, n, m);
  check.no_overlap();
  return items;
}

void check_perturb_nm_(CRAM_PERTURB_LISTS, const Integers& prune, int64_t n, int64_t m, CRAM_PERTURB_OPTIONS) {
  perturb_nm_items(CRAM_PERTURB_ARGUMENTS, prune, n, m);
}

void perturb_nm_cpu(CRAM_PERTURB_LISTS, const Integers& prune, int64_t n, int64_t m, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  std::vector<Item> items = perturb_nm_items(arguments, prune, n, m);
  const Perturbation p = perturbation(arguments, items, "perturb_nm_");
  perturb_nm(TorchContext().context, items, p, static_cast<int>(n), static_cast<int>(m));
}

std::vector<Item> perturb_masked_items(const PerturbArguments& a) {
  Check check("perturb_masked_");
  std::vector<Item> items = check.perturb(a, false);
  check.no_overlap();
  return items;
}

void check_perturb_masked_(CRAM_PERTURB_LISTS, CRAM_PERTURB_OPTIONS) { perturb_masked_items(CRAM_PERTURB_ARGUMENTS); }

void perturb_masked_cpu(CRAM_PERTURB_LISTS, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  std::vector<Item> items = perturb_masked_items(arguments);
  const Perturbation p = perturbation(arguments, items, "perturb_masked_");
  perturb_masked(TorchContext().context, items, p);
}

// ---- Restore and update ----

std::vector<Item> restore_items(const Tensors& params, const Tensors& saved, const Tensor& perturbed, const Tensors& masters) {
  Check check("restore_");
  std::vector<Item> items = check.update({params, saved, {}, {}, {}, perturbed, {}, {}, {}, masters}, false, false);
  check.no_overlap();
  return items;
}

void check_restore_(const Tensors& params, const Tensors& saved, const Tensor& perturbed, const Tensors& masters) {
  restore_items(params, saved, perturbed, masters);
}

void restore_cpu(const Tensors& params, const Tensors& saved, const Tensor& perturbed, const Tensors& masters) {
  restore(TorchContext().context, restore_items(params, saved, perturbed, masters), static_cast<int32_t*>(perturbed.data_ptr()));
}

#define CRAM_UPDATE_LISTS                                                                                                             \
  const Tensors &params, const Tensors &saved, const Tensors &grads, const Tensors &first_grads, const Tensors &masks, const Tensor &perturbed
#define CRAM_UPDATE_OPTIONS \
  const MaybeTensor &inv_scale, const MaybeTensor &first_inv_scale, const MaybeTensor &found_inf, const Tensors &masters
#define CRAM_UPDATE_ARGUMENTS {params, saved, grads, first_grads, masks, perturbed, inv_scale, first_inv_scale, found_inf, masters}

Update update_of(const UpdateArguments& a) {
  Update update;
  if (const float* scale = float_or_null(a.inv_scale)) update.scales.grad = *scale, update.scales.has_grad = true;
  if (const float* scale = float_or_null(a.first_inv_scale)) update.scales.first_grad = *scale, update.scales.has_first_grad = true;
  const float* found_inf = float_or_null(a.found_inf);
  update.skip = found_inf != nullptr && *found_inf != 0;
  update.perturbed = static_cast<int32_t*>(a.perturbed.data_ptr());
  return update;
}

std::vector<Item> restore_combine_items(const UpdateArguments& a) {
  Check check("restore_combine_");
  std::vector<Item> items = check.update(a, true, false);
  check.no_overlap();
  return items;
}

void check_restore_combine_(CRAM_UPDATE_LISTS, CRAM_UPDATE_OPTIONS) { restore_combine_items(CRAM_UPDATE_ARGUMENTS); }

void restore_combine_cpu(CRAM_UPDATE_LISTS, CRAM_UPDATE_OPTIONS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  restore_combine(TorchContext().context, restore_combine_items(arguments), update_of(arguments));
}

#define CRAM_SGD_ARGUMENTS                                                                                                                   \
  CRAM_UPDATE_LISTS, const Tensors &momentum_buffers, const Integers &fresh, const Tensor &lr, const Numbers &momentum, const Numbers &dampening, \
      const Numbers &weight_decay, const Integers &nesterov, const Integers &maximize, CRAM_UPDATE_OPTIONS

struct Sgd {
  std::vector<Item> items;
  std::vector<SgdOptions> options;
};

Sgd sgd_of(const UpdateArguments& a, const Tensors& momentum_buffers, const Integers& fresh, const Tensor& lr, const Numbers& momentum,
           const Numbers& dampening, const Numbers& weight_decay, const Integers& nesterov, const Integers& maximize, bool read_lr) {
  Check check("restore_sgd_");
  Sgd sgd{check.update(a, false, true), {}};
  const size_t n = sgd.items.size();
  check.state(sgd.items, "momentum_buffers", momentum_buffers, 0);
  check.per_item("fresh", fresh, n);
  check.per_item("lr", lr, n);
  check.per_item("momentum", momentum, n);
  check.per_item("dampening", dampening, n);
  check.per_item("weight_decay", weight_decay, n);
  check.per_item("nesterov", nesterov, n);
  check.per_item("maximize", maximize, n);
  for (size_t i = 0; i < n; ++i) {
    const Item& item = sgd.items[i];
    const bool updated = item.numel > 0 && (item.grad != nullptr || item.first_grad != nullptr);
    check.require(!updated || at(momentum, i) == 0 || item.state[0] != nullptr, "momentum_buffers[" + std::to_string(i) + "]",
                  "be there where momentum is not 0", "no buffer");
    sgd.options.push_back({read_lr ? at(lr, i) : 0, static_cast<float>(at(momentum, i)), static_cast<float>(1 - at(dampening, i)),
                           static_cast<float>(at(weight_decay, i)), at(nesterov, i) != 0, at(maximize, i) != 0, at(fresh, i) != 0});
  }
  check.no_overlap();
  return sgd;
}

void check_restore_sgd_(CRAM_SGD_ARGUMENTS) {
  sgd_of(CRAM_UPDATE_ARGUMENTS, momentum_buffers, fresh, lr, momentum, dampening, weight_decay, nesterov, maximize, false);
}

void restore_sgd_cpu(CRAM_SGD_ARGUMENTS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  const Sgd sgd = sgd_of(arguments, momentum_buffers, fresh, lr, momentum, dampening, weight_decay, nesterov, maximize, true);
  restore_sgd(TorchContext().context, sgd.items, update_of(arguments), sgd.options);
}

#define CRAM_ADAM_ARGUMENTS                                                                                                                    \
  CRAM_UPDATE_LISTS, const Tensors &exp_avgs, const Tensors &exp_avg_sqs, const Tensors &max_exp_avg_sqs, const Tensors &steps, const Tensor &lr, \
      const Numbers &beta1, const Numbers &beta2, const Numbers &eps, const Numbers &weight_decay, bool decoupled, const Integers &amsgrad,     \
      const Integers &maximize, CRAM_UPDATE_OPTIONS

struct Adam {
  std::vector<Item> items;
  std::vector<AdamOptions> options;
  std::vector<AdamHyper> hyper;
};

Adam adam_of(const UpdateArguments& a, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& steps,
             const Tensor& lr, const Numbers& beta1, const Numbers& beta2, const Numbers& eps, const Numbers& weight_decay, bool decoupled,
             const Integers& amsgrad, const Integers& maximize, bool read_lr) {
  Check check("restore_adam_");
  Adam adam{check.update(a, false, true), {}, {}};
  const size_t n = adam.items.size();
  check.state(adam.items, "exp_avgs", exp_avgs, 0);
  check.state(adam.items, "exp_avg_sqs", exp_avg_sqs, 1);
  check.state(adam.items, "max_exp_avg_sqs", max_exp_avg_sqs, 2);
  check.steps(adam.items, steps);
  check.per_item("lr", lr, n);
  check.per_item("beta1", beta1, n);
  check.per_item("beta2", beta2, n);
  check.per_item("eps", eps, n);
  check.per_item("weight_decay", weight_decay, n);
  check.per_item("amsgrad", amsgrad, n);
  check.per_item("maximize", maximize, n);
  for (size_t i = 0; i < n; ++i) {
    const Item& item = adam.items[i];
    const bool updated = item.numel > 0 && (item.grad != nullptr || item.first_grad != nullptr);
    const bool complete = item.state[0] != nullptr && item.state[1] != nullptr && (at(amsgrad, i) == 0 || item.state[2] != nullptr);
    check.require(!updated || complete, "exp_avgs, exp_avg_sqs, max_exp_avg_sqs [" + std::to_string(i) + "]",
                  "be there (the last with amsgrad)", "no tensor");
    AdamOptions options = {};
    options.beta1 = static_cast<float>(at(beta1, i));
    options.one_minus_beta1 = static_cast<float>(1 - at(beta1, i));
    options.beta2 = static_cast<float>(at(beta2, i));
    options.one_minus_beta2 = static_cast<float>(1 - at(beta2, i));
    options.eps = static_cast<float>(at(eps, i));
    options.decoupled = decoupled;
    options.amsgrad = at(amsgrad, i) != 0;
    options.maximize = at(maximize, i) != 0;
    adam.options.push_back(options);
    adam.hyper.push_back({at(beta1, i), at(beta2, i), read_lr ? at(lr, i) : 0, static_cast<float>(at(weight_decay, i))});
  }
  check.no_overlap();
  return adam;
}

void check_restore_adam_(CRAM_ADAM_ARGUMENTS) {
  adam_of(CRAM_UPDATE_ARGUMENTS, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize,
          false);
}

void restore_adam_cpu(CRAM_ADAM_ARGUMENTS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  const Adam adam = adam_of(arguments, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad,
                            maximize, true);
  restore_adam(TorchContext().context, adam.items, update_of(arguments), adam.options, adam.hyper);
}

// ---- Norm ----

std::vector<Item> norm_items(const Tensors& grads, const MaybeTensor& inv_scale) {
  Check check("grad_norm");
  std::vector<Item> items = check.list("grads", grads, false);
  check.scalar("inv_scale", inv_scale, false);
  for (Item& item : items) item.grad = item.param;
  return items;
}

void check_grad_norm(const Tensors& grads, const MaybeTensor& inv_scale) { norm_items(grads, inv_scale); }

Tensor grad_norm_cpu(const Tensors& grads, const MaybeTensor& inv_scale) {
  const std::vector<Item> items = norm_items(grads, inv_scale);
  const float norm = grad_norm(TorchContext().context, items, float_or_null(inv_scale));
  Tensor result = torch::stable::empty({}, ScalarType::Float);
  *result.mutable_data_ptr<float>() = norm;
  return result;
}

}  // namespace
}  // namespace cram

#define CRAM_OPS(define)  \
  define(topk_threshold)  \
  define(prune_topk_)     \
  define(perturb_topk_)   \
  define(prune_nm_)       \
  define(perturb_nm_)     \
  define(perturb_masked_) \
  define(restore_)        \
  define(restore_combine_) \
  define(restore_sgd_)    \
  define(restore_adam_)   \
  define(grad_norm)

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CompositeExplicitAutograd, m) {
#define CRAM_REGISTER_CHECK(op) m.impl("check_" #op, TORCH_BOX(&cram::check_##op));
  CRAM_OPS(CRAM_REGISTER_CHECK)
}

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CPU, m) {
  m.impl("topk_threshold", TORCH_BOX(&cram::topk_threshold_cpu));
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
