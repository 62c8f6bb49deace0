// u = round_T(w + rho * g): product and sum rounded on their own (docs/contract.md: Perturb). F: float or a SIMD block.
#pragma once

#include "number.h"

namespace cram {

template <class F>
CRAM_INLINE F uphill(F w, F g, F rho) {
  return add(w, mul(rho, g));
}

}  // namespace cram
