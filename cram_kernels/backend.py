"""Which implementation serves an op: chosen by the device of its tensors, overridden loudly, never replaced silently.

`cpu` serves CPU tensors; `cuda`, else `triton`, serve NVIDIA GPUs. With TRITON_INTERPRET=1 in the environment `triton` serves CPU tensors
where it is asked for. `use_backend(name)` or the environment variable CRAM_KERNELS_BACKEND
override. A backend that is missing raises when it is used, with the reason; the reference is used only where it is asked for.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, _registration, _triton, reference

ENVIRONMENT = "CRAM_KERNELS_BACKEND"
NAMES = ("cpu", "cuda", "triton", "reference")
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": _triton.DEVICE}  # whose tensors a backend serves; the reference: any

_chosen: str | None = os.environ.get(ENVIRONMENT) or None


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot run here; the message says why.

    Example:
        try:
            use_backend("cuda")
        except BackendUnavailable as reason:
            print(reason)
    """


class _Checked:
    """A backend whose functions are plain Python: the native checks run first, so that every backend refuses the same input."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.functions, name)
        check = getattr(torch.ops.cram_kernels, f"check_{name}")

        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            args, kwargs = _registration.materialized((args, kwargs))
            return function(*args, **kwargs)

        return checked


_reference = _Checked(reference)
_native_ops = _registration.direct(_registration.NATIVE) if _native.why_missing("cpu") is None else None
_triton_ops = _registration.direct(_triton.NAMESPACE) if _triton.why_missing() is None else None


def why_missing(name: str) -> str | None:
    """None where the backend can run here, else the reason why not."""
    if name not in NAMES:
        raise ValueError(f"backend: the name ({ENVIRONMENT} or use_backend()) must be one of {', '.join(NAMES)}, got {name!r}")
    if (reason := _native.why_missing("cpu")) is not None:
        return reason  # every backend needs the op schemas and the checks of the native library
    if name == "cuda":
        return _native.why_missing("cuda")
    if name == "triton":
        return _triton.why_missing()
    return None


def available() -> dict[str, str | None]:
    """Every backend's name -> None where it can run here, else the reason why not."""
    return {name: why_missing(name) for name in NAMES}


def chosen() -> str | None:
    """The backend that was asked for; None: by device."""
    return _chosen


def use_backend(name: str | None) -> "_Override":
    """Serve every op with this backend from now on; None: choose by device again. As a context manager: within the block only.

    Args:
        name: "cpu" (C++), "cuda" (CUDA C++), "triton", "reference" (plain torch, slow, on any device), or None.

    Returns:
        A context manager, at whose end the earlier choice holds again.

    Raises:
        ValueError: an unknown name.
        BackendUnavailable: the backend cannot run here.

    Example:
        with use_backend("reference"):
            prune(model, NM(2, 4))
    """
    global _chosen
    if name is not None:
        _require(name)
    previous, _chosen = _chosen, name
    return _Override(previous)


class _Override:
    def __init__(self, previous: str | None) -> None:
        self.previous = previous

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        global _chosen
        _chosen = self.previous


def _require(name: str) -> None:
    if (reason := why_missing(name)) is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}")


def name_for(device_type: str) -> str:
    """The backend that serves tensors on this kind of device."""
    if _chosen is not None:
        _require(_chosen)
        if _chosen != "reference" and device_type != DEVICES[_chosen]:
            raise BackendUnavailable(f"backend {_chosen!r} was chosen ({ENVIRONMENT} or use_backend()), got tensors on {device_type!r}")
        return _chosen
    if device_type == "cpu":
        return "cpu"
    if device_type == "cuda":
        return "cuda" if why_missing("cuda") is None or why_missing("triton") is not None or _triton.INTERPRETED else "triton"
    raise BackendUnavailable(f"no backend serves tensors on {device_type!r}; use_backend('reference') runs anywhere")


def select(tensors: Sequence[Tensor]) -> Any:
    """The namespace whose functions implement the ops for these tensors (an empty list: what was asked for, else the native one)."""
    if _chosen is None and _native_ops is not None and (len(tensors) == 0 or tensors[0].is_cpu):
        return _native_ops
    name = name_for(tensors[0].device.type) if len(tensors) else _chosen or "cpu"
    _require(name)
    if name == "reference":
        return _reference
    return _triton_ops if name == "triton" else _native_ops
