// The passes of kernels.h for the instruction set that this file is compiled for. Included by isa_*.cpp, once each.
#include "../perturb.h"
#include "../restore.h"
#include "kernels.h"
#include "vec.h"

#include "pack_kernels.h"

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

// Raw bits, past the cache where the destination allows it: what is saved is not read again soon, and its old lines are not worth reading.
template <class T>
CRAM_INLINE void copy(T* to, const T* from, Whole) {
  stream(to, from);
}
template <class T>
CRAM_INLINE void copy(T* to, const T* from, int lanes) {
  memcpy(to, from, sizeof(T) * lanes);
}

// Mask bits of the block at element i, a multiple of 8.
CRAM_INLINE void store_bits(uint8_t* mask, int64_t i, Bits bits, int lanes) {
  mask[i / 8] = static_cast<uint8_t>(bits);
  if (lanes > 8) mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
}

CRAM_INLINE Bits load_bits(const uint8_t* mask, int64_t i, int lanes) {
  return mask[i / 8] | (lanes > 8 ? static_cast<Bits>(mask[i / 8 + 1]) << 8 : 0);
}

CRAM_INLINE Bits nonfinite_bits(F g) { return greater_bits(both(as_int(g), I(0x7fffffff)), I(kInfKey - 1)); }

// One u after the other: calls f(i, lanes, u) with u as floats that T holds; T the parameter's type, W the weights'.
template <class T, class W, class Function>
CRAM_INLINE void for_u(const Source& source, int64_t begin, int64_t end, bool* nonfinite, Function f) {
  const W* weights = static_cast<const W*>(source.weights);
  const T* grad = static_cast<const T*>(source.grad);
  const F rho(source.rho), inv_scale(source.inv_scale);
  Bits bad = 0;
  for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_MELT {
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

// for_u with the types of a source.
template <class Function>
CRAM_INLINE void with_u(const Source& source, DType dtype, int64_t begin, int64_t end, bool* nonfinite, Function f) {
  with_type(dtype, [&](auto t) CRAM_MELT {
    using T = decltype(t);
    const auto typed = [&](int64_t i, auto lanes, F u) CRAM_MELT { f(t, i, lanes, u); };
    if (source.master)
      for_u<T, float>(source, begin, end, nonfinite, typed);
    else
      for_u<T, T>(source, begin, end, nonfinite, typed);
  });
}

// Writes u (or, without a gradient, prunes w where it is) under `bits`; w is saved first.
template <class T, class Lanes>
CRAM_INLINE void write(const Source& source, int64_t i, Lanes lanes, F u, Bits bits, void* out, void* saved) {
  T* p = static_cast<T*>(out) + i;
  if (saved != nullptr) copy(static_cast<T*>(saved) + i, p, lanes);
  if (source.grad != nullptr)
    store(p, keep(u, bits), lanes);
  else
    keep_raw(p, bits, lanes);
}

static void topk_stream(const Source& source, DType dtype, int64_t begin, int64_t end, const Bracket& bracket, void* out, void* saved, uint8_t* mask,
                 Candidates found, Counts& counts) {
  const I low(bracket.low), high(bracket.high), cut(bracket.cut), largest(kInfKey);
  I iota(0);
  for (int lane = 0; lane < kBlock; ++lane) iota.v[lane / kWidth][lane % kWidth] = lane;
  int64_t above = 0, candidates = 0, nans = 0;
  with_u(source, dtype, begin, end, &counts.nonfinite, [&](auto t, int64_t i, auto lanes, F u) CRAM_MELT {
    const I key = magnitude_key(u);
    const Bits real = lanes_below(lanes);
    const Bits nan = greater_bits(key, largest) & real;  // beyond the end, 0 * an infinite rho is one
    const Bits over = greater_bits(key, high) & real;
    const Bits candidate = greater_bits(key, low) & ~over & real;
    const Bits kept = greater_bits(key, cut) & ~nan & real;
    above += __builtin_popcount(over);
    nans += __builtin_popcount(nan);
    if (bracket.append) {
      compress(found.bits + candidates, as_int(canonical(u)), candidate);
      compress16(found.offsets + candidates, add(iota, I(static_cast<int32_t>(i - begin))), candidate);
    }
    candidates += __builtin_popcount(candidate);
    if (out != nullptr) {
      write<decltype(t)>(source, i, lanes, u, kept | nan, out, saved);
      if (mask != nullptr) store_bits(mask, i, kept, lanes);
    }
  });
  counts.above += above;
  counts.candidates += candidates;
  counts.nans += nans;
}

static int64_t topk_apply(const Source& source, DType dtype, int64_t begin, int64_t end, int32_t threshold, void* out, uint8_t* mask) {
  const I cut(threshold), largest(kInfKey);
  int64_t total = 0;
  with_u(source, dtype, begin, end, nullptr, [&](auto t, int64_t i, auto lanes, F u) CRAM_MELT {
    const I key = magnitude_key(u);
    const Bits nan = greater_bits(key, largest);
    const Bits kept = greater_bits(key, cut) & ~nan & lanes_below(lanes);
    total += __builtin_popcount(kept);
    write<decltype(t)>(source, i, lanes, u, kept | nan, out, nullptr);
    if (mask != nullptr) store_bits(mask, i, kept, lanes);
  });
  return total;
}

static void topk_histogram(const Source& source, DType dtype, int64_t begin, int64_t end, int shift, int num_bins, int prefix_shift, int32_t prefix,
                    int64_t* bins) {
  with_u(source, dtype, begin, end, nullptr, [&](auto, int64_t, auto lanes, F u) CRAM_MELT {
    int32_t keys[kBlock];
    store(keys, magnitude_key(u));
    for (int lane = 0; lane < lanes; ++lane)
      if ((keys[lane] >> prefix_shift) == prefix) ++bins[(keys[lane] >> shift) & (num_bins - 1)];
  });
}

static void masked(const Source& source, DType dtype, int64_t begin, int64_t end, void* out, void* saved, const uint8_t* mask, bool* nonfinite) {
  const I largest(kInfKey);
  with_u(source, dtype, begin, end, nonfinite, [&](auto t, int64_t i, auto lanes, F u) CRAM_MELT {
    const Bits kept = mask == nullptr ? ~Bits(0) : load_bits(mask, i, lanes);
    write<decltype(t)>(source, i, lanes, u, kept | greater_bits(magnitude_key(u), largest), out, saved);
  });
}

// keep[i] is a set flag where not fewer than m - n of the group of element i rank below it (stable ascending). keys: [tiles * m, inner], padded by kBlock in
// front and behind; keep: written up to kBlock further.
static void nm_rank(const int32_t* keys, int64_t size, int64_t inner, int n, int m, uint8_t* keep) {
  const int dropped = m - n;
  if (inner == 1 && m <= kBlock && kBlock % m == 0) {  // whole groups in a block: the neighbours by shifted loads
    // The neighbour d places on, in the lanes where that is the same group (-1); in the others it wraps to d - m, comes before, and wins ties.
    I ahead[kBlock], wins_ties[kBlock];
    for (int d = 1; d < m; ++d)
      for (int lane = 0; lane < kBlock; ++lane) {
        const int32_t in_group = lane % m + d < m ? -1 : 0;
        ahead[d].v[lane / kWidth][lane % kWidth] = in_group;
        wins_ties[d].v[lane / kWidth][lane % kWidth] = 1 + in_group;
      }
    for (int64_t i = 0; i < size; i += kBlock) {
      const I own = load(keys + i);
      I rank(0);
      for (int d = 1; d < m; ++d)
        rank = sub(rank, less(choose(ahead[d], load(keys + i + d), load(keys + i + d - m)), add(own, wins_ties[d])));
      store_flags(keep + i, greater_bits(rank, I(dropped - 1)));
    }
    return;
  }
  for (int64_t tile = 0; tile < size; tile += m * inner) {
    for (int row = 0; row < m; ++row) {
      const int32_t* own_row = keys + tile + row * inner;
      for (int64_t r = 0; r < inner; r += kBlock) {  // beyond the row's end: garbage that the next row overwrites
        const I own = load(own_row + r), own_or_equal = add(own, I(1));
        I rank(0);
        for (int other = 0; other < m; ++other) {
          if (other == row) continue;
          rank = sub(rank, less(load(keys + tile + other * inner + r), other < row ? own_or_equal : own));
        }
        store_flags(keep + tile + row * inner + r, greater_bits(rank, I(dropped - 1)));
      }
    }
  }
}

static void nm(const Source& source, DType dtype, int64_t begin, int64_t end, int64_t inner, int n, int m, void* out, void* saved, uint8_t* mask,
        char* scratch, bool* nonfinite) {
  const int64_t size = end - begin;
  int32_t* keys = reinterpret_cast<int32_t*>(scratch) + kBlock;
  float* moved = reinterpret_cast<float*>(keys + size + 2 * kBlock);
  uint8_t* kept = reinterpret_cast<uint8_t*>(moved + size + kBlock);
  with_u(source, dtype, begin, end, nonfinite, [&](auto, int64_t i, auto, F u) CRAM_MELT {
    store(keys + (i - begin), magnitude_key(u));
    store(moved + (i - begin), u);
  });
  nm_rank(keys, size, inner, n, m, kept);
  const I largest(kInfKey);
  with_type(dtype, [&](auto t) CRAM_MELT {
    using T = decltype(t);
    for_blocks(0, size, [&](int64_t i, auto lanes) CRAM_MELT {
      const Bits nan = greater_bits(load(keys + i), largest);
      const Bits bits = load_flags(kept + i) & ~nan & lanes_below(lanes);
      write<T>(source, begin + i, lanes, load(moved + i), bits | nan, out, saved);
      if (mask != nullptr) store_bits(mask, begin + i, bits, lanes);
    });
  });
}

static void round_master(const float* master, DType dtype, int64_t begin, int64_t end, void* out) {
  with_type(dtype, [&](auto t) CRAM_MELT {
    using T = decltype(t);
    for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_MELT { store(static_cast<T*>(out) + i, rounded(load(master + i, lanes), t), lanes); });
  });
}

// The gradient of the update for the block at i.
template <class T, class Lanes>
CRAM_INLINE F update_gradient(const Item& item, const Scales& scales, int64_t i, Lanes lanes) {
  const T *second = static_cast<const T*>(item.grad), *first = static_cast<const T*>(item.first_grad);
  F g2(0.0f), g1(0.0f);
  if (second != nullptr) {
    g2 = unscaled(load(second + i, lanes), scales.grad, scales.has_grad);
    if (item.mask != nullptr) g2 = keep(g2, load_bits(item.mask, i, lanes));
    if (first == nullptr) return g2;
  }
  g1 = unscaled(load(first + i, lanes), scales.first_grad, scales.has_first_grad);
  return second == nullptr ? g1 : add(g1, g2);
}

static void combine(const Item& item, int64_t begin, int64_t end, const Scales& scales) {
  with_type(item.dtype, [&](auto t) CRAM_MELT {
    using T = decltype(t);
    for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_MELT {
      store(static_cast<T*>(item.grad) + i, rounded(update_gradient<T>(item, scales, i, lanes), t), lanes);
    });
  });
}

