// The ops of the CUDA backend: on the current stream of the tensors' device.
#include "../register.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "launchers.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);  // in shim.h only where USE_CUDA is defined

namespace {

using namespace cram;

struct Cuda {
  static constexpr bool kOnlyChecks = false;
  static constexpr const char* kPrefix = "";

  template <class Op>
  static void run(Op& op, const std::optional<Tensor>& like) {
    if (!like.has_value()) return;  // nothing to do, and no device to do it on
    const torch::stable::accelerator::DeviceGuard guard(like->get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like->get_device_index(), &stream));
    std::vector<Tensor> workspace;  // from torch's allocator: free for other calls on the same stream once this is gone
    op.run(cuda::Context{static_cast<cuda::Stream>(stream), [&](int64_t bytes) {
                           workspace.push_back(torch::stable::new_empty(*like, {bytes}, torch::headeronly::ScalarType::Byte));
                           return workspace.back().data_ptr();
                         }});
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CUDA, m) { register_ops<Cuda>(m, Ops()); }
