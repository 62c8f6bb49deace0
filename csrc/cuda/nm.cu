// N:M along axis 1 (docs/contract.md: N:M). A tile is m rows of `inner` consecutive weights, a group one of its columns. Groups are numbered tile by
// tile, so that neighbours in number are neighbours in memory. There are three ways to rank a group:
//   vectors  m = 4 or 8 and inner = 1: a group lies within the 16 bytes of a vector, or of two neighbouring threads
//   groups   m = 4 or 8 and any inner: a thread has a whole group in registers
//   keys     any other m: a thread has a weight, the keys are exchanged through shared memory
#include "launch.h"
#include "mask.cuh"
#include "rank.cuh"
#include "source.cuh"

namespace cram {
namespace cuda {
namespace {

// Weights of a task: whole tiles and whole mask bytes; 0 where no such number fits into a chunk, so that a task is a panel (below).
CRAM_HOST_DEVICE inline uint32_t task_size(int64_t inner, int m) {
  if (inner * m > kChunk) return 0;
  const uint32_t tile = static_cast<uint32_t>(inner) * m, unit = tile * (tile % 8 == 0 ? 1 : tile % 4 == 0 ? 2 : tile % 2 == 0 ? 4 : 8);
  return kChunk / unit * unit;
}

// ---- Weights in vectors ----

// Keeps the bits of `kept`, +0 elsewhere.
template <class T>
__device__ __forceinline__ Vector<T> zeroed(Vector<T> u, uint32_t kept) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kLanes; ++i)
    if ((kept >> i & 1) == 0) u.set(i, T{});
  return u;
}

// Which keys of a vector stay. A group of 8 float32 has its first half in the even one of two neighbouring threads.
template <int M, int kLanes>
__device__ __forceinline__ uint32_t kept_lanes(const int32_t (&key)[kLanes], int n) {
  uint32_t kept = 0;
  int32_t group[M];
  if constexpr (kLanes < M) {
    const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int32_t other = __shfl_xor_sync(0xffffffffu, key[i], 1);
      group[i] = odd ? other : key[i];
      group[kLanes + i] = odd ? key[i] : other;
    }
    kept = among_largest(group, n) >> (odd ? kLanes : 0);
  } else {
#pragma unroll
    for (int first = 0; first < kLanes; first += M) {
#pragma unroll
      for (int i = 0; i < M; ++i) group[i] = key[first + i];
      kept |= among_largest(group, n) << first;
    }
  }
  return kept;
}

// Bits of a number of type T as keys, where none is a NaN.
template <class T>
__device__ __forceinline__ int32_t finite_key(uint32_t bits) {
  return static_cast<int32_t>(bits & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fffu));
}

template <int M, class T, class W>
__device__ __forceinline__ void prune_vectors(const PerturbEntry& entry, uint32_t number, const Perturbation& p, int n) {
  constexpr int kLanes = Vector<T>::kLanes;
  T* const param = static_cast<T*>(entry.param);
  const Source<T, W> source(entry, param, p);
  const WholeChunk chunk(param, entry.numel, number);
  MovedVectors<T, W> moved;
  moved.issue(source, param, param, chunk);
  const bool finite = moved.move(source);
  if (!finite) moved.move_exactly(source, param, chunk, p.found_inf);
  uint32_t kept[kVectors<T>];
  for_vectors(chunk, param, [&](int j, const WholeSpan<kLanes>& span) {
    int32_t key[kLanes];
    uint32_t nans = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) key[i] = finite_key<T>(bits_of(moved.u[j].get(i)));
    if (!finite) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        key[i] = moved.key(j, i);
        nans |= (key[i] == kNanKey ? 1u : 0u) << i;
      }
    }
    kept[j] = kept_lanes<M>(key, n);
    if (entry.saved != nullptr) store(static_cast<T*>(entry.saved), moved.raw[j], span);
    store(param, zeroed(moved.u[j], kept[j] | nans), span);
    kept[j] &= ~nans;
  });
  if (entry.mask != nullptr) write_mask<T>(chunk, param, entry.mask, kept);
}

