"""Builds the native libraries with ninja; everything else is in pyproject.toml.

libcram_kernels_cpu.so  the ops, against LibTorch's stable ABI (torch >= 2.10): one build runs under every later torch
libcram_kernels_cuda.so the same for NVIDIA GPUs, where nvcc and CUDA sources are there
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
import native_build


class NativeBuild(build_ext):
    """One ninja run for all native libraries, wherever setuptools wants them (a wheel, or the source folder of an editable install)."""

    def run(self) -> None:
        package = Path(__file__).parent / "cram_kernels" if self.inplace else Path(self.build_lib) / "cram_kernels"
        try:
            native_build.build(package.resolve())
        except native_build.BuildError as error:
            sys.exit(f"error: {error}")
        except subprocess.CalledProcessError:
            sys.exit("error: the native library does not compile; the compiler's message is above")


setup(
    ext_modules=[Extension("cram_kernels.libcram_kernels_cpu", sources=[])],  # makes the wheel one of this platform
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # no library uses Python's API: one wheel serves every version from 3.10 on
    cmdclass={"build_ext": NativeBuild},
    # torch is needed for its headers only. Where the environment has it, that one is used; where it does not, pip brings it.
    setup_requires=[] if native_build.torch_folder() else ["torch>=2.10"],
)
