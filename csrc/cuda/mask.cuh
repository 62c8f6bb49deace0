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
static_assert(kChunk / 8 == kThreads, "a thread has one byte of the mask");

}  // namespace cuda
}  // namespace cram
