// The perturbed weights of a tensor, vector by vector (docs/contract.md: Perturb).
#pragma once

#include "../perturb.h"
#include "../restore.h"
#include "entry.h"
#include "launchers.h"
#include "vector.cuh"

namespace cram {
namespace cuda {

template <class Entry, class Function>
__device__ __forceinline__ void with_types(const Entry& entry, Function f) {
  with_number_types(static_cast<DType>(entry.dtype), entry.master != nullptr, f);
}

// Calls f(T{}, W{}, chunk number `number` of the tensor), a WholeChunk where it may.
template <class Function>
__device__ __forceinline__ void with_chunks(const PerturbEntry& entry, uint32_t number, Function f) {
  with_types(entry, [&](auto t, auto w) {
    if (entry.whole)
      f(t, w, WholeChunk(entry.param, entry.numel, number));
    else
      f(t, w, Chunk(entry.param, entry.numel, number));
  });
}

// Where u comes from: the weights (the parameter, its saved copy, or its master) and, optional, the gradient.
template <class T, class W>
struct Source {
  const W* weights;
  const T* grad;
  float rho, inv_scale;
  bool scaled;

  template <class Entry>
  __device__ __forceinline__ Source(const Entry& entry, const void* weights_or_saved, const Perturbation& p)
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

  // u of a vector.
  template <template <int> class Span, int kLanes>
  __device__ __forceinline__ Lanes<kLanes> of(const Span<kLanes>& span) const {
    const Raw<W, kLanes> w(weights, span);
    Raw<T, kLanes> g = {};
    if (grad != nullptr) g = Raw<T, kLanes>(grad, span);
    Lanes<kLanes> u;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      bool ignored = false;
      u[i] = grad != nullptr ? moved(w.at(i), g.at(i), &ignored) : w.at(i);
    }
    return u;
  }
};

// Two numbers rounded to T, to nearest even, in one word; no NaN.
__device__ __forceinline__ uint32_t rounded_pair(float low, float high, BFloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t rounded_pair(float low, float high, Float16) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// x, as T.
template <class T, int kLanes>
__device__ __forceinline__ Vector<T> rounded_vector(const Lanes<kLanes>& x) {
  Vector<T> out;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4)
      out.words[w] = to_bits(x[w]);
    else
      out.words[w] = rounded_pair(x[2 * w], x[2 * w + 1], T{});
  }
  return out;
}

// The weights of a chunk that a thread has, in registers: the parameter's bits, and u. issue() starts all loads; move() or move_exactly() waits for
// them. A thread thus has every vector of parameter, master and gradient in flight at once.
template <class T, class W>
struct MovedVectors {
  static constexpr int kLanes = Vector<T>::kLanes;
  Vector<T> raw[kVectors<T>], u[kVectors<T>];

  __device__ __forceinline__ int32_t key(int j, int i) const { return magnitude_key(widen(u[j].get(i))); }

  // own: the parameter, or the saved copy of one that has been written; `param` says where vectors begin.
  template <class Chunk>
  __device__ __forceinline__ void issue(const Source<T, W>& source, const T* own, const T* param, const Chunk& chunk) {
    for_vectors(chunk, param, [&](int j, const auto& span) {
      raw[j] = load(own, span);
      if constexpr (sizeof(T) != sizeof(W)) masters_[j] = load_floats(source.weights, span);
      grads_[j] = {};
      if (source.grad != nullptr) grads_[j] = load(source.grad, span);
    });
  }

  // u, and true; false where one may be Inf or NaN (as it is where its gradient is): then u is not to be used.
  __device__ __forceinline__ bool move(const Source<T, W>& source) {
    if (source.grad == nullptr) {  // not w + 0: the sum of -0 and 0 is +0
#pragma unroll
      for (int j = 0; j < kVectors<T>; ++j) u[j] = raw[j];
      return finite();
    }
    Lanes<kLanes> x[kVectors<T>];
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j)
#pragma unroll
      for (int i = 0; i < kLanes; ++i) x[j][i] = widen(grads_[j].get(i));
    if (source.scaled) {
#pragma unroll
      for (int j = 0; j < kVectors<T>; ++j)
#pragma unroll
        for (int i = 0; i < kLanes; ++i) x[j][i] = mul(x[j][i], source.inv_scale);
    }
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) x[j][i] = uphill(weight(j, i), x[j][i], source.rho);
      u[j] = rounded_vector<T>(x[j]);
    }
    return finite();
  }

  // u, whatever it is.
  template <class Chunk>
  __device__ __forceinline__ void move_exactly(const Source<T, W>& source, const T* param, const Chunk& chunk, float* found_inf) {
    bool nonfinite = false;
    for_vectors(chunk, param, [&](int j, const auto& span) {
      u[j] = raw[j];
      if (source.grad == nullptr) return;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        bool own = false;
        u[j].set(i, narrowed(source.moved(weight(j, i), widen(grads_[j].get(i)), &own), T{}));
        nonfinite |= own && span.has(i);
      }
    });
    if (nonfinite && found_inf != nullptr) *found_inf = 1;
  }

  template <class Chunk>
  __device__ __forceinline__ void load_and_move(const Source<T, W>& source, const T* param, const Chunk& chunk, float* found_inf) {
    issue(source, param, param, chunk);
    if (!move(source)) move_exactly(source, param, chunk, found_inf);
  }

 private:
  // Whether every u is finite: a sum of 0 * u is 0 then, and else NaN. Two numbers of 16 bits a step, all as halves: a bfloat16 that is Inf or NaN
  // is NaN as a half too, and so are some that are not, from 2^121 on, which are called infinite here.
  __device__ __forceinline__ bool finite() const {
    if constexpr (sizeof(T) == 4) {
      float zero = 0;
#pragma unroll
      for (int j = 0; j < kVectors<T>; ++j)
#pragma unroll
        for (int i = 0; i < kLanes; ++i) zero = __fmaf_rn(u[j].get(i), 0.0f, zero);
      return zero == 0;
    } else {
      uint32_t zeros = 0;
#pragma unroll
      for (int j = 0; j < kVectors<T>; ++j)
#pragma unroll
        for (int w = 0; w < 4; ++w) asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(u[j].words[w]), "r"(0));
      return zeros == 0;
    }
  }

  __device__ __forceinline__ float weight(int j, int i) const {
    if constexpr (sizeof(T) == sizeof(W))
      return widen(raw[j].get(i));
    else
      return masters_[j][i];
  }

  Vector<T> grads_[kVectors<T>];
  Lanes<kLanes> masters_[kVectors<T>];
};

// u where `kept` has a bit, else +0, but a NaN stays.
template <class T>
__device__ __forceinline__ Vector<T> pruned(Vector<T> u, uint32_t kept) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kLanes; ++i) {
    const float x = widen(u.get(i));
    if ((kept >> i & 1) == 0 && x == x) u.set(i, T{});
  }
  return u;
}

}  // namespace cuda
}  // namespace cram
