// Save, move uphill, prune with masks that are there already: one pass.
#include "launch.h"
#include "source.cuh"

namespace cram {
namespace cuda {
namespace {

template <class T, class W, class Chunk>
__device__ __forceinline__ void masked_chunk(const PerturbEntry& entry, const Chunk& chunk, const Perturbation& p) {
  T* const param = static_cast<T*>(entry.param);
  const Source<T, W> source(entry, param, p);
  MovedVectors<T, W> moved;
  uint32_t kept[kVectors<T>];
  moved.issue(source, param, param, chunk);
  for_vectors(chunk, param, [&](int j, const auto& span) { kept[j] = entry.mask != nullptr ? load_mask(entry.mask, span) : ~0u; });
  if (!moved.move(source)) moved.move_exactly(source, param, chunk, p.found_inf);
  for_vectors(chunk, param, [&](int j, const auto& span) {
    if (entry.saved != nullptr) store(static_cast<T*>(entry.saved), moved.raw[j], span);
    store(param, pruned(moved.u[j], kept[j]), span);
  });
}

__global__ void __launch_bounds__(kThreads) perturb_masked_kernel(const __grid_constant__ PerturbTable table, const Perturbation p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.perturbed = 1;
  for_own_tasks(table, [&](const PerturbEntry& entry, const Task& task, uint32_t) {
    with_chunks(entry, task.number,
                [&](auto t, auto w, const auto& chunk) { masked_chunk<decltype(t), decltype(w)>(entry, chunk, p); });
  });
}

}  // namespace
}  // namespace cuda

void PerturbMasked::run(const cuda::Context& c) {
  using namespace cuda;
  const auto tables = make_tables<PerturbEntry>(
      items.size(), [&](size_t i) { return perturb_entry(items[i], i); }, [&](size_t i) { return chunks_of(items[i].param, items[i].numel); });
  for (const PerturbTable& table : tables) launch(kName, perturb_masked_kernel, tasks_in(table), c.stream, table, perturbation_of(*this));
}

}  // namespace cram
