// The arguments of every op, checked and translated to Items: the half of an op that does not depend on the backend. check_X(...) is X's checking
// half alone.
#pragma once

#include "adam.h"
#include "check.h"
#include "sgd.h"

namespace cram {

inline const float* float_or_null(const MaybeTensor& t) { return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr; }

// The entry of tensor i in a list that has one entry for all tensors, or one each.
template <class T>
T at(const std::vector<T>& values, size_t i) {
  return values[values.size() == 1 ? 0 : i];
}

#define CRAM_PERTURB_LISTS \
  const Tensors &params, const Tensors &grads, const Tensors &saved, const Tensors &masks, const Tensor &perturbed, const Tensor &rho
#define CRAM_PERTURB_OPTIONS const MaybeTensor &inv_scale, const MaybeTensor &found_inf, const Tensors &masters
#define CRAM_PERTURB_ARGUMENTS {params, grads, saved, masks, perturbed, rho, inv_scale, found_inf, masters}

#define CRAM_UPDATE_LISTS \
  const Tensors &params, const Tensors &saved, const Tensors &grads, const Tensors &first_grads, const Tensors &masks, const Tensor &perturbed
#define CRAM_UPDATE_OPTIONS const MaybeTensor &inv_scale, const MaybeTensor &first_inv_scale, const MaybeTensor &found_inf, const Tensors &masters
#define CRAM_UPDATE_ARGUMENTS {params, saved, grads, first_grads, masks, perturbed, inv_scale, first_inv_scale, found_inf, masters}

#define CRAM_SGD_ARGUMENTS                                                                                                                        \
  CRAM_UPDATE_LISTS, const Tensors &momentum_buffers, const Integers &fresh, const Tensor &lr, const Numbers &momentum, const Numbers &dampening, \
      const Numbers &weight_decay, const Integers &nesterov, const Integers &maximize, CRAM_UPDATE_OPTIONS

#define CRAM_ADAM_ARGUMENTS                                                                                                                       \
  CRAM_UPDATE_LISTS, const Tensors &exp_avgs, const Tensors &exp_avg_sqs, const Tensors &max_exp_avg_sqs, const Tensors &steps, const Tensor &lr, \
      const Numbers &beta1, const Numbers &beta2, const Numbers &eps, const Numbers &weight_decay, bool decoupled, const Integers &amsgrad,       \
      const Integers &maximize, CRAM_UPDATE_OPTIONS

// lr is not read: on a GPU it stays there.
struct Sgd {
  std::vector<Item> items;
  std::vector<SgdOptions> options;
};

struct Adam {
  std::vector<Item> items;
  std::vector<AdamOptions> options;
  std::vector<AdamHyper> hyper;
};

std::vector<Item> topk_items(Check& check, const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k, bool written);
void check_topk_threshold(const Tensors& weights, const Integers& sets, const Tensor& k);

#define CRAM_HISTOGRAM_ARGUMENTS \
  const Tensors &params, const Tensors &grads, const Tensor &rho, const Integers &sets, const Tensor &prefix, int64_t shift, int64_t bits, \
      const MaybeTensor &inv_scale, const Tensors &masters
std::vector<Item> histogram_items(CRAM_HISTOGRAM_ARGUMENTS);
void check_topk_histogram(CRAM_HISTOGRAM_ARGUMENTS);
void check_prune_topk_(const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k);
std::vector<Item> perturb_topk_items(const PerturbArguments& a, const Integers& sets, const Tensor& k);
void check_perturb_topk_(CRAM_PERTURB_LISTS, const Integers& sets, const Tensor& k, CRAM_PERTURB_OPTIONS);
std::vector<Item> prune_nm_items(const Tensors& weights, const Tensors& masks, const Integers& prune, int64_t n, int64_t m);
void check_prune_nm_(const Tensors& weights, const Tensors& masks, const Integers& prune, int64_t n, int64_t m);
std::vector<Item> perturb_nm_items(const PerturbArguments& a, const Integers& prune, int64_t n, int64_t m);
void check_perturb_nm_(CRAM_PERTURB_LISTS, const Integers& prune, int64_t n, int64_t m, CRAM_PERTURB_OPTIONS);
std::vector<Item> perturb_masked_items(const PerturbArguments& a);
void check_perturb_masked_(CRAM_PERTURB_LISTS, CRAM_PERTURB_OPTIONS);
std::vector<Item> restore_items(const Tensors& params, const Tensors& saved, const Tensor& perturbed, const Tensors& masters);
void check_restore_(const Tensors& params, const Tensors& saved, const Tensor& perturbed, const Tensors& masters);
std::vector<Item> restore_combine_items(const UpdateArguments& a);
void check_restore_combine_(CRAM_UPDATE_LISTS, CRAM_UPDATE_OPTIONS);
Sgd sgd_of(const UpdateArguments& a, const Tensors& momentum_buffers, const Integers& fresh, const Tensor& lr, const Numbers& momentum,
           const Numbers& dampening, const Numbers& weight_decay, const Integers& nesterov, const Integers& maximize);
void check_restore_sgd_(CRAM_SGD_ARGUMENTS);
Adam adam_of(const UpdateArguments& a, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensors& steps,
             const Tensor& lr, const Numbers& beta1, const Numbers& beta2, const Numbers& eps, const Numbers& weight_decay, bool decoupled,
             const Integers& amsgrad, const Integers& maximize);
void check_restore_adam_(CRAM_ADAM_ARGUMENTS);
std::vector<Item> norm_items(const Tensors& grads, const MaybeTensor& inv_scale);
void check_grad_norm(const Tensors& grads, const MaybeTensor& inv_scale);

}  // namespace cram
