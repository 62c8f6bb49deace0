// One step of SGD for one weight (docs/contract.md: Updates). F: float or a SIMD block.
#pragma once

#include "number.h"

namespace cram {

struct SgdOptions {
  float lr;
  float momentum;
  float one_minus_dampening;
  float weight_decay;
  bool nesterov;
  bool maximize;
  bool fresh;  // the buffer has no value yet

  bool operator==(const SgdOptions& o) const {
    return lr == o.lr && momentum == o.momentum && one_minus_dampening == o.one_minus_dampening && weight_decay == o.weight_decay &&
           nesterov == o.nesterov && maximize == o.maximize && fresh == o.fresh;
  }
};

// w, b: in and out; b is left alone without momentum.
template <class F>
CRAM_INLINE void sgd_step(F& w, F& b, F gradient, const SgdOptions& o) {
  if (o.maximize) gradient = negate(gradient);
  if (o.weight_decay != 0) gradient = add(gradient, mul(F(o.weight_decay), w));
  if (o.momentum != 0) {
    b = o.fresh ? gradient : add(mul(F(o.momentum), b), mul(F(o.one_minus_dampening), gradient));
    gradient = o.nesterov ? add(gradient, mul(F(o.momentum), b)) : b;
  }
  w = sub(w, mul(F(o.lr), gradient));
}

}  // namespace cram