template <class T, class W, class Chunk>
__device__ __forceinline__ void only_perturb(const PerturbEntry& entry, const Chunk& chunk, const Perturbation& p) {
  T* const param = static_cast<T*>(entry.param);
  MovedVectors<T, W> moved;
  moved.load_and_move(Source<T, W>(entry, param, p), param, chunk, p.found_inf);
  for_vectors(chunk, param, [&](int j, const auto& span) {
    if (entry.saved != nullptr) store(static_cast<T*>(entry.saved), moved.raw[j], span);
    store(param, moved.u[j], span);
  });
}

// ---- Weights one by one ----

// The groups of a task: those of whole tiles, or, of a tile that is too large, some neighbouring columns (a panel).
struct Groups {
  int64_t begin, inner;  // the first weight; a group's weights are `inner` apart
  uint32_t m, count;
  bool panel;

  __device__ __forceinline__ Groups(const PerturbEntry& entry, uint32_t number, int m) : inner(entry.extra), m(m) {
    const uint32_t size = task_size(inner, m);
    panel = size == 0;
    if (panel) {
      const int64_t width = min(inner, static_cast<int64_t>(kChunk / m)), panels = (inner + width - 1) / width, column = number % panels * width;
      begin = number / panels * inner * m + column;
      count = static_cast<uint32_t>(min(width, inner - column));
    } else {
      begin = static_cast<int64_t>(number) * size;
      count = static_cast<uint32_t>(min(static_cast<int64_t>(size), entry.numel - begin)) / m;
    }
  }
  // The first weight of a group, counted from `begin`: m - 1 rows more for each tile before its own.
  __device__ __forceinline__ uint32_t first(uint32_t group) const {
    const uint32_t columns = static_cast<uint32_t>(inner);
    return panel ? group : group + group / columns * (columns * (m - 1));
  }
  // How far apart a group's flags are (Flags).
  __device__ __forceinline__ uint32_t pitch() const { return panel ? count : static_cast<uint32_t>(inner); }
};

// A byte a weight of a task, 1: kept. Two tasks take turns, so that one barrier a task is enough.
struct Flags {
  alignas(8) uint8_t bytes[2][kChunk];
};

// After a barrier. The bits of whole tiles; bytes of a panel, whose bits share bytes with those of other panels: pack_kernel makes bits of them.
__device__ __forceinline__ void write_flags(const Groups& groups, const uint8_t* flags, uint8_t* mask) {
  const uint32_t size = groups.count * groups.m;
  if (groups.panel) {
    for (uint32_t e = threadIdx.x; e < size; e += kThreads) mask[groups.begin + e / groups.count * groups.inner + e % groups.count] = flags[e];
    return;
  }
  const uint32_t first = 8 * threadIdx.x;
  if (first >= size) return;
  const uint2 eight = *reinterpret_cast<const uint2*>(flags + first);
  const auto bits = [](uint32_t four) { return (four & 0x01010101u) * 0x01020408u >> 24 & 15u; };  // behind the last flag is anything
  const uint32_t exist = 0xffu >> (first + 8 > size ? first + 8 - size : 0);
  mask[groups.begin / 8 + threadIdx.x] = static_cast<uint8_t>((bits(eight.x) | bits(eight.y) << 4) & exist);
}