// f(T{}, S{}): the types of the parameter and of its state and weights.
template <class Function>
CRAM_INLINE void with_types(const Item& item, Function f) {
  with_type(item.dtype, [&](auto t) CRAM_MELT {
    if (item.master != nullptr)
      f(t, float{});
    else
      f(t, t);
  });
}

template <class T, class Lanes>
CRAM_INLINE void store_weight(const Item& item, int64_t i, F w, Lanes lanes) {
  if (item.master != nullptr) {
    w = canonical(w);
    store(item.master + i, w, lanes);
  }
  store(static_cast<T*>(item.param) + i, rounded(w, T{}), lanes);
}

template <class S, class Lanes>
CRAM_INLINE F load_state(void* state, int64_t i, Lanes lanes) {
  return state == nullptr ? F(0.0f) : load(static_cast<const S*>(state) + i, lanes);
}

template <class S, class Lanes>
CRAM_INLINE void store_state(void* state, int64_t i, F x, Lanes lanes) {
  if (state != nullptr) store(static_cast<S*>(state) + i, rounded(x, S{}), lanes);
}

static void sgd(const Item& item, const void* weights, int64_t begin, int64_t end, const Scales& scales, const SgdOptions& options) {
  void* buffer = options.momentum != 0 ? item.state[0] : nullptr;
  with_types(item, [&](auto t, auto s) CRAM_MELT {
    using T = decltype(t);
    using S = decltype(s);
    for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_MELT {
      F w = load(static_cast<const S*>(weights) + i, lanes);
      F b = load_state<S>(options.fresh ? nullptr : buffer, i, lanes);
      sgd_step(w, b, update_gradient<T>(item, scales, i, lanes), options);
      store_state<S>(buffer, i, b, lanes);
      store_weight<T>(item, i, w, lanes);
    });
  });
}

