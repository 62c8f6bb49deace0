// Save, move uphill, prune with masks that are there already: one pass.
#include "launch.h"
#include "source.cuh"

namespace cram {
namespace cuda {
namespace {

template <class T, class W>
__device__ __forceinline__ void masked_chunk(const PerturbEntry& entry, uint32_t number, const Perturbation& p, bool* nonfinite) {
  T* const param = static_cast<T*>(entry.param);
  const Source<T, W> source(entry, param, p);
  const Chunk chunk(param, entry.numel, number);
  MovedVectors<T, W> moved;
  moved.load(source, param, chunk, nonfinite);
  for_vectors(chunk, param, [&](int j, const auto& span) {
    if (entry.saved != nullptr) store(static_cast<T*>(entry.saved), moved.raw[j], span);
    const uint32_t kept = entry.mask != nullptr ? load_mask(entry.mask, span) : ~0u;
    store(param, pruned(moved.raw[j], moved.u[j], kept, true), span);
  });
}

__global__ void __launch_bounds__(kThreads) perturb_masked_kernel(const __grid_constant__ PerturbTable table, const Perturbation p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.perturbed = 1;
  bool nonfinite = false;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    with_types(entry, [&](auto t, auto w) { masked_chunk<decltype(t), decltype(w)>(entry, found.number, p, &nonfinite); });
  }
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

}  // namespace

void perturb_masked(const std::vector<Item>& items, const Perturbation& p, Stream stream) {
  const auto tables = make_tables<PerturbEntry>(
      items.size(), [&](size_t i) { return perturb_entry(items[i], i); }, [&](size_t i) { return chunks_of(items[i].param, items[i].numel); });
  for (const PerturbTable& table : tables) launch("perturb_masked_", perturb_masked_kernel, tasks_in(table), stream, table, p);
}

}  // namespace cuda
}  // namespace cram
