// Restore and update. Included by kernels_impl.h.
#pragma once

#include <type_traits>

#include "../restore.h"
#include "blocks.h"

namespace cram {
namespace CRAM_ISA {

static void round_master(const float* master, DType dtype, int64_t begin, int64_t end, void* out) {
  with_type(dtype, [&](auto t) CRAM_INLINE_LAMBDA {
    using T = decltype(t);
    for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_INLINE_LAMBDA { store_rounded(static_cast<T*>(out) + i, load(master + i, lanes), lanes); });
  });
}

// Calls f(usual). Usual, a constant in f: what nearly every step has, both gradients, a mask, no scales. A loop that knows has no branch.
template <class Function>
CRAM_INLINE void with_usual(bool usual, const Item& item, const Scales& scales, Function f) {
  if (usual && item.grad != nullptr && item.first_grad != nullptr && item.mask != nullptr && !scales.has_grad && !scales.has_first_grad)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// The gradient of the update for the block at i.
template <class T, class Usual, class Lanes>
CRAM_INLINE F update_gradient(Usual usual, const Item& item, const Scales& scales, int64_t i, Lanes lanes) {
  const T *second = static_cast<const T*>(item.grad), *first = static_cast<const T*>(item.first_grad);
  F g2(0.0f), g1(0.0f);
  if (usual || second != nullptr) {
    g2 = unscaled(load(second + i, lanes), scales.grad, !usual && scales.has_grad);
    if (usual || item.mask != nullptr) g2 = keep(g2, load_bits(item.mask, i, lanes));
    if (!usual && first == nullptr) return g2;
  }
  g1 = unscaled(load(first + i, lanes), scales.first_grad, !usual && scales.has_first_grad);
  return !usual && second == nullptr ? g1 : add(g1, g2);
}

static void combine(Item item, int64_t begin, int64_t end, Scales scales) {
  with_type(item.dtype, [&](auto t) CRAM_INLINE_LAMBDA {
    using T = decltype(t);
    with_usual(true, item, scales, [&](auto usual) CRAM_INLINE_LAMBDA {
      for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_INLINE_LAMBDA {
        store_rounded(static_cast<T*>(item.grad) + i, update_gradient<T>(usual, item, scales, i, lanes), lanes);
      });
    });
  });
}

// The parameter's old value is not needed: where the list is larger than the caches, its lines are not read first.
template <class T, class Lanes>
CRAM_INLINE void store_weight(const Item& item, bool past_cache, int64_t i, F w, Lanes lanes) {
  if (item.master != nullptr) {
    w = canonical(w);
    store(item.master + i, w, lanes);
  }
  T* to = static_cast<T*>(item.param) + i;
  if (past_cache)
    stream_rounded(to, w, lanes);
  else
    store_rounded(to, w, lanes);
}

template <class S, class Lanes>
CRAM_INLINE F load_state(void* state, int64_t i, Lanes lanes) {
  return state == nullptr ? F(0.0f) : load(static_cast<const S*>(state) + i, lanes);
}

template <class S, class Lanes>
CRAM_INLINE void store_state(void* state, int64_t i, F x, Lanes lanes) {
  if (state != nullptr) store_rounded(static_cast<S*>(state) + i, x, lanes);
}

static void sgd(Item item, const void* weights, bool past_cache, int64_t begin, int64_t end, Scales scales, SgdOptions options) {
  void* buffer = options.momentum != 0 ? item.state[0] : nullptr;
  const bool plain = buffer != nullptr && !options.fresh && !options.nesterov && !options.maximize;
  with_usual(plain, item, scales, [&](auto usual) CRAM_INLINE_LAMBDA {
    SgdOptions o = options;
    if (usual) o.fresh = o.nesterov = o.maximize = false;
    with_types(item.dtype, item.master != nullptr, [&](auto t, auto s) CRAM_INLINE_LAMBDA {
      using T = decltype(t);
      using S = decltype(s);
      for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_INLINE_LAMBDA {
        F w = load(static_cast<const S*>(weights) + i, lanes);
        F b = load_state<S>(o.fresh ? nullptr : buffer, i, lanes);
        sgd_step(w, b, update_gradient<T>(usual, item, scales, i, lanes), o);
        store_state<S>(buffer, i, b, lanes);
        store_weight<T>(item, past_cache, i, w, lanes);
      });
    });
  });
}

static void adam(Item item, const void* weights, bool past_cache, int64_t begin, int64_t end, Scales scales, AdamOptions options, bool decays) {
  void* maximum = options.amsgrad ? item.state[2] : nullptr;
  with_usual(maximum == nullptr && !options.maximize, item, scales, [&](auto usual) CRAM_INLINE_LAMBDA {
    AdamOptions o = options;
    if (usual) o.amsgrad = o.maximize = false;
    with_types(item.dtype, item.master != nullptr, [&](auto t, auto s) CRAM_INLINE_LAMBDA {
      using T = decltype(t);
      using S = decltype(s);
      for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_INLINE_LAMBDA {
        F w = load(static_cast<const S*>(weights) + i, lanes);
        F m = load_state<S>(item.state[0], i, lanes);
        F v = load_state<S>(item.state[1], i, lanes);
        F x = load_state<S>(usual ? nullptr : maximum, i, lanes);
        adam_step(w, m, v, x, update_gradient<T>(usual, item, scales, i, lanes), decays, o);
        store_state<S>(item.state[0], i, m, lanes);
        store_state<S>(item.state[1], i, v, lanes);
        store_state<S>(usual ? nullptr : maximum, i, x, lanes);
        store_weight<T>(item, past_cache, i, w, lanes);
      });
    });
  });
}

}  // namespace CRAM_ISA
}  // namespace cram
