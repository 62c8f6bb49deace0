// A batch of 64 numbers as bits of their own type: compared, counted and pruned in that type's full registers, and one word of mask bits wide.
// The fast road of the streaming passes, for batches without a NaN; blocks of 16 floats (kernels_impl.h) take the others and the tails.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec_half.h"

namespace cram {
namespace CRAM_ISA {

constexpr int kBatch = 64;

template <class T>
struct Batch {
  using Vec = H;
  using Number = int16_t;
  static constexpr int kLanes = kHalves, kVecs = kBatch / kLanes;
  static constexpr Number kMagnitude = 0x7fff;
  Vec v[kVecs];
};
template <>
struct Batch<float> {
  using Vec = I;
  using Number = int32_t;
  static constexpr int kLanes = kBlock, kVecs = kBatch / kLanes;
  static constexpr Number kMagnitude = 0x7fffffff;
  Vec v[kVecs];
};

#define CRAM_VECS for (int vec = 0; vec < Batch<T>::kVecs; ++vec)

// The bits of x rounded to T.
CRAM_INLINE uint32_t bits_of(float x, float) { return to_bits(cram::canonical(x)); }
CRAM_INLINE uint32_t bits_of(float x, BFloat16) { return to_bits(cram::rounded(x, BFloat16{})) >> 16; }
CRAM_INLINE uint32_t bits_of(float x, Float16) { return half_bits(x); }

// The largest key of T, as an integer of T's width, that is not above `key`: so k > key in float32 is k > key_within(key) in T.
CRAM_INLINE int32_t key_within(int32_t key, float) { return key; }
template <class T>
CRAM_INLINE int32_t key_within(int32_t key, T t) {
  if (key < 0) return -1;
  const uint16_t nearest = static_cast<uint16_t>(bits_of(from_bits(key), t));
  return nearest - (cram::magnitude_key(cram::widen(T{nearest})) > key);
}

template <class T>
CRAM_INLINE typename Batch<T>::Vec broadcast_key(int32_t key) {
  return typename Batch<T>::Vec(key_within(key, T{}));
}

template <class T>
CRAM_INLINE Batch<T> keys_of(Batch<T> u) {
  CRAM_VECS u.v[vec] = both(u.v[vec], typename Batch<T>::Vec(Batch<T>::kMagnitude));
  return u;
}

template <class T>
CRAM_INLINE uint64_t greater_bits(const Batch<T>& keys, typename Batch<T>::Vec bound) {
  uint64_t bits = 0;
  CRAM_VECS bits |= static_cast<uint64_t>(greater_bits(keys.v[vec], bound)) << (Batch<T>::kLanes * vec);
  return bits;
}

CRAM_INLINE void narrow(const F* u, Batch<float>& to) {
  for (int b = 0; b < 4; ++b) to.v[b] = as_int(u[b]);
}
template <class T>
CRAM_INLINE void narrow(const F* u, Batch<T>& to) {
  for (int b = 0; b < 2; ++b) to.v[b] = narrow(u[2 * b], u[2 * b + 1], T{});
}

// Reads u, T the parameter's type, W the weights'.
template <class T, class W>
class Uphill {
 public:
  CRAM_INLINE_MEMBER explicit Uphill(const Source& s)
      : weights_(static_cast<const W*>(s.weights)), grad_(static_cast<const T*>(s.grad)), rho_(s.rho), inv_scale_(s.inv_scale), source_(s) {}

  // Numbers [i, i + 64) into u; false, and u of no use, where a NaN is among them.
  CRAM_INLINE_MEMBER bool batch(int64_t i, Batch<T>& u) {
    const I magnitude(0x7fffffff);
    F moved[kBatch / kBlock];
    I top(0);
    for (int b = 0; b < kBatch / kBlock; ++b) {
      moved[b] = load(weights_ + i + kBlock * b);
      if (grad_ != nullptr) {
        F g = load(grad_ + i + kBlock * b);
        if (source_.scaled) g = mul(g, inv_scale_);
        top_grad_ = larger(top_grad_, both(as_int(g), magnitude));
        moved[b] = add(moved[b], mul(rho_, g));
      }
      top = larger(top, both(as_int(moved[b]), magnitude));
    }
    narrow(moved, u);
    return greater_bits(top, I(kInfKey)) == 0;
  }

  // The bits of T of one u.
  CRAM_INLINE_MEMBER uint32_t one(int64_t i) const {
    float u = cram::widen(weights_[i]);
    if (grad_ != nullptr) {
      float g = cram::widen(grad_[i]);
      if (source_.scaled) g = cram::mul(g, source_.inv_scale);
      u = cram::add(u, cram::mul(source_.rho, g));
    }
    return bits_of(u, T{});
  }

  // Whether a gradient of a batch was Inf or NaN.
  CRAM_INLINE_MEMBER bool nonfinite() const { return greater_bits(top_grad_, I(kInfKey - 1)) != 0; }

 private:
  const W* weights_;
  const T* grad_;
  const F rho_, inv_scale_;
  const Source source_;
  I top_grad_{0};
};

// Writes u under `kept`; the parameter is saved first.
template <class T>
CRAM_INLINE void write(const Source& source, T* out, T* saved, const Batch<T>& u, uint64_t kept) {
  if (saved != nullptr && source.past_cache)
    for (int i = 0; i < kBatch; i += 64 / static_cast<int>(sizeof(T))) stream<64>(saved + i, out + i);
  else if (saved != nullptr)
    memcpy(saved, out, kBatch * sizeof(T));
  CRAM_VECS {
    const auto own = keep(u.v[vec], static_cast<Bits>(kept >> (Batch<T>::kLanes * vec)) & static_cast<Bits>((uint64_t(1) << Batch<T>::kLanes) - 1));
    memcpy(out + Batch<T>::kLanes * vec, &own, sizeof own);
  }
}

CRAM_INLINE void store_bits64(uint8_t* mask, int64_t i, uint64_t bits) {  // i: a multiple of 8
  for (int byte = 0; byte < 8; ++byte) mask[(i >> 3) + byte] = static_cast<uint8_t>(bits >> (8 * byte));
}

}  // namespace CRAM_ISA
}  // namespace cram
