// The ops of the CUDA backend: check, translate, launch on the current stream of the tensors' device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments.h"
#include "launchers.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);  // in shim.h only where USE_CUDA is defined

namespace cram {
namespace {

using torch::headeronly::ScalarType;

// The device of a call, current for as long as this lives, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cuda::Stream>(stream);
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

// What a call needs beyond its arguments, from torch's allocator: free for other calls on the same stream once this is gone.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}
  cuda::Allocate allocate() {
    return [this](int64_t bytes) {
      parts_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
      return parts_.back().data_ptr();
    };
  }

 private:
  const Tensor& like_;
  Tensors parts_;
};

cuda::Perturbation perturbation(const PerturbArguments& a) {
  cuda::Perturbation p;
  p.rho = static_cast<const float*>(a.rho.data_ptr());
  p.rho_per_tensor = a.rho.numel() != 1;
  p.inv_scale = float_or_null(a.inv_scale);
  p.found_inf = const_cast<float*>(float_or_null(a.found_inf));
  p.perturbed = static_cast<int32_t*>(a.perturbed.data_ptr());
  return p;
}

void prune_nm_cuda(const Tensors& weights, const Tensors& masks, const Integers& prune, int64_t n, int64_t m) {
  const std::vector<Item> items = prune_nm_items(weights, masks, prune, n, m);
  if (items.empty()) return;
  const Device device(weights[0]);
  Workspace workspace(weights[0]);
  cuda::nm(items, {}, static_cast<int>(n), static_cast<int>(m), workspace.allocate(), device.stream());
}

void perturb_nm_cuda(CRAM_PERTURB_LISTS, const Integers& prune, int64_t n, int64_t m, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  const std::vector<Item> items = perturb_nm_items(arguments, prune, n, m);
  const Device device(perturbed);
  Workspace workspace(perturbed);
  cuda::nm(items, perturbation(arguments), static_cast<int>(n), static_cast<int>(m), workspace.allocate(), device.stream());
}

void perturb_masked_cuda(CRAM_PERTURB_LISTS, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  const std::vector<Item> items = perturb_masked_items(arguments);
  const Device device(perturbed);
  cuda::perturb_masked(items, perturbation(arguments), device.stream());
}

using TopkResult = std::tuple<Tensor, Tensor>;

// Thresholds and statistics; what they are, the caller has checked.
TopkResult topk(const std::vector<Item>& items, const cuda::Perturbation& p, const Tensor& k, cuda::TopkMode mode) {
  const Device device(k);
  const int64_t num_sets = k.numel();
  Tensor thresholds = torch::stable::new_empty(k, {num_sets}, ScalarType::Int), stats = torch::stable::new_empty(k, {num_sets, 3}, ScalarType::Long);
  Workspace workspace(k);
  const cuda::TopkCall call = {
      mode, k.const_data_ptr<int64_t>(), num_sets, thresholds.mutable_data_ptr<int32_t>(), stats.mutable_data_ptr<int64_t>(), workspace.allocate()};
  cuda::topk(items, p, call, device.stream());
  return {thresholds, stats};
}

Tensor topk_threshold_cuda(const Tensors& weights, const Integers& sets, const Tensor& k) {
  Check check("topk_threshold");
  return std::get<0>(topk(topk_items(check, weights, {}, sets, k, false), {}, k, cuda::TopkMode::kThreshold));
}

Tensor topk_histogram_cuda(CRAM_HISTOGRAM_ARGUMENTS) {
  const std::vector<Item> items = histogram_items(params, grads, rho, sets, prefix, shift, bits, inv_scale, masters);
  const Device device(prefix);
  cuda::Perturbation p;
  p.rho = static_cast<const float*>(rho.data_ptr());
  p.rho_per_tensor = rho.numel() != 1;
  p.inv_scale = float_or_null(inv_scale);
  Tensor bins = torch::stable::new_zeros(prefix, {prefix.numel(), int64_t{1} << bits}, ScalarType::Long);
  cuda::topk_histogram(items, p, prefix.const_data_ptr<int64_t>(), static_cast<int>(shift), static_cast<int>(bits), bins.mutable_data_ptr<int64_t>(),
                       device.stream());
  return bins;
}

TopkResult prune_topk_cuda(const Tensors& weights, const Tensors& masks, const Integers& sets, const Tensor& k) {
  Check check("prune_topk_");
  return topk(topk_items(check, weights, masks, sets, k, true), {}, k, cuda::TopkMode::kPrune);
}

TopkResult perturb_topk_cuda(CRAM_PERTURB_LISTS, const Integers& sets, const Tensor& k, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  return topk(perturb_topk_items(arguments, sets, k), perturbation(arguments), k, cuda::TopkMode::kPerturb);
}

// ---- Updates and the norm ----

cuda::Update update_of(const UpdateArguments& a) {
  return {float_or_null(a.inv_scale), float_or_null(a.first_inv_scale), float_or_null(a.found_inf), static_cast<int32_t*>(a.perturbed.data_ptr())};
}

cuda::LearningRate learning_rate(const Tensor& lr) { return {static_cast<const float*>(lr.data_ptr()), lr.numel() != 1}; }

void restore_cuda(const Tensors& params, const Tensors& saved, const Tensor& perturbed, const Tensors& masters) {
  const std::vector<Item> items = restore_items(params, saved, perturbed, masters);
  const Device device(perturbed);
  cuda::restore(items, static_cast<int32_t*>(perturbed.data_ptr()), device.stream());
}

void restore_combine_cuda(CRAM_UPDATE_LISTS, CRAM_UPDATE_OPTIONS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  const std::vector<Item> items = restore_combine_items(arguments);
  const Device device(perturbed);
  cuda::restore_combine(items, update_of(arguments), device.stream());
}

void restore_sgd_cuda(CRAM_SGD_ARGUMENTS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  const Sgd sgd = sgd_of(arguments, momentum_buffers, fresh, lr, momentum, dampening, weight_decay, nesterov, maximize);
  const Device device(perturbed);
  cuda::restore_sgd(sgd.items, update_of(arguments), learning_rate(lr), sgd.options, device.stream());
}

void restore_adam_cuda(CRAM_ADAM_ARGUMENTS) {
  const UpdateArguments arguments = CRAM_UPDATE_ARGUMENTS;
  const Adam adam =
      adam_of(arguments, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize);
  const Device device(perturbed);
  cuda::restore_adam(adam.items, update_of(arguments), learning_rate(lr), adam.options, adam.hyper, device.stream());
}

Tensor grad_norm_cuda(const Tensors& grads, const MaybeTensor& inv_scale) {
  const std::vector<Item> items = norm_items(grads, inv_scale);
  if (grads.empty()) return torch::stable::new_zeros(*inv_scale, {}, torch::headeronly::ScalarType::Float);  // by whose device the call came here
  const Device device(grads[0]);
  Tensor sums = torch::stable::new_empty(grads[0], {cuda::norm_sums(items)}, torch::headeronly::ScalarType::Double);
  Tensor result = torch::stable::new_empty(grads[0], {}, torch::headeronly::ScalarType::Float);
  cuda::grad_norm(items, float_or_null(inv_scale), static_cast<double*>(sums.data_ptr()), static_cast<float*>(result.data_ptr()), device.stream());
  return result;
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CUDA, m) {
  m.impl("topk_threshold", TORCH_BOX(&cram::topk_threshold_cuda));
  m.impl("topk_histogram", TORCH_BOX(&cram::topk_histogram_cuda));
  m.impl("prune_topk_", TORCH_BOX(&cram::prune_topk_cuda));
  m.impl("perturb_topk_", TORCH_BOX(&cram::perturb_topk_cuda));
  m.impl("prune_nm_", TORCH_BOX(&cram::prune_nm_cuda));
  m.impl("perturb_nm_", TORCH_BOX(&cram::perturb_nm_cuda));
  m.impl("perturb_masked_", TORCH_BOX(&cram::perturb_masked_cuda));
  m.impl("restore_", TORCH_BOX(&cram::restore_cuda));
  m.impl("restore_combine_", TORCH_BOX(&cram::restore_combine_cuda));
  m.impl("restore_sgd_", TORCH_BOX(&cram::restore_sgd_cuda));
  m.impl("restore_adam_", TORCH_BOX(&cram::restore_adam_cuda));
  m.impl("grad_norm", TORCH_BOX(&cram::grad_norm_cuda));
}
