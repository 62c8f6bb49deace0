// The gradient of an update (docs/contract.md: Gradient of an update). F: float or a SIMD block.
#pragma once

#include "number.h"

namespace cram {

// What the two gradients are multiplied with, where given.
struct Scales {
  float grad = 1;
  float first_grad = 1;
  bool has_grad = false;
  bool has_first_grad = false;
};

template <class F>
CRAM_INLINE F unscaled(F g, float inv_scale, bool given) {
  return given ? mul(g, F(inv_scale)) : g;
}

}  // namespace cram
