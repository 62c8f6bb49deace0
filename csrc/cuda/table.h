// The tensors of one launch, passed by value: nothing to copy to the device, safe under stream capture. Lists that are longer take several launches.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "../item.h"
#include "tuning.h"

namespace cram {
namespace cuda {

constexpr int kMaxTensors = 450;       // a launch
constexpr int kArgumentBytes = 32764;  // of a kernel, with CUDA >= 12.1
constexpr int kOtherArguments = 512;   // of these, for what is not the table

// Vectors of 16 bytes are cut where the first array of a tensor (the one that is written) is aligned. In a tensor that starts between two
// boundaries each chunk begins and ends with a part of a vector, and is shorter so that a thread still has 8 weights at most. A multiple of 8.
CRAM_HOST_DEVICE constexpr int64_t chunk_size(bool aligned) { return aligned ? kChunk : kChunk - 8; }
inline int64_t chunk_size(const void* p) { return chunk_size(reinterpret_cast<uintptr_t>(p) % 16 == 0); }
inline int64_t chunks_of(const void* p, int64_t numel) { return (numel + chunk_size(p) - 1) / chunk_size(p); }

// Whether all vectors of these arrays, absent ones left out, are whole.
inline bool whole_vectors(int64_t numel, std::initializer_list<const void*> arrays) {
  return numel % 8 == 0 && std::all_of(arrays.begin(), arrays.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// An Entry is a tensor as a kernel sees it: plain data.
template <class Entry>
struct Table {
  static constexpr int kFitting = (kArgumentBytes - kOtherArguments) / static_cast<int>(sizeof(Entry) + sizeof(uint32_t));
  static constexpr int kCapacity = kFitting < kMaxTensors ? kFitting : kMaxTensors;
  static_assert(std::is_trivially_copyable<Entry>::value, "passed by value to kernels");

  int32_t count = 0;
  int32_t entries_before = 0;  // of the tables before this one
  int64_t tasks_before = 0;
  uint32_t ends[kCapacity];  // tasks (chunks, unless said otherwise) of the entries up to and including this one
  Entry entries[kCapacity];
};

// The tables of a list, at least one: entry(i) and the number of tasks(i) of each of its n tensors; those without a task are left out.
template <class Entry, class MakeEntry, class Tasks>
std::vector<Table<Entry>> make_tables(size_t n, MakeEntry entry, Tasks tasks) {
  std::vector<Table<Entry>> tables(1);
  int64_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    const int64_t own = tasks(i);
    if (own <= 0) continue;
    if (tables.back().count == Table<Entry>::kCapacity || total + own - tables.back().tasks_before > INT32_MAX) {
      const int32_t entries = tables.back().entries_before + tables.back().count;
      tables.emplace_back();
      tables.back().entries_before = entries;
      tables.back().tasks_before = total;
    }
    total += own;
    Table<Entry>& table = tables.back();
    table.entries[table.count] = entry(i);
    table.ends[table.count++] = static_cast<uint32_t>(total - table.tasks_before);
  }
  return tables;
}

template <class Entry>
CRAM_HOST_DEVICE inline uint32_t tasks_in(const Table<Entry>& table) {
  return table.count > 0 ? table.ends[table.count - 1] : 0;
}

#if defined(__CUDACC__)

struct Task {
  int entry;
  uint32_t number;  // among the tasks of the entry
};

// end(i): tasks of the entries up to and including i.
template <class End>
__device__ __forceinline__ Task find(int count, uint32_t task, End end) {
  int low = 0, high = count - 1;  // the first entry that ends behind the task
  while (low < high) {
    const int middle = (low + high) / 2;
    if (end(middle) > task)
      high = middle;
    else
      low = middle + 1;
  }
  return {low, low > 0 ? task - end(low - 1) : task};
}

template <class Entry>
__device__ __forceinline__ Task find(const Table<Entry>& table, uint32_t task) {
  return find(table.count, task, [&](int i) { return table.ends[i]; });
}

// Calls f(entry, its first task, number of tasks, number of the first of them in the launch) for the tasks of this block: neighbours, so that one
// search is enough, those of an entry together.
template <class Entry, class Function>
__device__ __forceinline__ void for_own_runs(const Table<Entry>& table, Function f) {
  const uint64_t tasks = tasks_in(table);
  uint32_t task = static_cast<uint32_t>(blockIdx.x * tasks / gridDim.x);
  const uint32_t end = static_cast<uint32_t>((blockIdx.x + 1) * tasks / gridDim.x);
  if (task == end) return;
  Task found = find(table, task);
  while (task < end) {
    const uint32_t count = min(end, table.ends[found.entry]) - task;
    f(table.entries[found.entry], found, count, task);
    task += count;
    ++found.entry, found.number = 0;  // every entry has a task
  }
}

// Calls f(entry, task, number of the task in the launch) for the tasks of this block.
template <class Entry, class Function>
__device__ __forceinline__ void for_own_tasks(const Table<Entry>& table, Function f) {
  const uint64_t tasks = tasks_in(table);
  uint32_t task = static_cast<uint32_t>(blockIdx.x * tasks / gridDim.x);
  const uint32_t end = static_cast<uint32_t>((blockIdx.x + 1) * tasks / gridDim.x);
  if (task == end) return;
  Task found = find(table, task);
  for (; task < end; ++task, ++found.number) {
    if (task == table.ends[found.entry]) ++found.entry, found.number = 0;  // every entry has a task
    f(table.entries[found.entry], found, task);
  }
}

#endif

}  // namespace cuda
}  // namespace cram
