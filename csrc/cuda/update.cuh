// What all updating kernels share: the flag, the gradient, bringing weights back, and the pass over the chunks (docs/contract.md: Restore, Gradient).
#pragma once

#include "../restore.h"
#include "launch.h"
#include "update.h"
#include "vector.cuh"

namespace cram {
namespace cuda {

// ---- The flag ----
// While a launch runs, the flag in memory holds in its lower half what it held before, in its upper half how many blocks are through: the last one
// knows that it is the last, and lowers the flag, without another launch and without memory of its own.

constexpr int kMaxBlocks = 0xffff;

__device__ __forceinline__ bool is_raised(const int32_t* flag) { return (*static_cast<const volatile int32_t*>(flag) & 0xffff) != 0; }

// For all threads of a block that is through: true in the last block of the launch, with the flag as it was before.
__device__ __forceinline__ bool is_last_block(int32_t* flag) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t before = atomicAdd(reinterpret_cast<unsigned*>(flag), 0x10000u);
    last = before >> 16 == gridDim.x - 1;
    if (last) atomicExch(flag, static_cast<int32_t>(before & 0xffffu));
    __threadfence();
  }
  __syncthreads();
  return last;
}

// ---- One tensor ----

// Calls f(T{}, S{}, chunk number `number` of the tensor) with the number types of the parameter, and of its weights and state; a WholeChunk where it
// may.
template <class Function>
__device__ __forceinline__ void with_chunks(const UpdateEntry& entry, uint32_t number, Function f) {
  const void* const param = entry.param.as<void>();
  const int64_t numel = entry.numel.value();
  with_number_types(static_cast<DType>(entry.dtype), entry.has_master, [&](auto t, auto s) {
    if (entry.whole)
      f(t, s, WholeChunk(param, numel, number));
    else
      f(t, s, Chunk(param, numel, number));
  });
}

__device__ __forceinline__ Scales scales_of(const Update& update) {
  Scales scales;
  scales.has_grad = update.inv_scale != nullptr;
  scales.has_first_grad = update.first_inv_scale != nullptr;
  if (scales.has_grad) scales.grad = *update.inv_scale;
  if (scales.has_first_grad) scales.first_grad = *update.first_inv_scale;
  return scales;
}

// Number i of a vector: as a float; x, rounded.
template <class T>
__device__ __forceinline__ float number(const Vector<T>& v, int i) {
  return widen(v.get(i));
}
template <class T>
__device__ __forceinline__ void set_number(Vector<T>& v, int i, float x) {
  v.set(i, nearest(x, T{}));
}

// g1 + (M ? g2 : +0) of a tensor that has a gradient. load_mask() comes after all other loads of a vector: its bits are taken apart at once, which waits.
template <class T>
struct Gradient {
  Vector<T> first = {}, second = {};  // what no branch sets must be set here: else it lives on from chunk to chunk, in registers of its own
  uint32_t kept = ~0u;
  bool has_first, has_second;

  // Loads nothing unless it is wanted.
  template <class Span>
  __device__ __forceinline__ Gradient(const UpdateEntry& entry, const Span& span, bool wanted = true)
      : has_first(wanted && entry.first_grad.value() != 0), has_second(wanted && entry.grad.value() != 0) {
    if (has_first) first = load(entry.first_grad.as<T>(), span);
    if (has_second) second = load(entry.grad.as<T>(), span);
  }
  template <class Span>
  __device__ __forceinline__ void load_mask(const UpdateEntry& entry, const Span& span) {
    if (has_second && entry.mask.value() != 0) kept = cuda::load_mask(entry.mask.as<uint8_t>(), span);
  }
  __device__ __forceinline__ float at(int i, const Scales& scales) const {
    const float g2 = has_second && (kept >> i & 1) != 0 ? unscaled(number(second, i), scales.grad, scales.has_grad) : 0.0f;
    if (!has_first) return g2;
    const float g1 = unscaled(number(first, i), scales.first_grad, scales.has_first_grad);
    return has_second ? add(g1, g2) : g1;
  }
};

// A vector of the parameter from its master weight, rounded, or from its saved copy, bit for bit.
template <class T, class S, int kLanes>
__device__ __forceinline__ Vector<T> restored(const Raw<S, kLanes>& origin) {
  if constexpr (sizeof(T) == sizeof(S)) {
    return origin.parts[0];
  } else {
    Vector<T> out = {};
#pragma unroll
    for (int i = 0; i < kLanes; ++i) set_number(out, i, origin.at(i));
    return out;
  }
}

template <class T, class S, class Chunk>
__device__ __forceinline__ void restore_chunk(const UpdateEntry& entry, const Chunk& chunk) {
  if (entry.origin.value() == 0) return;
  T* const param = entry.param.as<T>();
  for_vectors(chunk, param, [&](int, const auto& span) {
    store(param, restored<T>(Raw<S, Vector<T>::kLanes>(entry.origin.as<S>(), span)), span);
  });
}