// A thread has whole groups. All loads come first.
template <int M, class T, class W>
__device__ __forceinline__ void prune_groups(const PerturbEntry& entry, const Groups& groups, const Perturbation& p, int n, uint8_t* flags) {
  constexpr int kGroups = kItems / M;
  T* const param = static_cast<T*>(entry.param) + groups.begin;
  T* const saved = entry.saved != nullptr ? static_cast<T*>(entry.saved) + groups.begin : nullptr;
  const Source<T, W> source(entry, entry.param, p);
  const W* const weights = source.weights + groups.begin;
  const T* const grads = source.grad != nullptr ? source.grad + groups.begin : nullptr;
  T raw[kGroups][M], grad[kGroups][M];
  W weight[kGroups][M];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const uint32_t group = j * kThreads + threadIdx.x, first = groups.first(group);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      raw[j][i] = grad[j][i] = {};
      weight[j][i] = {};
      if (group >= groups.count) continue;
      const int64_t at = first + i * groups.inner;
      raw[j][i] = param[at];
      if constexpr (sizeof(T) != sizeof(W)) weight[j][i] = weights[at];
      if (grads != nullptr) grad[j][i] = grads[at];
    }
  }
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const uint32_t group = j * kThreads + threadIdx.x, first = groups.first(group);
    if (group >= groups.count) return;
    uint32_t bits[M], nans = 0;
    int32_t key[M];
    float u[M], zero = 0;  // a sum of zeros as long as every u is finite
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if constexpr (sizeof(T) == sizeof(W)) weight[j][i] = raw[j][i];
      u[i] = uphill(widen(weight[j][i]), mul(widen(grad[j][i]), source.inv_scale), source.rho);
      zero = __fmaf_rn(u[i], 0.0f, zero);
    }
    if (zero == 0 && grads != nullptr) {
#pragma unroll
      for (int i = 0; i < M; i += 2) {
        if constexpr (sizeof(T) == 4) {
          bits[i] = to_bits(u[i]), bits[i + 1] = to_bits(u[i + 1]);
        } else {
          const uint32_t pair = rounded_pair(u[i], u[i + 1], T{});
          bits[i] = pair & 0xffffu, bits[i + 1] = pair >> 16;
        }
      }
#pragma unroll
      for (int i = 0; i < M; ++i) key[i] = finite_key<T>(bits[i]);
    } else {
      bool nonfinite = false;
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const T moved = grads != nullptr ? narrowed(source.moved(widen(weight[j][i]), widen(grad[j][i]), &nonfinite), T{}) : raw[j][i];
        bits[i] = bits_of(moved);
        key[i] = magnitude_key(widen(moved));
        nans |= (key[i] == kNanKey ? 1u : 0u) << i;
      }
      if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
    }
    const uint32_t kept = among_largest(key, n), stays = kept | nans;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const int64_t at = first + i * groups.inner;
      if (saved != nullptr) saved[at] = raw[j][i];
      param[at] = from_bits_of(stays >> i & 1 ? bits[i] : 0u, T{});
      if (entry.mask != nullptr) flags[first + i * groups.pitch()] = static_cast<uint8_t>((kept & ~nans) >> i & 1);
    }
  }
}

// A thread has single weights; keys: those of the task's weights, row after row.
template <class T, class W>
__device__ __forceinline__ void prune_weights(const PerturbEntry& entry, const Groups& groups, const Perturbation& p, int n, uint8_t* flags,
                                              int32_t* keys) {
  T* const param = static_cast<T*>(entry.param);
  const Source<T, W> source(entry, param, p);
  float u[kItems] = {};
  bool nonfinite = false;
  const auto for_weights = [&](auto f) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t e = j * kThreads + threadIdx.x, row = e / groups.count, group = e % groups.count;
      if (row < groups.m) f(e, row, group, groups.begin + groups.first(group) + row * groups.inner, u[j]);
    }
  };
  __syncthreads();  // the keys of the task before have been read
  for_weights([&](uint32_t e, uint32_t, uint32_t, int64_t at, float& own) {
    own = source.at(at, &nonfinite);
    keys[e] = magnitude_key(own);
  });
  __syncthreads();
  for_weights([&](uint32_t e, uint32_t row, uint32_t group, int64_t at, float own) {
    uint32_t rank = 0;  // ascending; of equal keys the later ones are larger
    for (uint32_t other = 0; other < groups.m; ++other) {
      const int32_t key = keys[other * groups.count + group];
      rank += key < keys[e] || (key == keys[e] && other < row) ? 1 : 0;
    }
    const bool largest = rank + n >= groups.m, nan = own != own;
    if (entry.saved != nullptr) static_cast<T*>(entry.saved)[at] = param[at];
    if (!largest && !nan)
      param[at] = T{};
    else if (entry.grad != nullptr)
      param[at] = narrowed(own, T{});
    if (entry.mask != nullptr) flags[groups.first(group) + row * groups.pitch()] = largest && !nan;
  });
  if (nonfinite && p.found_inf != nullptr) *p.found_inf = 1;
}

// ---- Launches ----

