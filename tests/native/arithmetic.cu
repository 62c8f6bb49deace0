// The arithmetic that the CPU shares with CUDA, as nvcc sees it: one weight a thread. tests/test_shared_headers.py reads and runs the PTX.
#include "../../csrc/adam.h"
#include "../../csrc/perturb.h"
#include "../../csrc/sgd.h"

using namespace cram;

extern "C" __global__ void perturb(const float* w, const float* g, float rho, float* fp32, float* bf16, float* fp16, int* key, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float u = uphill(w[i], g[i], rho);
  fp32[i] = rounded(u, float{});
  bf16[i] = rounded(u, BFloat16{});
  fp16[i] = rounded(u, Float16{});
  key[i] = magnitude_key(u);
}

extern "C" __global__ void sgd(float* w, const float* g, float* b, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const SgdOptions options = {0.1f, 0.9f, 0.5f, 0.01f, true, false, false};
  sgd_step(w[i], b[i], g[i], options);
}

extern "C" __global__ void adam(float* w, const float* g, float* m, float* v, float* x, int step, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  AdamOptions options = {0.9f, static_cast<float>(1 - 0.9), 0.999f, static_cast<float>(1 - 0.999), 1e-8f, 0, 0, 0, true, true, false};
  set_step(options, 0.9, 0.999, 0.001f, 0.01f, step);
  adam_step(w[i], m[i], v[i], x[i], g[i], true, options);
}
