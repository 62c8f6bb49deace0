#include "arguments.h"

#include "plain_arithmetic.h"

namespace cram {

// ---- Perturb and prune ----

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

void check_prune_topk_(const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k) {
  Check check("prune_topk_");
  topk_items(check, weights, masks, sets, k, true);
}

std::vector<Item> histogram_items(CRAM_HISTOGRAM_ARGUMENTS) {
  Check check("topk_histogram");
  std::vector<Item> items = check.uphill(params, grads, rho, inv_scale, masters);
  check.sets(items, sets, prefix, "prefix");
  if (bits < 1 || bits > 16 || shift < 0 || shift + bits > 31)
    check.refuse("shift, bits", "satisfy 1 <= bits <= 16, 0 <= shift <= 31 - bits",
                 "shift=" + std::to_string(shift) + ", bits=" + std::to_string(bits));
  for (Item& item : items)
    if (item.grad == nullptr) item.master = nullptr;  // the parameter itself counts
  return items;
}

void check_topk_histogram(CRAM_HISTOGRAM_ARGUMENTS) { histogram_items(params, grads, rho, sets, prefix, shift, bits, inv_scale, masters); }

std::vector<Item> perturb_topk_items(const PerturbArguments& a, const Integers& sets, const Tensor& k) {
  Check check("perturb_topk_");
  std::vector<Item> items = check.perturb(a, true);
  check.sets(items, sets, k);
  check.no_overlap();
  return items;
}

void check_perturb_topk_(CRAM_PERTURB_LISTS, const Integers& sets, const Tensor& k, CRAM_PERTURB_OPTIONS) {
  perturb_topk_items(CRAM_PERTURB_ARGUMENTS, sets, k);
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

std::vector<Item> perturb_masked_items(const PerturbArguments& a) {
  Check check("perturb_masked_");
  std::vector<Item> items = check.perturb(a, false);
  check.no_overlap();
  return items;
}

void check_perturb_masked_(CRAM_PERTURB_LISTS, CRAM_PERTURB_OPTIONS) { perturb_masked_items(CRAM_PERTURB_ARGUMENTS); }

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

std::vector<Item> restore_combine_items(const UpdateArguments& a) {
  Check check("restore_combine_");
  std::vector<Item> items = check.update(a, true, false);
  check.no_overlap();
  return items;
}

void check_restore_combine_(CRAM_UPDATE_LISTS, CRAM_UPDATE_OPTIONS) { restore_combine_items(CRAM_UPDATE_ARGUMENTS); }

Sgd sgd_of(const UpdateArguments& a, const Tensors& momentum_buffers, const Integers& fresh, const Tensor& lr, const Numbers& momentum,
           const Numbers& dampening, const Numbers& weight_decay, const Integers& nesterov, const Integers& maximize) {
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
  sgd.options.reserve(n);
  PlainArithmetic plain;  // float64 to float32
  for (size_t i = 0; i < n; ++i) {
    const Item& item = sgd.items[i];
    const bool updated = item.numel > 0 && (item.grad != nullptr || item.first_grad != nullptr);
    if (updated && at(momentum, i) != 0 && item.state[0] == nullptr)
      check.refuse(Place("momentum_buffers", i), "be there where momentum is not 0", "no buffer");
    sgd.options.push_back({0, static_cast<float>(at(momentum, i)), static_cast<float>(1 - at(dampening, i)), static_cast<float>(at(weight_decay, i)),
                           at(nesterov, i) != 0, at(maximize, i) != 0, at(fresh, i) != 0});
  }
  check.no_overlap();
  return sgd;
}

void check_restore_sgd_(CRAM_SGD_ARGUMENTS) {
  sgd_of(CRAM_UPDATE_ARGUMENTS, momentum_buffers, fresh, lr, momentum, dampening, weight_decay, nesterov, maximize);
}

Adam adam_of(const UpdateArguments& a, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& steps,
             const Tensor& lr, const Numbers& beta1, const Numbers& beta2, const Numbers& eps, const Numbers& weight_decay, bool decoupled,
             const Integers& amsgrad, const Integers& maximize) {
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
  adam.options.reserve(n);
  adam.hyper.reserve(n);
  PlainArithmetic plain;  // float64 to float32
  for (size_t i = 0; i < n; ++i) {
    const Item& item = adam.items[i];
    const bool updated = item.numel > 0 && (item.grad != nullptr || item.first_grad != nullptr);
    const bool complete = item.state[0] != nullptr && item.state[1] != nullptr && (at(amsgrad, i) == 0 || item.state[2] != nullptr);
    if (updated && !complete) check.refuse(Place("exp_avgs, exp_avg_sqs, max_exp_avg_sqs ", i), "be there (the last with amsgrad)", "no tensor");
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
    adam.hyper.push_back({at(beta1, i), at(beta2, i), 0, static_cast<float>(at(weight_decay, i))});
  }
  check.no_overlap();
  return adam;
}

void check_restore_adam_(CRAM_ADAM_ARGUMENTS) {
  adam_of(CRAM_UPDATE_ARGUMENTS, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize);
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

}  // namespace cram