// One step of an optimizer for a chunk; the loads of a vector of weights and state come before its stores.
template <class T, class S, class Step, class Chunk>
__device__ __forceinline__ void update_chunk(const UpdateEntry& entry, const Chunk& chunk, bool perturbed, const Scales& scales, const Step& step) {
  constexpr int kLanes = Vector<T>::kLanes, kPart = Vector<S>::kLanes;
  T* const param = entry.param.as<T>();
  const bool from_origin = entry.has_master || (perturbed && entry.origin.value() != 0);
  for_vectors<1>(chunk, param, [&](int, const auto& span) {
    Gradient<T> gradient(entry, span);
    Vector<T> out = {};
#pragma unroll
    for (int part = 0; part < kLanes / kPart; ++part) {
      const auto own = part_of<kPart>(span, part);
      Vector<S> w = load(from_origin ? entry.origin.as<S>() : entry.param.as<S>(), own), state[Step::kStates];
#pragma unroll
      for (int s = 0; s < Step::kStates; ++s) {
        state[s] = {};
        if (step.loads(s)) state[s] = load(entry.state[s].as<S>(), own);
      }
      if (part == 0) gradient.load_mask(entry, span);
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        float weight = number(w, i), x[Step::kStates];
#pragma unroll
        for (int s = 0; s < Step::kStates; ++s) x[s] = number(state[s], i);
        step(weight, x, gradient.at(part * kPart + i, scales));
#pragma unroll
        for (int s = 0; s < Step::kStates; ++s) set_number(state[s], i, x[s]);
        set_number(w, i, weight);
        set_number(out, part * kPart + i, weight);
      }
#pragma unroll
      for (int s = 0; s < Step::kStates; ++s)
        if (step.stores(s)) store(entry.state[s].as<S>(), state[s], own);
      if (entry.has_master) store(entry.origin.as<S>(), w, own);
    }
    store(param, out, span);
  });
}

// ---- One launch ----

__device__ __forceinline__ bool is_skipped(const Update& update) { return update.found_inf != nullptr && *update.found_inf != 0; }

// Restores every tensor; those that have a gradient take a step of the optimizer, unless found_inf is set. What a Step is:
//   Setting              the optimizer's numbers that several tensors share: one of UpdateCall<Setting>::settings
//   kStates              how many states a weight has
//   kBlocks              blocks that an SM must be able to hold, for __launch_bounds__
//   Step(entry, call)    made once a block and tensor, by one thread: reads the learning rate and the step number from the device
//   loads(s), stores(s)  whether state s is read, written
//   (w, states, g)       updates one weight and its states with the gradient g
//   done(entry)          called once for each tensor that was updated, after all blocks: counts the step up
template <class Step>
__global__ void __launch_bounds__(kThreads, Step::kBlocks)
    update_kernel(const __grid_constant__ UpdateTable table, const __grid_constant__ UpdateCall<typename Step::Setting> call) {
  __shared__ Step step;
  const bool perturbed = is_raised(call.update.perturbed), skipped = is_skipped(call.update);
  const Scales scales = scales_of(call.update);
  int prepared = -1;
  for_own_tasks(table, [&](const UpdateEntry& entry, const Task& task, uint32_t) {
    if (skipped || !entry.has_gradient()) {
      if (perturbed)
        with_chunks(entry, task.number, [&](auto t, auto s, const auto& chunk) { restore_chunk<decltype(t), decltype(s)>(entry, chunk); });
      return;
    }
    if (task.entry != prepared) {
      __syncthreads();
      if (threadIdx.x == 0) step = Step(entry, call);
      __syncthreads();
      prepared = task.entry;
    }
    const Step own = step;
    with_chunks(entry, task.number,
                [&](auto t, auto s, const auto& chunk) { update_chunk<decltype(t), decltype(s)>(entry, chunk, perturbed, scales, own); });
  });
  if (!is_last_block(call.update.perturbed)) return;
  if (!skipped) {
    for (int i = threadIdx.x; i < table.count; i += kThreads)
      if (table.entries[i].has_gradient()) Step::done(table.entries[i]);
  }
  if (call.last && threadIdx.x == 0) *call.update.perturbed = 0;
}

__device__ __forceinline__ float learning_rate(const UpdateEntry& entry, const PerItem& lr) {
  return lr.values[lr.each ? entry.index[0] | static_cast<uint32_t>(entry.index[1]) << 16 : 0];
}

template <class Setting>
void launch_all(const char* name, void (*kernel)(UpdateTable, UpdateCall<Setting>), const std::vector<UpdateLaunch<Setting>>& launches,
                Stream stream) {
  for (const auto& one : launches) {
    const int64_t chunks = one.table.count > 0 ? one.table.ends[one.table.count - 1] : 1;
    launch(name, kernel, std::min<int64_t>(chunks, kMaxBlocks), stream, one.table, one.call);
  }
}

}  // namespace cuda
}  // namespace cram
