// 16 bytes of a tensor in registers, and the vectors of a chunk: whole ones by one access of 16 bytes, the parts at its ends number by number.
#pragma once

#include "table.h"

namespace cram {
namespace cuda {

struct Byte {  // a number of 8 bits: only moved
  uint8_t bits;
};

template <class T>
__device__ __forceinline__ uint32_t bits_of(T x) {
  if constexpr (sizeof(T) == 4)
    return to_bits(x);
  else
    return x.bits;
}

// The number of type T that has these bits.
__device__ __forceinline__ float from_bits_of(uint32_t bits, float) { return from_bits(bits); }
template <class T>
__device__ __forceinline__ T from_bits_of(uint32_t bits, T) {
  return {static_cast<decltype(T::bits)>(bits)};
}

// Calls f(T{}, W{}) with the number type of a parameter, and that of its weights and states: float where it has a master weight, else the same.
template <class Function>
__device__ __forceinline__ auto with_number_types(DType dtype, bool has_master, Function f) {
  switch (dtype) {
    case DType::kBFloat16:
      return has_master ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return has_master ? f(Float16{}, float{}) : f(Float16{}, Float16{});
    default:
      return f(float{}, float{});
  }
}

template <class T>
struct Vector {
  static constexpr int kLanes = 16 / sizeof(T), kBits = 8 * sizeof(T), kInWord = 4 / sizeof(T);
  uint32_t words[4];

  __device__ __forceinline__ T get(int lane) const {
    if constexpr (sizeof(T) == 4)
      return from_bits(words[lane]);
    else
      return T{static_cast<decltype(T::bits)>(words[lane / kInWord] >> (lane % kInWord * kBits))};
  }
  // Lane 0 goes, the others move down, x becomes the last.
  __device__ __forceinline__ void shift_in(T x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t next = i < 3 ? words[i + 1] : bits_of(x);
      words[i] = sizeof(T) == 4 ? next : __funnelshift_r(words[i], next, kBits);
    }
  }
  __device__ __forceinline__ void set(int lane, T value) {
    if constexpr (sizeof(T) == 4) {
      words[lane] = to_bits(value);
    } else {
      const int shift = lane % kInWord * kBits;
      uint32_t& word = words[lane / kInWord];
      word = (word & ~(((1u << kBits) - 1) << shift)) | static_cast<uint32_t>(value.bits) << shift;
    }
  }
};

template <class T>
__device__ __forceinline__ uint4 words_of(const Vector<T>& x) {
  return {x.words[0], x.words[1], x.words[2], x.words[3]};
}

// x, a number that T holds, as T.
__device__ __forceinline__ float narrowed(float x, float) { return x; }
__device__ __forceinline__ BFloat16 narrowed(float x, BFloat16) { return {static_cast<uint16_t>(to_bits(x) >> 16)}; }
__device__ __forceinline__ Float16 narrowed(float x, Float16) { return {half_bits(x)}; }

// x, rounded to nearest even, as T; a NaN becomes canonical.
__device__ __forceinline__ float nearest(float x, float) { return canonical(x); }
__device__ __forceinline__ BFloat16 nearest(float x, BFloat16) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {x != x ? static_cast<uint16_t>(kNanKey >> 16) : bits};
}
__device__ __forceinline__ Float16 nearest(float x, Float16) { return {half_bits(x)}; }

// The elements [first + low, first + high) of a tensor; lane i of a vector is element first + i.
template <int kLanes>
struct Span {
  int64_t first;
  int low, high;

  __device__ __forceinline__ bool whole() const { return low == 0 && high == kLanes; }
  __device__ __forceinline__ bool has(int lane) const { return lane >= low && lane < high; }
  __device__ __forceinline__ uint32_t lanes() const { return (1u << high) - (1u << low); }  // bit i: lane i exists
};

// Of a WholeChunk: the vector is there as a whole, or not at all.
template <int kLanes>
struct WholeSpan {
  int64_t first;
  bool exists;

