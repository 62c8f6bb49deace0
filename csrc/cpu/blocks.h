// Blocks of 16 floats over a range of one tensor, with tails, for every type: what all passes share.
#pragma once

#include "../perturb.h"
#include "kernels.h"
#include "vec.h"

namespace cram {
namespace CRAM_ISA {

// Calls f(T{}) with the number type of t.
template <class Function>
CRAM_INLINE auto with_type(DType t, Function f) {
  switch (t) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

struct Whole {  // the number of lanes of a whole block, as a type: loads and stores need no tail
  constexpr operator int() const { return kBlock; }
};

// Calls f(i, lanes) for each block of 16 elements in [begin, end); the last may have fewer lanes.
template <class Function>
CRAM_INLINE void for_blocks(int64_t begin, int64_t end, Function f) {
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) f(i, Whole{});
  if (i < end) f(i, static_cast<int>(end - i));
}

constexpr Bits lanes_below(int lanes) { return (1u << lanes) - 1; }

// Block loads and stores of which only `lanes` elements exist; the missing ones read as 0.
template <class T>
CRAM_INLINE F load(const T* p, Whole) {
  return load(p);
}
template <class T>
CRAM_INLINE F load(const T* p, int lanes) {
  T copy[kBlock] = {};
  memcpy(copy, p, sizeof(T) * lanes);
  return load(copy);
}

template <class T>
CRAM_INLINE void store(T* p, F a, Whole) {
  store(p, a);
}
template <class T>
CRAM_INLINE void store(T* p, F a, int lanes) {
  T copy[kBlock];
  store(copy, a);
  memcpy(p, copy, sizeof(T) * lanes);
}

template <class T>
CRAM_INLINE void keep_raw(T* p, Bits bits, Whole) {
  keep_raw(p, bits);
}
template <class T>
CRAM_INLINE void keep_raw(T* p, Bits bits, int lanes) {
  T copy[kBlock];
  memcpy(copy, p, sizeof(T) * lanes);
  keep_raw(copy, bits);
  memcpy(p, copy, sizeof(T) * lanes);
}

// As above, rounded to T.
template <class T>
CRAM_INLINE void store_rounded(T* p, F a, Whole) {
  store_rounded(p, a);
}
template <class T>
CRAM_INLINE void store_rounded(T* p, F a, int lanes) {
  T copy[kBlock];
  store_rounded(copy, a);
  memcpy(p, copy, sizeof(T) * lanes);
}

// And past the cache, where the address allows it; a tail is not worth it.
template <class T>
CRAM_INLINE void stream_rounded(T* p, F a, Whole) {
  alignas(64) T block[kBlock];
  store_rounded(block, a);
  stream<kBlock* static_cast<int>(sizeof(T))>(p, block);
}
template <class T>
CRAM_INLINE void stream_rounded(T* p, F a, int lanes) {
  store_rounded(p, a, lanes);
}

// Raw bits. Past the cache, where the address allows it, old lines of the destination are not read first.
template <class T>
CRAM_INLINE void copy(T* to, const T* from, bool past_cache, Whole) {
  constexpr int bytes = kBlock * static_cast<int>(sizeof(T));
  if (past_cache)
    stream<bytes>(to, from);
  else
    memcpy(to, from, bytes);
}
template <class T>
CRAM_INLINE void copy(T* to, const T* from, bool, int lanes) {
  memcpy(to, from, sizeof(T) * lanes);
}

// Mask bits of the block at element i, a multiple of 8.
CRAM_INLINE void store_bits(uint8_t* mask, int64_t i, Bits bits, int lanes) {
  mask[i / 8] = static_cast<uint8_t>(bits);
  if (lanes > 8) mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
}

CRAM_INLINE Bits load_bits(const uint8_t* mask, int64_t i, int lanes) {
  const uint8_t* bytes = mask + (i >> 3);
  return bytes[0] | (lanes > 8 ? static_cast<Bits>(bytes[1]) << 8 : 0);
}

CRAM_INLINE Bits nonfinite_bits(F g) { return greater_bits(both(as_int(g), I(0x7fffffff)), I(kInfKey - 1)); }

// One u after the other: calls f(i, lanes, u) with u as floats that T holds; T the parameter's type, W the weights'.
template <class T, class W, class Function>
CRAM_INLINE void for_u(const Source& source, int64_t begin, int64_t end, bool* nonfinite, Function f) {
  const W* weights = static_cast<const W*>(source.weights);
  const T* grad = static_cast<const T*>(source.grad);
  const F rho(source.rho), inv_scale(source.inv_scale);
  Bits bad = 0;
  for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_INLINE_LAMBDA {
    F u = load(weights + i, lanes);
    if (grad != nullptr) {
      F g = load(grad + i, lanes);
      if (source.scaled) g = mul(g, inv_scale);
      bad |= nonfinite_bits(g);
      u = rounded(uphill(u, g, rho), T{});
    }
    f(i, lanes, u);
  });
  if (bad != 0 && nonfinite != nullptr) *nonfinite = true;
}

// f(T{}, W{}): the types of a parameter, and of its weights and states, which are float32 where there is a master weight.
template <class Function>
CRAM_INLINE void with_types(DType dtype, bool master, Function f) {
  with_type(dtype, [&](auto t) CRAM_INLINE_LAMBDA {
    if (master)
      f(t, float{});
    else
      f(t, t);
  });
}

// for_u with the types of a source.
template <class Function>
CRAM_INLINE void with_u(const Source& source, DType dtype, int64_t begin, int64_t end, bool* nonfinite, Function f) {
  with_types(dtype, source.master, [&](auto t, auto w) CRAM_INLINE_LAMBDA {
    for_u<decltype(t), decltype(w)>(source, begin, end, nonfinite, [&](int64_t i, auto lanes, F u) CRAM_INLINE_LAMBDA { f(t, i, lanes, u); });
  });
}

// Writes u (or, without a gradient, prunes w where it is) under `bits`; w is saved first.
template <class T, class Lanes>
CRAM_INLINE void write(const Source& source, int64_t i, Lanes lanes, F u, Bits bits, void* out, void* saved) {
  T* p = static_cast<T*>(out) + i;
  if (saved != nullptr) copy(static_cast<T*>(saved) + i, p, source.past_cache, lanes);
  if (source.grad != nullptr)
    store(p, keep(u, bits), lanes);
  else
    keep_raw(p, bits, lanes);
}

}  // namespace CRAM_ISA
}  // namespace cram
