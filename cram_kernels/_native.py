"""Loads the native libraries; remembers why one is missing instead of failing the import."""

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_missing: dict[str, str] = {}  # backend -> reason
host = None  # the pybind11 module: build facts, SIMD level, copy kernels of the benchmarks


def _load_cpu() -> str | None:
    global host
    library = _FOLDER / "libcram_kernels_cpu.so"
    if not library.exists():
        return f"the native library {library} was not built: run `pip install .` (or `make setup`) with a C++ compiler"
    try:
        torch.ops.load_library(str(library))
        from . import _host, _registration

        _registration.register()
        host = _host
    except (OSError, ImportError) as error:
        return f"the native library {library} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    library = _FOLDER / "libcram_kernels_cuda.so"
    if not library.exists():
        return "the CUDA library was not built: nvcc was not found when the package was installed, or this version has no CUDA kernels"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA library {library} does not load: {error}"
    return None


for _name, _load in (("cpu", _load_cpu), ("cuda", _load_cuda)):
    if (_reason := _load()) is not None:
        _missing[_name] = _reason


def why_missing(name: str) -> str | None:
    """None where the native library of the backend is loaded, else the reason why not."""
    return _missing.get(name)

