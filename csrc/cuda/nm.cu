// N:M along axis 1 (docs/contract.md: N:M). A tile is M rows of `inner` consecutive weights, a group one of its columns. Chunks of whole tiles are
// read and written by vectors, their keys exchanged in shared memory. A tile too large for that (axis 1 far apart in memory) is cut into panels of
// whole columns.
#include "launch.h"
#include "mask.cuh"
#include "source.cuh"

namespace cram {
namespace cuda {
namespace {

struct Pattern {
  int n, m;
};

// Weights of a chunk: whole tiles and whole mask bytes; 0 where a tile is too large for a block. inner = 0: the tensor is not pruned.
CRAM_HOST_DEVICE inline int64_t nm_chunk_size(bool aligned, int64_t inner, int m) {
  const int64_t size = chunk_size(aligned), tile = inner * m;
  const int64_t unit = tile == 0 ? 8 : tile * (tile % 8 == 0 ? 1 : tile % 4 == 0 ? 2 : tile % 2 == 0 ? 4 : 8);
  return size / unit * unit;
}

// q / d for q < kChunk and 0 < d <= kChunk.
struct Divisor {
  uint32_t d, magic;
  __device__ __forceinline__ explicit Divisor(uint32_t d) : d(d), magic(((1u << 22) + d - 1) / d) {}
  __device__ __forceinline__ uint32_t divide(uint32_t q) const {
    if constexpr (kChunk > 1 << 11) return q / d;  // the product would not fit into 32 bits
    return d == 1 ? q : q * magic >> 22;
  }
};

// Whether the weight in row `row` of a group is among the n largest, whose keys are `stride` apart: stable ascending, the first m - n go.
__device__ __forceinline__ bool among_largest(const int32_t* keys, uint32_t stride, int row, const Pattern& pattern) {
  const int32_t own = keys[row * stride];
  int rank = 0;
  for (int other = 0; other < pattern.m; ++other) {
    const int32_t key = keys[other * stride];
    rank += (key < own || (key == own && other < row)) ? 1 : 0;
  }
  return rank >= pattern.m - pattern.n && own != kNanKey;
}

// ---- Chunks of whole tiles, and tensors that are not pruned ----

struct Shared {
  int32_t keys[kChunk];
  MaskStage mask;
};

template <class T, class W>
__device__ __forceinline__ void nm_chunk(const PerturbEntry& entry, uint32_t number, const Perturbation& p, const Pattern& pattern, bool* nonfinite,
                                         Shared& shared) {
  constexpr int kLanes = Vector<T>::kLanes;
  T* const param = static_cast<T*>(entry.param);
  const Chunk chunk(param, entry.numel, number, nm_chunk_size(aligned(param), entry.extra, pattern.m));
  MovedVectors<T, W> moved;
  moved.load_and_move(Source<T, W>(entry, param, p), param, chunk, p.found_inf);
  const bool prunes = entry.extra > 0;
  if (prunes) {
    for_vectors(chunk, param, [&](int j, const Span<kLanes>& span) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i)
        if (span.has(i)) shared.keys[span.first + i - chunk.begin] = moved.key(j, i);
    });
    __syncthreads();
  }
  const Divisor inner(prunes ? static_cast<uint32_t>(entry.extra) : 1), tile(prunes ? inner.d * pattern.m : 1);
  for_vectors(chunk, param, [&](int j, const Span<kLanes>& span) {
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (!prunes || !span.has(i)) continue;
      const uint32_t q = static_cast<uint32_t>(span.first + i - chunk.begin), in_tile = q - tile.divide(q) * tile.d, row = inner.divide(in_tile);
      kept |= (among_largest(shared.keys + (q - row * inner.d), inner.d, static_cast<int>(row), pattern) ? 1u : 0u) << i;
    }
    if (entry.saved != nullptr) store(static_cast<T*>(entry.saved), moved.raw[j], span);
    store(param, pruned(moved.u[j], prunes ? kept : ~0u), span);
    if (prunes) shared.mask.put<T>(j, kept);
  });
  if (!prunes) return;
  __syncthreads();
  if (entry.mask != nullptr) shared.mask.write<T>(chunk, param, entry.mask);
}

