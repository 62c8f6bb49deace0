#include "simd.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace cram {
namespace {

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found = {&kernels_portable()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");  // and f16c: every CPU with AVX2 has it, not every clang the name
  if (avx2) found.push_back(&kernels_avx2());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&kernels_avx512());
#endif
  return found;
}

const Kernels* named(const std::string& name) {
  std::string known;
  for (const Kernels* table : tables()) {
    if (table->name == name) return table;
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("CRAM_KERNELS_SIMD / set_simd_level: the level must be one that this CPU has (" + known + "), got " + name);
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{[] {
    const char* wanted = std::getenv("CRAM_KERNELS_SIMD");
    return wanted != nullptr && *wanted != 0 ? named(wanted) : tables().back();
  }()};
  return table;
}

}  // namespace

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Kernels* table : tables()) names.push_back(table->name);
  return names;
}

const Kernels& kernels() { return *chosen(); }
void set_simd_level(const std::string& name) { chosen() = named(name); }

}  // namespace cram
