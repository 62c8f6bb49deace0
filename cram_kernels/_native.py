"""Loads the native libraries; remembers why one is missing instead of failing the import."""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

# Elsewhere than in the package for the sanitizers' builds (`make test-asan`).
_FOLDER = Path(os.environ.get("CRAM_KERNELS_LIBRARIES") or Path(__file__).parent)
host: Any = None  # a Host, once the CPU library is loaded


def _load_cpu() -> str | None:
    global host
    library = _FOLDER / "libcram_kernels_cpu.so"
    if not library.exists():
        if (_FOLDER.parent / "setup.py").exists():
            return f"{_FOLDER} is a source folder without its native library: `pip install -e .` builds it, or run from elsewhere"
        return f"the native library {library} was not built: run `pip install .` with a C++ compiler"
    try:
        torch.ops.load_library(str(library))
        host = Host(library)
    except (OSError, AttributeError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""  # torch hides what dlopen said
        return f"the native library {library} does not load: {error}{cause}"
    return None


class Host:
    """The C functions of the CPU library (csrc/host.cpp): SIMD levels, build facts, the copy of the benchmarks.

    compiler, torch_built_with, gpu_archs: what the library was built with.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("simd_levels", "simd_level", "set_simd_level", "streaming_copy", "build_facts", "ops"):
            getattr(self._library, f"cram_{name}").restype = ctypes.c_char_p
        self.compiler, self.torch_built_with, self.gpu_archs = self._call("build_facts").split("\n")

    def _call(self, name: str, *arguments: Any) -> str:
        answer: str = getattr(self._library, f"cram_{name}")(*arguments).decode()
        if answer.startswith("error: "):
            raise RuntimeError(answer.removeprefix("error: "))
        return answer

    def ops(self) -> list[str]:
        """The names of the ops that this library defines (csrc/ops.h)."""
        return self._call("ops").split()

    def simd_levels(self) -> list[str]:
        """The SIMD levels of this CPU, best last."""
        return self._call("simd_levels").split()

    def simd_level(self) -> str:
        """The SIMD level that the CPU kernels run at."""
        return self._call("simd_level")

    def set_simd_level(self, name: str) -> None:
        """Run the CPU kernels at one of simd_levels()."""
        self._call("set_simd_level", name.encode())

    def streaming_copy(self, to: int, source: int, size: int, threads: int) -> None:
        """Copy bytes between addresses that do not overlap, with non-temporal stores: what the benchmarks compare with."""
        self._call("streaming_copy", *map(ctypes.c_void_p, (to, source)), *map(ctypes.c_size_t, (size, threads)))


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    library = _FOLDER / "libcram_kernels_cuda.so"
    if not library.exists():
        return "the CUDA library was not built: nvcc was not found when the package was installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA library {library} does not load: {error}"
    return None


_missing = {name: reason for name, reason in (("cpu", _load_cpu()), ("cuda", _load_cuda())) if reason is not None}


def why_missing(name: str) -> str | None:
    """None where the native library of the backend is loaded, else the reason why not."""
    return _missing.get(name)
