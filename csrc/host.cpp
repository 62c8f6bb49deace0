// The host side for Python (pybind11): which SIMD levels there are, which one runs, what this library was built with, and a copy to compare with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/simd.h"

namespace {

// memcpy whose stores bypass the cache, so that no line of the destination is read first; plain memcpy where there is no SSE2.
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
  _mm_sfence();
#else
  std::memcpy(to, from, bytes);
#endif
}

void streaming_copy(uintptr_t to, uintptr_t from, size_t bytes, size_t threads) {
  if (threads < 1) throw std::invalid_argument("streaming_copy: threads must be at least 1, got 0");
  const auto begin = [&](size_t i) { return bytes / threads * i; };
  const auto slice = [&](size_t i) {
    const size_t end = i + 1 == threads ? bytes : begin(i + 1);
    stream_slice(reinterpret_cast<char*>(to) + begin(i), reinterpret_cast<const char*>(from) + begin(i), end - begin(i));
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) others.emplace_back(slice, i);
  slice(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of the native library: SIMD levels, build facts, the copy of the benchmarks.";
  m.def("simd_levels", &cram::simd_levels, "The SIMD levels of this CPU, best last.");
  m.def("simd_level", [] { return std::string(cram::kernels().name); }, "The SIMD level that the CPU kernels run at.");
  m.def("set_simd_level", &cram::set_simd_level, pybind11::arg("name"), "Run the CPU kernels at one of simd_levels().");
  m.def("streaming_copy", &streaming_copy, pybind11::arg("dst_ptr"), pybind11::arg("src_ptr"), pybind11::arg("bytes"), pybind11::arg("threads"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Copy bytes between addresses that do not overlap, with non-temporal stores: what the benchmarks compare with.");
  m.attr("compiler") = CRAM_COMPILER;
  m.attr("torch_built_with") = CRAM_TORCH_VERSION;
  m.attr("gpu_archs") = CRAM_GPU_ARCHS;
}
