"""Loads the Triton backend, or remembers why it cannot run here: `import cram_kernels` never fails for it.

Its kernels are torch ops in a namespace of their own, with the schemas of the native ops. So torch.compile sees one node for each, and
the CUDA and the Triton backend can be loaded side by side.
"""

import contextlib
import importlib.util
import os
import re
from typing import Any

import torch

from . import _native, _registration

NAMESPACE = "cram_kernels_triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as triton reads it
NEEDED = (3, 6)  # triton's major and minor version
DEVICE = "cpu" if INTERPRETED else "cuda"  # of the tensors that it serves


def _load() -> str | None:
    if (reason := _native.why_missing("cpu")) is not None:
        return reason
    if not INTERPRETED and not torch.cuda.is_available():
        return (
            "torch finds no GPU; with TRITON_INTERPRET=1 in the environment from the start, Triton's interpreter runs the same kernels "
            "on CPU tensors, slowly, to learn and to debug"
        )
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: `pip install 'cram_kernels[triton]'`"
    try:
        if (reason := _too_old()) is not None:
            return reason
        from . import triton as functions
    except ImportError as error:
        return f"triton, or numpy for its interpreter, cannot be imported: {error}"
    _register(functions)
    return None


def _too_old() -> str | None:
    import triton

    found = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))  # of 3.7rc1 too
    if found < NEEDED:
        wanted = ".".join(map(str, NEEDED))
        return f"the kernels need triton {wanted} or later, got {triton.__version__}: `pip install 'triton>={wanted}'`"
    if INTERPRETED and found == (3, 6):
        import numpy

        if tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):  # where int() of an array of one element is an error
            return f"triton 3.6's interpreter needs numpy before 2.4, got {numpy.__version__}: `pip install 'numpy<2.4'` or a later triton"
    return None


def _register(functions: Any) -> None:
    _registration.define(NAMESPACE)
    library = torch.library.Library(NAMESPACE, "IMPL")
    _registration.keep(library)
    for name in _registration.OPS:
        library.impl(name, _implementation(name, getattr(functions, name)), DEVICE.upper())
    _registration.register(NAMESPACE)


def _implementation(name: str, function: Any) -> Any:
    check = getattr(torch.ops.cram_kernels, f"check_{name}")

    def implementation(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        device = next(t.device for t in _registration.tensors(args))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(*args, **kwargs)

    return implementation


_missing = _load()


def why_missing() -> str | None:
    """None where the backend can run, else the reason why not."""
    return _missing
