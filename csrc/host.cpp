// The host side for Python (pybind11): which SIMD levels there are, which one runs, what this library was built with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/simd.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of the native library: SIMD levels and build facts.";
  m.def("simd_levels", &cram::simd_levels, "The SIMD levels of this CPU, best last.");
  m.def("simd_level", [] { return std::string(cram::kernels().name); }, "The SIMD level that the CPU kernels run at.");
  m.def("set_simd_level", &cram::set_simd_level, pybind11::arg("name"), "Run the CPU kernels at one of simd_levels().");
  m.attr("compiler") = CRAM_COMPILER;
  m.attr("torch_built_with") = CRAM_TORCH_VERSION;
  m.attr("gpu_archs") = CRAM_GPU_ARCHS;
}