  __device__ __forceinline__ bool has(int) const { return exists; }
  __device__ __forceinline__ uint32_t lanes() const { return exists ? (1u << kLanes) - 1 : 0; }
};

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T, int kLanes>
__device__ __forceinline__ Vector<T> load(const T* p, const Span<kLanes>& span) {
  static_assert(kLanes == Vector<T>::kLanes, "");
  Vector<T> x = {};
  p += span.first;
  if (span.whole() && aligned(p)) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    x.words[0] = words.x, x.words[1] = words.y, x.words[2] = words.z, x.words[3] = words.w;
  } else if (span.whole()) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) x.set(i, p[i]);
  } else {  // at an end: a loop needs fewer registers than the copies of its body
#pragma unroll 1
    for (int i = 0; i < kLanes; ++i) x.shift_in(span.has(i) ? p[i] : T{});
  }
  return x;
}

template <class T, int kLanes>
__device__ __forceinline__ Vector<T> load(const T* p, const WholeSpan<kLanes>& span) {
  static_assert(kLanes == Vector<T>::kLanes, "");
  uint4 words = {};
  if (span.exists) words = *reinterpret_cast<const uint4*>(p + span.first);
  return {words.x, words.y, words.z, words.w};
}

// A plain assignment is taken apart by nvcc 13 for sm_80 to sm_90, to share its pieces with other branches.
template <class T>
__device__ __forceinline__ void store_whole(T* p, const Vector<T>& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x.words[0]), "r"(x.words[1]), "r"(x.words[2]),
               "r"(x.words[3])
               : "memory");
}

template <class T, int kLanes>
__device__ __forceinline__ void store(T* p, const Vector<T>& x, const WholeSpan<kLanes>& span) {
  static_assert(kLanes == Vector<T>::kLanes, "");
  if (span.exists) store_whole(p + span.first, x);
}

template <class T, int kLanes>
__device__ __forceinline__ void store(T* p, const Vector<T>& x, const Span<kLanes>& span) {
  static_assert(kLanes == Vector<T>::kLanes, "");
  p += span.first;
  if (span.whole() && aligned(p)) {
    store_whole(p, x);
  } else if (span.whole()) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) p[i] = x.get(i);
  } else {
    Vector<T> rest = x;
#pragma unroll 1
    for (int i = 0; i < kLanes; ++i) {
      if (span.has(i)) p[i] = rest.get(0);
      rest.shift_in(T{});
    }
  }
}

// The numbers of a span as floats.
template <int kLanes>
struct Lanes {
  float x[kLanes];
  __device__ __forceinline__ float& operator[](int i) { return x[i]; }
  __device__ __forceinline__ const float& operator[](int i) const { return x[i]; }
};

// The part of a span that is part number `part` of kLanes / kPart.
template <int kPart, int kLanes>
__device__ __forceinline__ Span<kPart> part_of(const Span<kLanes>& span, int part) {
  return {span.first + part * kPart, max(0, span.low - part * kPart), min(kPart, span.high - part * kPart)};
}

template <int kPart, int kLanes>
__device__ __forceinline__ WholeSpan<kPart> part_of(const WholeSpan<kLanes>& span, int part) {
  return {span.first + part * kPart, span.exists};
}

// A span of an array of T, whose vectors may be shorter (a float32 master weight of a parameter of 16 bits): loaded, and not yet looked at, which waits.
template <class T, int kLanes>
struct Raw {
  static constexpr int kPart = Vector<T>::kLanes;
  Vector<T> parts[kLanes / kPart];

  Raw() = default;
  template <class Span>
  __device__ __forceinline__ Raw(const T* p, const Span& span) {
#pragma unroll
    for (int part = 0; part < kLanes / kPart; ++part) parts[part] = load(p, part_of<kPart>(span, part));
  }

  __device__ __forceinline__ float at(int i) const { return widen(parts[i / kPart].get(i % kPart)); }
};

template <class T, template <int> class Span, int kLanes>
__device__ __forceinline__ Lanes<kLanes> load_floats(const T* p, const Span<kLanes>& span) {
  const Raw<T, kLanes> raw(p, span);
  Lanes<kLanes> x;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) x[i] = raw.at(i);
  return x;
}

