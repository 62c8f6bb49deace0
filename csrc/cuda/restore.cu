// Bring the weights back; with gradients also form that of the update: one pass.
#include "update.cuh"

namespace cram {
namespace cuda {
namespace {

struct NoSetting {
  bool operator==(const NoSetting&) const { return true; }
};

// Weights and gradient of a chunk, each if it is to be written; all loads of a vector come first.
template <class T, class S, class Chunk>
__device__ __forceinline__ void combine_chunk(const UpdateEntry& entry, const Chunk& chunk, bool restores, bool combines, const Scales& scales) {
  constexpr int kLanes = Vector<T>::kLanes;
  T* const param = entry.param.as<T>();
  for_vectors(chunk, param, [&](int, const auto& span) {
    Raw<S, kLanes> origin = {};
    if (restores) origin = Raw<S, kLanes>(entry.origin.as<S>(), span);
    Gradient<T> gradient(entry, span, combines);
    gradient.load_mask(entry, span);
    if (restores) store(param, restored<T>(origin), span);
    if (!combines) return;
    Vector<T> out = {};
#pragma unroll
    for (int i = 0; i < kLanes; ++i) set_number(out, i, gradient.at(i, scales));
    store(entry.grad.as<T>(), out, span);
  });
}

template <bool kCombine>
__global__ void __launch_bounds__(kThreads, kRestoreBlocks)
    restore_kernel(const __grid_constant__ UpdateTable table, const __grid_constant__ UpdateCall<NoSetting> call) {
  const bool perturbed = is_raised(call.update.perturbed), skipped = !kCombine || is_skipped(call.update);
  const Scales scales = scales_of(call.update);
  for_own_tasks(table, [&](const UpdateEntry& entry, const Task& task, uint32_t) {
    with_chunks(entry, task.number, [&](auto t, auto s, const auto& chunk) {
      using T = decltype(t);
      using S = decltype(s);
      if constexpr (kCombine)
        combine_chunk<T, S>(entry, chunk, perturbed && entry.origin.value() != 0, !skipped && entry.grad.value() != 0, scales);
      else if (perturbed)
        restore_chunk<T, S>(entry, chunk);
    });
  });
  if (is_last_block(call.update.perturbed) && call.last && threadIdx.x == 0) *call.update.perturbed = 0;
}

}  // namespace
}  // namespace cuda

void Restore::run(const cuda::Context& c) {
  cuda::Update update;
  update.perturbed = perturbed;
  const std::vector<cuda::NoSetting> none(items.size());
  cuda::launch_all(kName, cuda::restore_kernel<false>, cuda::update_launches(items, update, {}, none), c.stream);
}

void RestoreCombine::run(const cuda::Context& c) {
  const std::vector<cuda::NoSetting> none(items.size());
  cuda::launch_all(kName, cuda::restore_kernel<true>, cuda::update_launches(items, cuda::update_of(*this), {}, none), c.stream);
}

}  // namespace cram
