// Mask bits of a chunk: gathered in shared memory vector by vector, written as whole bytes, which belong to one chunk each.
#pragma once

#include "vector.cuh"

namespace cram {
namespace cuda {

class MaskStage {
 public:
  // `bits` of vector j of this thread (for_vectors); lanes that do not exist are 0.
  template <class T>
  __device__ __forceinline__ void put(int j, uint32_t bits) {
    vectors_[j * kThreads + threadIdx.x] = static_cast<uint8_t>(bits);
    if (threadIdx.x < kPadding) vectors_[kVectors<T> * kThreads + threadIdx.x] = 0;
  }

  // After a barrier: thread t writes byte t of the chunk.
  template <class T>
  __device__ __forceinline__ void write(const Chunk& chunk, const T* p, uint8_t* mask) const {
    constexpr int kLanes = Vector<T>::kLanes;
    const int byte = static_cast<int>(threadIdx.x);
    if (byte * 8 >= chunk.end - chunk.begin) return;
    uint32_t bits = 0;
#pragma unroll
    for (int v = 0; v <= 8 / kLanes; ++v) bits |= static_cast<uint32_t>(vectors_[byte * (8 / kLanes) + v]) << (v * kLanes);
    mask[chunk.begin / 8 + byte] = static_cast<uint8_t>(bits >> chunk.shift(p));
  }

 private:
  static constexpr int kPadding = 2;  // read, not used, by the last byte
  uint8_t vectors_[kChunk / 4 + kPadding];
};
// The mask of a chunk; kept: bits of this thread's vectors (for_vectors). All threads of the block.
template <class T>
__device__ __forceinline__ void write_mask(const Chunk& chunk, const T* p, uint8_t* mask, const uint32_t (&kept)[kVectors<T>], MaskStage& stage) {
  __syncthreads();  // the chunk before has been read
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) stage.put<T>(j, kept[j]);
  __syncthreads();
  stage.write<T>(chunk, p, mask);
}

// A vector of float32 has half a byte: of two neighbours the even one has the byte of their first vectors, the odd one that of their second.
template <class T>
__device__ __forceinline__ void write_mask(const WholeChunk& chunk, const T*, uint8_t* mask, const uint32_t (&kept)[kVectors<T>]) {
  const int t = static_cast<int>(threadIdx.x), size = static_cast<int>(chunk.end - chunk.begin) / 8;
  if constexpr (sizeof(T) == 2) {
    if (t < size) mask[chunk.begin / 8 + t] = static_cast<uint8_t>(kept[0]);
  } else {
    const bool odd = t % 2 != 0;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? kept[0] : kept[1], 1);
    const int byte = (odd ? kThreads / 2 : 0) + t / 2;
    if (byte < size) mask[chunk.begin / 8 + byte] = static_cast<uint8_t>(odd ? other | kept[1] << 4 : kept[0] | other << 4);
  }
}
static_assert(kChunk / 8 == kThreads, "a thread has one byte of the mask");

}  // namespace cuda
}  // namespace cram
