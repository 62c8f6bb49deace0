// Where chunks, vectors and tasks lie, for sizes that no test could hold in memory. tests/test_cuda_indices.py runs the PTX.
#include "../../csrc/cuda/vector.cuh"

using namespace cram;
using namespace cram::cuda;

// A thread a question: chunk `number` of a tensor of `numel` numbers at address `p`, by both ways to cut it.
extern "C" __global__ void chunks(const int64_t* p, const int64_t* numel, const uint32_t* number, int64_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const void* const address = reinterpret_cast<const void*>(p[i]);
  const Chunk chunk(address, numel[i], number[i]);
  const WholeChunk whole(address, numel[i], number[i]);
  out[4 * i] = chunk.begin;
  out[4 * i + 1] = chunk.end;
  out[4 * i + 2] = whole.begin;
  out[4 * i + 3] = whole.end;
}

// All vectors of one chunk, by a block: the first and the last number of each that has any.
extern "C" __global__ void vectors(int64_t p, int64_t numel, uint32_t number, int64_t* out) {
  const BFloat16* const address = reinterpret_cast<const BFloat16*>(p);
  const Chunk chunk(address, numel, number);
  for_vectors(chunk, address, [&](int j, const auto& span) {
    out[2 * (j * kThreads + threadIdx.x)] = span.first + span.low;
    out[2 * (j * kThreads + threadIdx.x) + 1] = span.first + span.high;
  });
}

extern "C" __global__ void tasks(const __grid_constant__ Table<int> table, const uint32_t* task, int64_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const Task found = find(table, task[i]);
  out[2 * i] = table.entries[found.entry];
  out[2 * i + 1] = found.number;
}
