// The host side for Python, as C functions (cram_kernels/_native.py calls them with ctypes): which SIMD levels there are, which one runs, what this
// library was built with, and a copy to compare with. Free of Python, so that one build serves every version of it.
#include <cstdint>
#include <exception>

#include "cpu/copy.h"

namespace {

// What `call` returns; of an exception "error: " and its message. Valid until the thread's next call.
template <class Call>
const char* answer(Call call) {
  static thread_local std::string text;
  try {
    text = call();
  } catch (const std::exception& error) {
    text = std::string("error: ") + error.what();
  }
  return text.c_str();
}

}  // namespace

extern "C" {

// Names with a space between them, the best level of this CPU last.
CRAM_EXPORT const char* cram_simd_levels() {
  return answer([] {
    std::string names;
    for (const std::string& name : cram::simd_levels()) names += (names.empty() ? "" : " ") + name;
    return names;
  });
}

CRAM_EXPORT const char* cram_simd_level() {
  return answer([] { return std::string(cram::kernels().name); });
}

CRAM_EXPORT const char* cram_set_simd_level(const char* name) {
  return answer([=] { return cram::set_simd_level(name), std::string(); });
}

CRAM_EXPORT const char* cram_streaming_copy(void* to, const void* from, size_t bytes, size_t threads) {
  return answer([=] { return cram::streaming_copy(to, from, bytes, threads), std::string(); });
}

// Lines: the compiler, the version of torch, the GPU archs.
CRAM_EXPORT const char* cram_build_facts() { return CRAM_COMPILER "\n" CRAM_TORCH_VERSION "\n" CRAM_GPU_ARCHS; }

}  // extern "C"