// Mask bits of a span, bit i for lane i; bits of lanes that do not exist are 0.
template <int kLanes>
__device__ __forceinline__ uint32_t load_mask(const uint8_t* mask, const Span<kLanes>& span) {
  if (span.low >= span.high) return 0;
  const int64_t begin = span.first + span.low, last = span.first + span.high - 1;
  uint32_t bits = mask[begin / 8];
  if (last / 8 != begin / 8) bits |= static_cast<uint32_t>(mask[last / 8]) << 8;
  return (bits >> (begin % 8) << span.low) & span.lanes();
}

template <int kLanes>
__device__ __forceinline__ uint32_t load_mask(const uint8_t* mask, const WholeSpan<kLanes>& span) {
  const uint32_t bits = span.exists ? mask[span.first / 8] : 0;
  return kLanes == 8 ? bits : bits >> (span.first % 8) & span.lanes();
}

// Chunk `number` of a tensor of `numel` elements whose written array is p (chunk_size above).
struct Chunk {
  int64_t begin, end;
  bool aligned;

  __device__ __forceinline__ Chunk(const void* p, int64_t numel, uint32_t number) : Chunk(p, numel, number, chunk_size(cuda::aligned(p))) {}
  // Of another size: a multiple of 8, chunk_size at most.
  __device__ __forceinline__ Chunk(const void* p, int64_t numel, uint32_t number, int64_t size) : aligned(cuda::aligned(p)) {
    begin = number * size;
    end = min(begin + size, numel);
  }

  // Lanes of the first vector that lie before the chunk.
  template <class T>
  __device__ __forceinline__ int shift(const T* p) const {
    return aligned ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
  }
};

// Calls f(j, span) for each vector that this thread has of a chunk; j counts them, at most kVectors<T>. Vectors are dealt out so that a warp's
// accesses are consecutive. Every thread calls f as often; a span may be empty. kUnroll = 1 needs fewer registers, where f keeps nothing in arrays.
template <class T>
constexpr int kVectors = kChunk / kThreads / Vector<T>::kLanes;

template <int kUnroll = kChunk / kThreads, class T, class Function>
__device__ __forceinline__ void for_vectors(const Chunk& chunk, const T* p, Function f) {
  constexpr int kLanes = Vector<T>::kLanes;
  const int shift = chunk.shift(p);
  const int size = static_cast<int>(chunk.end - chunk.begin);
#pragma unroll kUnroll
  for (int j = 0; j < kVectors<T>; ++j) {
    const int first = (j * kThreads + static_cast<int>(threadIdx.x)) * kLanes - shift;
    const int low = max(0, -first), high = max(low, min(kLanes, size - first));
    f(j, Span<kLanes>{chunk.begin + first, low, high});
  }
}

// A chunk of a tensor whose entry says `whole`.
struct WholeChunk {
  int64_t begin, end;

  __device__ __forceinline__ WholeChunk(const void*, int64_t numel, uint32_t number, int64_t size = kChunk)
      : begin(number * size), end(min(begin + size, numel)) {}
};

template <int kUnroll = kChunk / kThreads, class T, class Function>
__device__ __forceinline__ void for_vectors(const WholeChunk& chunk, const T*, Function f) {
  constexpr int kLanes = Vector<T>::kLanes;
  const int size = static_cast<int>(chunk.end - chunk.begin);
#pragma unroll kUnroll
  for (int j = 0; j < kVectors<T>; ++j) {
    const int first = (j * kThreads + static_cast<int>(threadIdx.x)) * kLanes;
    f(j, WholeSpan<kLanes>{chunk.begin + first, first < size});
  }
}

// A WholeChunk of kChunk weights, of which each thread has all its vectors: what tests for the last ones is gone at compile time.
struct FullChunk {
  int64_t begin;

  __device__ __forceinline__ explicit FullChunk(uint32_t number) : begin(int64_t{number} * kChunk) {}
};

template <class T, class Function>
__device__ __forceinline__ void for_vectors(const FullChunk& chunk, const T*, Function f) {
  constexpr int kLanes = Vector<T>::kLanes;
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) f(j, WholeSpan<kLanes>{chunk.begin + (j * kThreads + static_cast<int>(threadIdx.x)) * kLanes, true});
}

}  // namespace cuda
}  // namespace cram
