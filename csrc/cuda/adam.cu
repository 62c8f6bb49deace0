// Restore + Adam / AdamW: one pass. Bias corrections in float64 from the step on the device, by one thread a tensor and block.
#include "update.cuh"

namespace cram {
namespace cuda {
namespace {

struct AdamSetting {
  AdamOptions options;
  AdamHyper hyper;

  bool operator==(const AdamSetting& other) const {
    const AdamOptions &a = options, &b = other.options;  // the rest follows from hyper and from the device's numbers
    return a.eps == b.eps && a.decoupled == b.decoupled && a.amsgrad == b.amsgrad && a.maximize == b.maximize && hyper.beta1 == other.hyper.beta1 &&
           hyper.beta2 == other.hyper.beta2 && hyper.weight_decay == other.hyper.weight_decay;
  }
};

struct AdamStep {
  using Setting = AdamSetting;
  static constexpr int kStates = 3;
  static constexpr int kBlocks = kAdamBlocks;
  AdamOptions options;
  bool decays;

  AdamStep() = default;
  __device__ AdamStep(const UpdateEntry& entry, const UpdateCall<Setting>& call) {
    const Setting& setting = call.settings[entry.setting];
    options = setting.options;
    decays = setting.hyper.weight_decay != 0;
    const float step = add(*entry.step.as<float>(), 1.0f);
    set_step(options, setting.hyper.beta1, setting.hyper.beta2, learning_rate(entry, call.lr), setting.hyper.weight_decay,
             static_cast<int64_t>(step));
  }
  __device__ bool loads(int s) const { return s < 2 || options.amsgrad; }
  __device__ bool stores(int s) const { return loads(s); }
  __device__ void operator()(float& w, float* state, float g) const { adam_step(w, state[0], state[1], state[2], g, decays, options); }
  __device__ static void done(const UpdateEntry& entry) { *entry.step.as<float>() = add(*entry.step.as<float>(), 1.0f); }
};

}  // namespace
}  // namespace cuda

void RestoreAdam::run(const cuda::Context& c) {
  std::vector<cuda::AdamSetting> own;
  for (size_t i = 0; i < items.size(); ++i) own.push_back({settings[i], hyper[i]});
  cuda::launch_all(kName, cuda::update_kernel<cuda::AdamStep>, cuda::update_launches(items, cuda::update_of(*this), lr, own), c.stream);
}

}  // namespace cram
