// Kernels with known faults and without, for tests/test_cuda_static.py.
namespace {

__global__ void __launch_bounds__(256) copy16(const float4* from, float4* to, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) to[i] = from[i];
}

__global__ void __launch_bounds__(128) copy4(const float* from, float* to, int n) {
  __shared__ float copy[128];
  copy[threadIdx.x ^ 1] = from[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < n) to[threadIdx.x] = copy[threadIdx.x];
}

// 96 numbers that are all alive at once, where 1024 threads leave each 64 registers.
__global__ void __launch_bounds__(1024) spills(float* x) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = x[i * 4096];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 8192 + 1] = held[95 - i] * held[(i * 7) % 96];
}

}  // namespace

void launch(float* x, int n, cudaStream_t stream) {
  copy16<<<1, 256, 0, stream>>>(reinterpret_cast<const float4*>(x), reinterpret_cast<float4*>(x), n);
  copy4<<<1, 128, 0, stream>>>(x, x, n);
  spills<<<1, 1024, 0, stream>>>(x);
}