static void adam(const Item& item, const void* weights, int64_t begin, int64_t end, const Scales& scales, const AdamOptions& options, bool decays) {
  void* maximum = options.amsgrad ? item.state[2] : nullptr;
  with_types(item, [&](auto t, auto s) CRAM_MELT {
    using T = decltype(t);
    using S = decltype(s);
    for_blocks(begin, end, [&](int64_t i, auto lanes) CRAM_MELT {
      F w = load(static_cast<const S*>(weights) + i, lanes);
      F m = load_state<S>(item.state[0], i, lanes);
      F v = load_state<S>(item.state[1], i, lanes);
      F x = load_state<S>(maximum, i, lanes);
      adam_step(w, m, v, x, update_gradient<T>(item, scales, i, lanes), decays, options);
      store_state<S>(item.state[0], i, m, lanes);
      store_state<S>(item.state[1], i, v, lanes);
      store_state<S>(maximum, i, x, lanes);
      store_weight<T>(item, i, w, lanes);
    });
  });
}

static void norm(const void* grad, DType dtype, int64_t numel, int64_t begin, int64_t end, float inv_scale, bool scaled, double* sums) {
  with_type(dtype, [&](auto t) CRAM_MELT {
    using T = decltype(t);
    const T* g = static_cast<const T*>(grad);
    const F factor(inv_scale);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float x[kNormChunk];
      const int64_t first = chunk * kNormChunk;
      const int64_t last = first + kNormChunk < numel ? first + kNormChunk : numel;
      if (last - first < kNormChunk) memset(x, 0, sizeof x);
      for_blocks(first, last, [&](int64_t i, auto lanes) CRAM_MELT {
        F block = load(g + i, lanes);
        if (scaled) block = mul(block, factor);
        store(x + (i - first), block, lanes);
      });
      double folded[kNormChunk / 2];
      for (int i = 0; i < kNormChunk / 2; ++i) {
        const double a = x[i], b = x[i + kNormChunk / 2];
        folded[i] = a * a + b * b;
      }
      for (int half = kNormChunk / 4; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) folded[i] += folded[i + half];
      sums[chunk] = folded[0];
    }
  });
}

constexpr Kernels kTable = {CRAM_ISA_NAME, topk_stream, topk_apply, topk_histogram, masked, nm, round_master, combine, sgd, adam, pack_24, unpack_24, violations, norm};

}  // namespace CRAM_ISA
}  // namespace cram
