// One step of Adam / AdamW for one weight (docs/contract.md: Updates). F: float or a SIMD block.
#pragma once

#include "number.h"

namespace cram {

struct AdamOptions {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float eps;
  float weight_decay;  // decoupled: lr * weight_decay
  float step_size;     // lr / c1
  float root_c2;       // sqrt(c2)
  bool decoupled;
  bool amsgrad;
  bool maximize;
};

struct AdamHyper {  // what set_step needs; AdamOptions holds the rest
  double beta1, beta2;
  float weight_decay;
};

// base^exponent in float64 by square-and-multiply: the same bits everywhere, unlike pow().
CRAM_INLINE double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// The fields that change from step to step; beta1 and beta2 unrounded.
CRAM_INLINE void set_step(AdamOptions& o, double beta1, double beta2, float lr, float weight_decay, int64_t step) {
  o.step_size = div(lr, static_cast<float>(1 - power(beta1, step)));
  o.root_c2 = root(static_cast<float>(1 - power(beta2, step)));
  o.weight_decay = o.decoupled ? mul(lr, weight_decay) : weight_decay;
}

// w, m, v, x (the running maximum of v, with amsgrad): in and out.
template <class F>
CRAM_INLINE void adam_step(F& w, F& m, F& v, F& x, F gradient, bool decays, const AdamOptions& o) {
  if (o.maximize) gradient = negate(gradient);
  if (decays && o.decoupled) w = sub(w, mul(F(o.weight_decay), w));
  if (decays && !o.decoupled) gradient = add(gradient, mul(F(o.weight_decay), w));
  m = add(mul(F(o.beta1), m), mul(F(o.one_minus_beta1), gradient));
  v = add(mul(F(o.beta2), v), mul(F(o.one_minus_beta2), mul(gradient, gradient)));
  if (o.amsgrad) x = larger(x, v);
  const F second = o.amsgrad ? x : v;
  w = sub(w, mul(F(o.step_size), div(m, add(div(root(second), F(o.root_c2)), F(o.eps)))));
}

}  // namespace cram
