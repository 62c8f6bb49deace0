#include "copy.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "torch_pool.h"

namespace cram {
namespace {

// memcpy whose stores bypass the caches, so that no line of the destination is read first; plain memcpy where there is no SSE2.
void stream_slice(char* to, const char* from, size_t bytes) {
#if defined(__SSE2__)
  const size_t head = std::min(bytes, (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64);  // up to a cache line of the destination
  std::memcpy(to, from, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    const auto* source = reinterpret_cast<const __m128i*>(from + i);
    auto* target = reinterpret_cast<__m128i*>(to + i);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1), c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

}  // namespace

void streaming_copy(void* to, const void* from, size_t bytes, size_t threads) {
  if (threads < 1) throw std::invalid_argument("streaming_copy: threads must be at least 1, got 0");
  const Pool pool{static_cast<int>(threads), run_in_torch};  // threads of its own would share the cores with torch's, which wait spinning
  const auto begin = [&](size_t i) { return i == threads ? bytes : bytes / threads * i; };
  parallel(pool, [&](int i) { stream_slice(static_cast<char*>(to) + begin(i), static_cast<const char*>(from) + begin(i), begin(i + 1) - begin(i)); });
}

}  // namespace cram
