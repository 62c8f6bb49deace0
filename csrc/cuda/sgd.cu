// Restore + SGD: one pass.
#include "update.cuh"

namespace cram {
namespace cuda {
namespace {

struct SgdSetting {
  SgdOptions options;

  bool operator==(const SgdSetting& other) const {
    const SgdOptions &a = options, &b = other.options;  // lr is the device's
    return a.momentum == b.momentum && a.one_minus_dampening == b.one_minus_dampening && a.weight_decay == b.weight_decay &&
           a.nesterov == b.nesterov && a.maximize == b.maximize && a.fresh == b.fresh;
  }
};

struct SgdStep {
  using Setting = SgdSetting;
  static constexpr int kStates = 1;
  static constexpr int kBlocks = kSgdBlocks;
  SgdOptions options;

  SgdStep() = default;
  __device__ SgdStep(const UpdateEntry& entry, const UpdateCall<Setting>& call) : options(call.settings[entry.setting].options) {
    options.lr = learning_rate(entry, call.lr);
  }
  __device__ bool loads(int) const { return options.momentum != 0 && !options.fresh; }
  __device__ bool stores(int) const { return options.momentum != 0; }
  __device__ void operator()(float& w, float* state, float g) const { sgd_step(w, state[0], g, options); }
  __device__ static void done(const UpdateEntry&) {}
};

}  // namespace

void restore_sgd(const std::vector<Item>& items, const Update& update, const LearningRate& lr, const std::vector<SgdOptions>& options,
                 Stream stream) {
  std::vector<SgdSetting> settings;
  for (const SgdOptions& o : options) settings.push_back({o});
  launch_all("restore_sgd_", update_kernel<SgdStep>, update_launches(items, update, lr, settings), stream);
}

}  // namespace cuda
}  // namespace cram
