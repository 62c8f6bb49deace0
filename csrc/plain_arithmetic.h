// The arithmetic of the contract on the calling thread: of every backend's checks, and of the CPU's kernels.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace cram {

// Denormals count and rounding is to nearest even, whatever mode the calling thread is in (torch.set_flush_denormal).
class PlainArithmetic {
#if defined(__SSE2__)
 public:
  PlainArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace cram
