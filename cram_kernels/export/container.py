"""The safetensors container of our files: tensors, and a manifest in the metadata that says what they are.

The manifest is JSON under the key "cram_kernels":

    {"format", "format_version", "cram_kernels": version, "pattern": {"n", "m"}, "axis", "aliases": {name: its name in the file},
     "tensors": {name: {"shape", "dtype", "stored": "dense" | "bitmask" | "cutlass-sm80", "pattern": "2:4" | null, "zeros", "why_dense"}}}

A format version that this package does not know is refused.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..patterns import NM
from ..version import __version__
from .consumers import dtype_name
from .report import NMReport

KEY = "cram_kernels"
VERSION = 1
AXIS = 1
PARTS = {"dense": ("",), "bitmask": (".values", ".bitmask"), "cutlass-sm80": (".packed", ".meta")}  # stored -> what follows NAME
NUMEL = 2**48  # more elements, no tensor has


def safetensors() -> Any:
    """The safetensors.torch module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("these files need safetensors: pip install 'cram_kernels[export]'") from error
    return safetensors.torch


def manifest(format: str, report: NMReport, stored: Mapping[str, str]) -> dict[str, Any]:
    """stored: name -> how, of the tensors that are not stored dense."""
    tensors = {
        row.name: {
            "shape": list(row.shape),
            "dtype": row.dtype,
            "stored": stored.get(row.name, "dense"),
            "pattern": str(report.pattern) if row.holds else None,
            "zeros": row.zeros,
            "why_dense": row.why_dense,
        }
        for row in report.rows
    }
    return {
        "format": format,
        "format_version": VERSION,
        "cram_kernels": __version__,
        "pattern": {"n": report.pattern.n, "m": report.pattern.m},
        "axis": AXIS,
        "aliases": {alias: row.name for row in report.rows for alias in row.aliases},
        "tensors": tensors,
    }


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Contiguous tensors on the CPU, no two of which share memory.

    Raises:
        OSError: they cannot be written.
    """
    save_file = safetensors().save_file
    from safetensors import SafetensorError

    try:
        save_file(dict(tensors), str(path), metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"{path}: safetensors must be able to write the file, got {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    safetensors()
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a safetensors file; None where it has none.

    Raises:
        ValueError: it has one that this version cannot read.
    """
    text = read_metadata(path).get(KEY)
    if text is None:
        return None
    own = json.loads(text)
    if not isinstance(own, dict) or own.get("format_version") != VERSION:
        found = own.get("format_version") if isinstance(own, dict) else own
        raise ValueError(f"{path}: format_version must be {VERSION}, got {found!r}: written by another cram_kernels")
    if missing := {"format", "pattern", "aliases", "tensors"} - own.keys():
        raise ValueError(f"{path}: the manifest must have {', '.join(sorted(missing))}, got none: it is damaged")
    if why := _damage(own):
        raise ValueError(f"{path}: the manifest must describe each tensor, got {why}: it is damaged")
    return own


def _damage(own: dict[str, Any]) -> str | None:
    tensors, aliases = own["tensors"], own["aliases"]
    try:
        NM(**own["pattern"])
    except (TypeError, ValueError) as error:
        return f"pattern {own['pattern']!r} ({error})"
    if not isinstance(tensors, dict) or not isinstance(aliases, dict):
        return "no tensors or aliases by name"
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or not {"shape", "dtype", "stored", "pattern"} <= entry.keys():
            return f"{entry!r} for {name!r}"
        stored, dtype, shape = entry["stored"], entry["dtype"], entry["shape"]
        if not isinstance(stored, str) or stored not in PARTS:
            return f"stored {stored!r} for {name!r}"
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            return f"dtype {dtype!r} for {name!r}"
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or math.prod(max(size, 1) for size in shape) > NUMEL or (stored == "cutlass-sm80" and len(shape) != 2):
            return f"shape {shape!r} for {name!r}"
    wrong = next((alias for alias, name in aliases.items() if not isinstance(name, str) or name not in tensors), None)
    return None if wrong is None else f"an alias {wrong!r} of {aliases[wrong]!r}"


def opened(op: str, path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The manifest of a safetensors file, if it has one, and its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not one, or damaged; op names who asks.
    """
    load_file = safetensors().load_file
    if not path.is_file():
        raise FileNotFoundError(f"{op}: path must be a file, got {str(path)!r}, which is {'a folder' if path.is_dir() else 'not there'}")
    try:
        own, tensors = read_manifest(path), load_file(str(path))
    except Exception as error:  # safetensors has an exception of its own for a broken file
        raise ValueError(f"{op}: path must be a safetensors file that this version knows, got {str(path)!r}: {error}") from error
    if own is not None:
        named = {f"{name}{part}" for name, entry in own["tensors"].items() for part in PARTS[entry["stored"]]}
        if more := sorted(tensors.keys() - named):
            raise ValueError(f"{op}: {path}: the manifest must name every tensor, got {more[0]!r} beside it: the file is damaged")
    return own, tensors


def take(name: str, tensors: Mapping[str, Tensor], dtype: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """A tensor of the file that must have this dtype and shape.

    Raises:
        ValueError: it is not there, or another.
    """
    if name not in tensors:
        raise ValueError(f"{path}: must have the tensor {name!r}, as its manifest says, got none")
    t = tensors[name]
    if dtype_name(t.dtype) != dtype or tuple(t.shape) != shape:
        wanted = f"{dtype} {list(shape)}"
        raise ValueError(
            f"{path}: {name!r} must have the dtype and shape of its manifest, {wanted}, got {dtype_name(t.dtype)} {list(t.shape)}"
        )
    return t


def dtype_named(name: str) -> torch.dtype:
    return getattr(torch, name)
