// What the CUDA library asks libtorch_cuda and the accelerator hooks of libtorch_cpu for, where there is neither a GPU nor a torch with CUDA: one
// device, and a stream that the test chooses. Loaded before the CUDA library, with global symbols (tests/executor.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {
void* current_stream = nullptr;
}

extern "C" {

__attribute__((visibility("default"))) void stand_in_set_stream(void* stream) { current_stream = stream; }

__attribute__((visibility("default"))) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = current_stream;
  return AOTI_TORCH_SUCCESS;
}

__attribute__((visibility("default"))) AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

__attribute__((visibility("default"))) AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}
