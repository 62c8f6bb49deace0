// How far weights are from N:M (docs/contract.md: Packed 2:4).
#include "block.cuh"
#include "launch.h"
#include "launchers.h"
#include "vector.cuh"

namespace cram {
namespace cuda {
namespace {

struct GroupEntry {
  const void* data;
  int64_t numel;
  int64_t inner;   // elements between neighbours along axis 1
  uint32_t index;  // in the list of the call
  Slot slot;
};

struct Pattern {
  int n, m;
};

// A row of the result.
struct Row {
  unsigned long long groups, first, nonzeros;  // first: ~0 where there is none, which is -1 as an int64
};

__global__ void __launch_bounds__(kThreads) clear_kernel(Row* result, int64_t rows) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < rows; i += int64_t{gridDim.x} * kThreads) result[i] = {0, ~0ull, 0};
}

// What this thread has found in one tensor.
struct Found {
  unsigned long long groups = 0, first = ~0ull, nonzeros = 0;

  __device__ __forceinline__ void group(int count, int n, int64_t place) {
    nonzeros += count;
    if (count <= n) return;
    ++groups;
    first = min(first, static_cast<unsigned long long>(place));
  }
  // Adds it to the result; all threads of a warp.
  __device__ __forceinline__ void flush(Row& row) {
    const unsigned long long all_groups = warp_inclusive_sum(groups), all_nonzeros = warp_inclusive_sum(nonzeros);
    if (lane_of() == 31 && all_nonzeros > 0) atomicAdd(&row.nonzeros, all_nonzeros);
    if (__shfl_sync(kAllLanes, all_groups, 31) > 0) {
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) first = min(first, __shfl_xor_sync(kAllLanes, first, distance));
      if (lane_of() == 31) atomicAdd(&row.groups, all_groups), atomicMin(&row.first, first);
    }
    *this = Found();
  }
};

constexpr int kOwn = 4;  // vectors or groups of a thread, which a task has at a time

// Whether a vector holds whole groups: then a task is kThreads * kOwn vectors, else as many groups.
CRAM_HOST_DEVICE bool by_vectors(Slot slot, int64_t inner, int m) { return inner == 1 && 16 / size_of(slot) % m == 0; }

template <class T>
__device__ __forceinline__ void count_vectors(const GroupEntry& entry, uint32_t number, uint32_t magnitude, const Pattern& pattern, Found& found) {
  constexpr int kLanes = Vector<T>::kLanes;
  const T* const x = static_cast<const T*>(entry.data);
  const int64_t begin = number * int64_t{kThreads * kOwn * kLanes};
  Vector<T> raw[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int64_t first = begin + (j * kThreads + static_cast<int>(threadIdx.x)) * kLanes;
    raw[j] = load(x, Span<kLanes>{first, 0, static_cast<int>(max(int64_t{0}, min(int64_t{kLanes}, entry.numel - first)))});
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int64_t first = begin + (j * kThreads + static_cast<int>(threadIdx.x)) * kLanes;
    uint32_t nonzero = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) nonzero |= ((bits_of(raw[j].get(i)) & magnitude) != 0 ? 1u : 0u) << i;
    for (int i = 0; i < kLanes; i += pattern.m) found.group(__popc(nonzero >> i & ((1u << pattern.m) - 1)), pattern.n, first + i);
  }
}

// Groups are the columns of tiles of m rows of `inner` numbers; a group begins in the first row.
template <class T>
__device__ __forceinline__ void count_columns(const GroupEntry& entry, uint32_t number, uint32_t magnitude, const Pattern& pattern, Found& found) {
  constexpr int kGroups = kThreads * kOwn;
  const T* const x = static_cast<const T*>(entry.data);
  const int64_t inner = entry.inner, begin = number * int64_t{kGroups}, groups = entry.numel / pattern.m;
  const int64_t tile = begin / inner, column = begin - tile * inner;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int own = j * kThreads + static_cast<int>(threadIdx.x);
    if (begin + own >= groups) continue;
    // tiles further on: in 32 bits, column + own < 2 * kGroups where inner is smaller than kGroups, and one at most where it is not
    const int64_t further = inner < kGroups ? static_cast<uint32_t>(column + own) / static_cast<uint32_t>(inner) : column + own >= inner;
    const int64_t place = (tile + further) * inner * pattern.m + column + own - further * inner;
    int count = 0;
#pragma unroll 4
    for (int row = 0; row < pattern.m; ++row) count += (bits_of(x[place + row * inner]) & magnitude) != 0;
    found.group(count, pattern.n, place);
  }
}

__global__ void __launch_bounds__(kThreads) violations_kernel(const __grid_constant__ Table<GroupEntry> table, const Pattern pattern, Row* result) {
  Found found;
  int64_t index = -1;
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task own = find(table, task);
    const GroupEntry& entry = table.entries[own.entry];
    if (entry.index != index) {
      if (index >= 0) found.flush(result[index]);
      index = entry.index;
    }
    const auto count = [&](auto t, uint32_t magnitude) {
      if (by_vectors(entry.slot, entry.inner, pattern.m))
        count_vectors<decltype(t)>(entry, own.number, magnitude, pattern, found);
      else
        count_columns<decltype(t)>(entry, own.number, magnitude, pattern, found);
    };
    switch (entry.slot) {
      case Slot::kInt8:
      case Slot::kFloat8:
        count(Byte{}, entry.slot == Slot::kInt8 ? 0xff : 0x7f);
        break;
      case Slot::kFloat16:
        count(BFloat16{}, 0x7fff);
        break;
      default:
        count(float{}, 0x7fffffffu);
    }
  }
  if (index >= 0) found.flush(result[index]);
}

}  // namespace

void nm_violations(const std::vector<GroupItem>& items, int n, int m, int64_t* result, Stream stream) {
  Row* const rows = reinterpret_cast<Row*>(result);
  const int64_t size = static_cast<int64_t>(items.size());
  launch("nm_violations, clear", clear_kernel, (size + kThreads - 1) / kThreads, stream, rows, size);
  const auto tables = make_tables<GroupEntry>(
      items.size(), [&](size_t i) { return GroupEntry{items[i].data, items[i].numel, items[i].inner, static_cast<uint32_t>(i), items[i].slot}; },
      [&](size_t i) {
        const int64_t unit = by_vectors(items[i].slot, items[i].inner, m) ? 16 / size_of(items[i].slot) : m;
        return (items[i].numel + unit * kThreads * kOwn - 1) / (unit * kThreads * kOwn);
      });
  for (const auto& table : tables)
    if (tasks_in(table) > 0) launch("nm_violations", violations_kernel, tasks_in(table), stream, table, Pattern{n, m}, rows);
}

}  // namespace cuda
}  // namespace cram
