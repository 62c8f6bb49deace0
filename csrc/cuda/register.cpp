// The ops of the CUDA backend: check, translate, launch on the current stream of the tensors' device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments.h"
#include "launchers.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);  // in shim.h only where USE_CUDA is defined

namespace cram {
namespace {

// The device of a call, current for as long as this lives, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cuda::Stream>(stream);
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
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

void perturb_masked_cuda(CRAM_PERTURB_LISTS, CRAM_PERTURB_OPTIONS) {
  const PerturbArguments arguments = CRAM_PERTURB_ARGUMENTS;
  const std::vector<Item> items = perturb_masked_items(arguments);
  const Device device(perturbed);
  cuda::perturb_masked(items, perturbation(arguments), device.stream());
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CUDA, m) { m.impl("perturb_masked_", TORCH_BOX(&cram::perturb_masked_cuda)); }