__global__ void __launch_bounds__(kThreads) nm_kernel(const __grid_constant__ PerturbTable table, const Perturbation p, const Pattern pattern) {
  __shared__ Shared shared;
  if (p.perturbed != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.perturbed = 1;
  bool nonfinite = false;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    with_types(entry, [&](auto t, auto w) { nm_chunk<decltype(t), decltype(w)>(entry, found.number, p, pattern, &nonfinite, shared); });
  }
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

// ---- Panels ----

// Columns of a panel, so that a thread has 8 weights at most.
CRAM_HOST_DEVICE int64_t panel_width(int64_t inner, int m) { return inner < kChunk / m ? inner : kChunk / m; }

int64_t panels_of(const Item& item, int m) {
  const int64_t width = panel_width(item.inner, m);
  return item.numel / (item.inner * m) * ((item.inner + width - 1) / width);
}

// entry.mask: a byte a weight, 1 = kept, which pack_kernel makes bits of; other panels write other bits of the same bytes.
template <class T, class W>
__device__ __forceinline__ void nm_panel(const PerturbEntry& entry, uint32_t number, const Perturbation& p, const Pattern& pattern, bool* nonfinite,
                                         int32_t* keys) {
  constexpr int kOwn = kChunk / kThreads;
  T* const param = static_cast<T*>(entry.param);
  const Source<T, W> source(entry, param, p);
  const int64_t inner = entry.extra, width = panel_width(inner, pattern.m), panels = (inner + width - 1) / width;
  const int64_t column = number % panels * width, begin = number / panels * inner * pattern.m + column;
  const int columns = static_cast<int>(min(width, inner - column)), size = columns * pattern.m;
  float u[kOwn] = {};
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int e = j * kThreads + static_cast<int>(threadIdx.x);
    if (e >= size) continue;
    u[j] = source.at(begin + e / columns * inner + e % columns, nonfinite);
    keys[e] = magnitude_key(u[j]);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int e = j * kThreads + static_cast<int>(threadIdx.x), row = e / columns;
    if (e >= size) continue;
    const int64_t i = begin + row * inner + e % columns;
    const bool kept = among_largest(keys + e % columns, columns, row, pattern);
    if (entry.saved != nullptr) static_cast<T*>(entry.saved)[i] = param[i];
    if (!kept && u[j] == u[j])
      param[i] = T{};
    else if (entry.grad != nullptr)
      param[i] = narrowed(u[j], T{});
    if (entry.mask != nullptr) entry.mask[i] = kept;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 4)
    nm_panel_kernel(const __grid_constant__ PerturbTable table, const Perturbation p, const Pattern pattern) {
  __shared__ int32_t keys[kChunk];
  bool nonfinite = false;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PerturbEntry& entry = table.entries[found.entry];
    with_types(entry, [&](auto t, auto w) { nm_panel<decltype(t), decltype(w)>(entry, found.number, p, pattern, &nonfinite, keys); });
  }
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

struct PackEntry {
  const uint8_t* flags;  // [numel]
  uint8_t* mask;
  int64_t numel;
};

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Table<PackEntry> table) {
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PackEntry& entry = table.entries[found.entry];
    const int64_t begin = (static_cast<int64_t>(found.number) * kThreads + threadIdx.x) * 8;
    if (begin >= entry.numel) continue;
    uint32_t bits = 0;
    for (int i = 0; i < 8 && begin + i < entry.numel; ++i) bits |= static_cast<uint32_t>(entry.flags[begin + i]) << i;
    entry.mask[begin / 8] = static_cast<uint8_t>(bits);
  }
}

int64_t chunk_of(const Item& item, int m) { return nm_chunk_size(reinterpret_cast<uintptr_t>(item.param) % 16 == 0, item.inner, m); }

// The tensors whose groups reach further than a chunk, and memory for a byte a weight of those with a mask.
struct Panels {
  std::vector<size_t> items;
  std::vector<int64_t> first;  // of a tensor's flags
  uint8_t* flags = nullptr;

  Panels(const std::vector<Item>& all, int m, const Allocate& allocate) {
    int64_t bytes = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].numel == 0 || chunk_of(all[i], m) > 0) continue;
      items.push_back(i);
      first.push_back(bytes);
      bytes += all[i].mask != nullptr ? all[i].numel : 0;
    }
    if (bytes > 0) flags = static_cast<uint8_t*>(allocate(bytes));
  }
};

void run_panels(const std::vector<Item>& items, const Panels& panels, const Perturbation& p, const Pattern& pattern, Stream stream) {
  const size_t count = panels.items.size();
  const auto entry = [&](size_t j) {
    Item item = items[panels.items[j]];
    if (item.mask != nullptr) item.mask = panels.flags + panels.first[j];
    return perturb_entry(item, panels.items[j], item.inner);
  };
  for (const PerturbTable& table : make_tables<PerturbEntry>(count, entry, [&](size_t j) { return panels_of(items[panels.items[j]], pattern.m); }))
    launch("N:M, panels", nm_panel_kernel, tasks_in(table), stream, table, p, pattern);
  if (panels.flags == nullptr) return;
  const auto packed = [&](size_t j) {
    const Item& item = items[panels.items[j]];
    return PackEntry{panels.flags + panels.first[j], item.mask, item.numel};
  };
  const auto tasks = [&](size_t j) {
    const Item& item = items[panels.items[j]];
    return item.mask != nullptr ? (item.numel + kChunk - 1) / kChunk : 0;
  };
  for (const auto& table : make_tables<PackEntry>(count, packed, tasks)) launch("N:M, pack", pack_kernel, tasks_in(table), stream, table);
}

}  // namespace

void nm(const std::vector<Item>& items, const Perturbation& p, int n, int m, const Allocate& allocate, Stream stream) {
  const Pattern pattern = {n, m};
  const Panels panels(items, m, allocate);  // all memory, before a launch raises the flag and changes a weight
  const bool prunes_only = p.perturbed == nullptr;
  const auto entry = [&](size_t i) { return perturb_entry(items[i], i, items[i].inner); };
  const auto tasks = [&](size_t i) {
    const int64_t size = chunk_of(items[i], m);
    const bool taken = size > 0 && (items[i].inner > 0 || !prunes_only);
    return taken ? (items[i].numel + size - 1) / size : 0;
  };
  for (const PerturbTable& table : make_tables<PerturbEntry>(items.size(), entry, tasks))
    launch("N:M", nm_kernel, tasks_in(table), stream, table, p, pattern);
  if (!panels.items.empty()) run_panels(items, panels, p, pattern, stream);
}

}  // namespace cuda
}  // namespace cram
