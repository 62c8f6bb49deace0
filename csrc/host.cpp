// The host side for Python (pybind11): which SIMD levels there are, which one runs, what this library was built with, and a copy to compare with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cpu/copy.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of the native library: SIMD levels, build facts, the copy of the benchmarks.";
  m.def("simd_levels", &cram::simd_levels, "The SIMD levels of this CPU, best last.");
  m.def("simd_level", [] { return std::string(cram::kernels().name); }, "The SIMD level that the CPU kernels run at.");
  m.def("set_simd_level", &cram::set_simd_level, pybind11::arg("name"), "Run the CPU kernels at one of simd_levels().");
  m.def(
      "streaming_copy",
      [](uintptr_t to, uintptr_t from, size_t bytes, size_t threads) {
        cram::streaming_copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, threads);
      },
      pybind11::arg("dst_ptr"), pybind11::arg("src_ptr"), pybind11::arg("bytes"), pybind11::arg("threads"),
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Copy bytes between addresses that do not overlap, with non-temporal stores: what the benchmarks compare with.");
  m.attr("compiler") = CRAM_COMPILER;
  m.attr("torch_built_with") = CRAM_TORCH_VERSION;
  m.attr("gpu_archs") = CRAM_GPU_ARCHS;
}
