// Restore + SGD: one pass.
#include "update.cuh"

namespace cram {
namespace cuda {
namespace {

struct SgdStep {
  using Setting = SgdOptions;  // lr is the device's
  static constexpr int kStates = 1;
  static constexpr int kBlocks = kSgdBlocks;
  SgdOptions options;

  SgdStep() = default;
  __device__ SgdStep(const UpdateEntry& entry, const UpdateCall<Setting>& call) : options(call.settings[entry.setting]) {
    options.lr = learning_rate(entry, call.lr);
  }
  __device__ bool loads(int) const { return options.momentum != 0 && !options.fresh; }
  __device__ bool stores(int) const { return options.momentum != 0; }
  __device__ void operator()(float& w, float* state, float g) const { sgd_step(w, state[0], g, options); }
  __device__ static void done(const UpdateEntry&) {}
};

}  // namespace
}  // namespace cuda

void RestoreSgd::run(const cuda::Context& c) {
  cuda::launch_all(kName, cuda::update_kernel<cuda::SgdStep>, cuda::update_launches(items, cuda::update_of(*this), lr, settings), c.stream);
}

}  // namespace cram
