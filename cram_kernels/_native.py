"""Loads the native libraries; remembers why one is missing instead of failing the import."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

# Elsewhere than in the package for the sanitizers' builds (`make test-asan`).
_FOLDER = Path(os.environ.get("CRAM_KERNELS_LIBRARIES") or Path(__file__).parent)
_missing: dict[str, str] = {}  # backend -> reason
host: Any = None  # the pybind11 module: build facts, SIMD level, copy kernels of the benchmarks


def _load_cpu() -> str | None:
    global host
    library = _FOLDER / "libcram_kernels_cpu.so"
    if not library.exists():
        if (_FOLDER.parent / "setup.py").exists():
            return f"{_FOLDER} is a source folder without its native library: `pip install -e .` builds it, or run from elsewhere"
        return f"the native library {library} was not built: run `pip install .` with a C++ compiler"
    try:
        torch.ops.load_library(str(library))
        host = _load_host()
    except (OSError, ImportError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""  # torch hides what dlopen said
        return f"the native library {library} does not load: {error}{cause}"
    return None


def _load_host() -> Any:
    """The pybind11 module beside the library."""
    path = next(_FOLDER.glob("_host.*.so"), None)
    if path is None:
        raise ImportError(f"{_FOLDER} has no _host module")
    spec = importlib.util.spec_from_file_location("cram_kernels._host", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


for _name, _load in (("cpu", _load_cpu), ("cuda", _load_cuda)):
    if (_reason := _load()) is not None:
        _missing[_name] = _reason


def why_missing(name: str) -> str | None:
    """None where the native library of the backend is loaded, else the reason why not."""
    return _missing.get(name)