// M: 4 or 8, the pattern's; 0: any other.
template <int M>
__global__ void __launch_bounds__(kThreads, kNmBlocks)
    nm_kernel(const __grid_constant__ PerturbTable table, const Perturbation p, const __grid_constant__ Pattern pattern) {
  __shared__ Flags flags;
  __shared__ int32_t keys[M == 0 ? kChunk : 1];
  int turn = 0;
  if (p.perturbed != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.perturbed = 1;
  for_own_tasks(table, [&](const PerturbEntry& entry, const Task& task, uint32_t) {
    if (entry.extra == 0) {
      with_chunks(entry, task.number,
                  [&](auto t, auto w, const auto& chunk) { only_perturb<decltype(t), decltype(w)>(entry, chunk, p); });
      return;
    }
    if constexpr (M > 0) {
      if (entry.extra == 1 && entry.whole) {
        with_types(entry, [&](auto t, auto w) { prune_vectors<M, decltype(t), decltype(w)>(entry, task.number, p, pattern.n); });
        return;
      }
    }
    const Groups groups(entry, task.number, pattern.m);
    if (entry.mask != nullptr) turn ^= 1;
    with_types(entry, [&](auto t, auto w) {
      if constexpr (M > 0)
        prune_groups<M, decltype(t), decltype(w)>(entry, groups, p, pattern.n, flags.bytes[turn]);
      else
        prune_weights<decltype(t), decltype(w)>(entry, groups, p, pattern.n, flags.bytes[turn], keys);
    });
    if (entry.mask == nullptr) return;
    __syncthreads();
    write_flags(groups, flags.bytes[turn], entry.mask);
  });
}

struct PackEntry {
  const uint8_t* flags;  // [numel]
  uint8_t* mask;
  int64_t numel;
};

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Table<PackEntry> table) {
  for_own_tasks(table, [&](const PackEntry& entry, const Task& task, uint32_t) {
    const int64_t begin = (static_cast<int64_t>(task.number) * kThreads + threadIdx.x) * 8;
    if (begin >= entry.numel) return;
    uint32_t bits = 0;
    for (int i = 0; i < 8 && begin + i < entry.numel; ++i) bits |= static_cast<uint32_t>(entry.flags[begin + i]) << i;
    entry.mask[begin / 8] = static_cast<uint8_t>(bits);
  });
}

int64_t tasks_of(const Item& item, int m) {
  if (item.inner == 0) return chunks_of(item.param, item.numel);
  if (const int64_t size = task_size(item.inner, m); size > 0) return (item.numel + size - 1) / size;
  const int64_t width = std::min<int64_t>(item.inner, kChunk / m);
  return item.numel / (item.inner * m) * ((item.inner + width - 1) / width);
}

void nm(const std::vector<Item>& items, const Perturbation& p, const Pattern& pattern, const Context& c) {
  const int m = pattern.m;
  // Memory for a byte a weight of the tensors with panels and a mask: all of it before a launch raises the flag and changes a weight.
  std::vector<int64_t> first(items.size(), -1);
  int64_t bytes = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].numel == 0 || items[i].inner == 0 || items[i].mask == nullptr || task_size(items[i].inner, m) > 0) continue;
    first[i] = bytes;
    bytes += (items[i].numel + 7) / 8 * 8;
  }
  uint8_t* const flags = bytes > 0 ? static_cast<uint8_t*>(c.allocate(bytes)) : nullptr;

  const bool prunes_only = p.perturbed == nullptr;
  const auto entry = [&](size_t i) {
    Item item = items[i];
    if (first[i] >= 0) item.mask = flags + first[i];
    return perturb_entry(item, i, item.inner);
  };
  const auto tasks = [&](size_t i) { return items[i].inner == 0 && prunes_only ? 0 : tasks_of(items[i], m); };
  const auto kernel = m == 4 ? nm_kernel<4> : m == 8 ? nm_kernel<8> : nm_kernel<0>;
  for (const PerturbTable& table : make_tables<PerturbEntry>(items.size(), entry, tasks))
    launch("N:M", kernel, tasks_in(table), c.stream, table, p, pattern);
  if (flags == nullptr) return;
  const auto packed = [&](size_t i) { return PackEntry{flags + first[i], items[i].mask, items[i].numel}; };
  const auto chunks = [&](size_t i) { return first[i] >= 0 ? (items[i].numel + kChunk - 1) / kChunk : 0; };
  for (const auto& table : make_tables<PackEntry>(items.size(), packed, chunks)) launch("N:M, pack", pack_kernel, tasks_in(table), c.stream, table);
}

}  // namespace
}  // namespace cuda

void PruneNm::run(const cuda::Context& c) { cuda::nm(items, {}, pattern, c); }
// Memory: a byte a weight for the masks of tensors whose axis 1 lies far apart in memory.
void PerturbNm::run(const cuda::Context& c) { cuda::nm(items, cuda::perturbation_of(*this), pattern, c); }

}  // namespace cram
