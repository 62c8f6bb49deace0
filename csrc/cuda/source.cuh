// The perturbed weights of a tensor, vector by vector (docs/contract.md: Perturb).
#pragma once

#include "../perturb.h"
#include "../restore.h"
#include "entry.h"
#include "launchers.h"
#include "vector.cuh"

namespace cram {
namespace cuda {

// Calls f(T{}, W{}) with the number types of the parameter and of the weights that u is computed from.
template <class Function>
__device__ __forceinline__ void with_types(const PerturbEntry& entry, Function f) {
  const bool master = entry.master != nullptr;
  switch (static_cast<DType>(entry.dtype)) {
    case DType::kBFloat16:
      return master ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return master ? f(Float16{}, float{}) : f(Float16{}, Float16{});
    default:
      return f(float{}, float{});
  }
}

// Where u comes from: the weights (the parameter, its saved copy, or its master) and, optional, the gradient.
template <class T, class W>
struct Source {
  const W* weights;
  const T* grad;
  float rho, inv_scale;
  bool scaled;

  __device__ __forceinline__ Source(const PerturbEntry& entry, const void* weights_or_saved, const Perturbation& p)
      : weights(static_cast<const W*>(entry.master != nullptr ? entry.master : weights_or_saved)),
        grad(static_cast<const T*>(entry.grad)),
        rho(grad != nullptr ? p.rho[p.rho_per_tensor ? entry.index : 0] : 0),
        inv_scale(p.inv_scale != nullptr ? *p.inv_scale : 1),
        scaled(p.inv_scale != nullptr) {}

  // u from a weight and its gradient; *nonfinite is set where the gradient is Inf or NaN.
  __device__ __forceinline__ float moved(float w, float g, bool* nonfinite) const {
    g = unscaled(g, inv_scale, scaled);
    *nonfinite |= (to_bits(g) & 0x7fffffffu) >= static_cast<uint32_t>(kInfKey);
    return rounded(uphill(w, g, rho), T{});
  }

  // u of one element.
  __device__ __forceinline__ float at(int64_t i, bool* nonfinite) const {
    const float w = widen(weights[i]);
    return grad != nullptr ? moved(w, widen(grad[i]), nonfinite) : w;
  }

  // u of a vector whose weights are in u.
  template <int kLanes>
  __device__ __forceinline__ void move(Lanes<kLanes>& u, const Span<kLanes>& span, bool* nonfinite) const {
    if (grad == nullptr) return;
    const Lanes<kLanes> g = load_floats(grad, span);
    bool bad = false;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      bool own = false;
      u[i] = moved(u[i], g[i], &own);
      bad |= own && span.has(i);
    }
    *nonfinite |= bad;
  }
};

// What a thread has of a chunk: the parameters' bits as they are, and u. All loads come before the first store.
template <class T, class W>
struct MovedVectors {
  static constexpr int kLanes = Vector<T>::kLanes;
  Vector<T> raw[kVectors<T>] = {};
  Lanes<kLanes> u[kVectors<T>] = {};

  __device__ __forceinline__ void load(const Source<T, W>& source, const T* param, const Chunk& chunk, bool* nonfinite) {
    for_vectors(chunk, param, [&](int j, const Span<kLanes>& span) {
      raw[j] = cuda::load(param, span);
      if constexpr (sizeof(T) == sizeof(W)) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) u[j][i] = widen(raw[j].get(i));
      } else {
        u[j] = load_floats(source.weights, span);
      }
      source.move(u[j], span, nonfinite);
    });
  }
};

// What is written for a vector: u, or the weights' own bits where they did not move; +0 where `kept` has no bit, but a NaN stays.
template <class T, int kLanes>
__device__ __forceinline__ Vector<T> pruned(Vector<T> raw, const Lanes<kLanes>& u, uint32_t kept, bool moves) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if ((kept >> i & 1) == 0 && u[i] == u[i])
      raw.set(i, T{});
    else if (moves)
      raw.set(i, narrowed(u[i], T{}));
  }
  return raw;
}

}  // namespace cuda
}  // namespace cram
