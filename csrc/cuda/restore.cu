// Bring the weights back; with gradients also form that of the update: one pass.
#include "update.cuh"

namespace cram {
namespace cuda {
namespace {

struct NoSetting {
  bool operator==(const NoSetting&) const { return true; }
};

template <class T, class Chunk>
__device__ __forceinline__ void combine_chunk(const UpdateEntry& entry, const Chunk& chunk, const Scales& scales) {
  constexpr int kLanes = Vector<T>::kLanes;
  const T* const param = entry.param.as<T>();
  for_vectors(chunk, param, [&](int, const auto& span) {
    Gradient<T> gradient(entry, span);
    gradient.load_mask(entry, span);
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
      if (perturbed) restore_chunk<decltype(t), decltype(s)>(entry, chunk);
      if (!skipped && entry.grad.value() != 0) combine_chunk<decltype(t)>(entry, chunk, scales);
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
