"""Reading weights from files: safetensors (ours of every format, and others'), torch checkpoints, ONNX."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..warning import warn
from . import bitmask, container, cutlass
from .weights import Weight, weights_of

DECODERS = {"dense": container.take, bitmask.NAME: bitmask.decode, cutlass.NAME: cutlass.decode}
# where checkpoints keep the state dict of their model, the likeliest first
NESTED: tuple[str, ...] = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights", "teacher", "student")
NESTED += ("ema", "model_ema", "params_ema", "state_dict_ema", "ema_state_dict", "generator", "backbone", "encoder")


def read(path: str | Path, key: str | None = None) -> dict[str, Any]:
    """The dense state dict in a file.

    Args:
        path: a file that `export` wrote, any other safetensors file, a torch checkpoint (weights_only), or the index of a model in several
            files (model.safetensors.index.json).
        key: of a torch checkpoint, where its state dict lies, as "model" or "teacher.backbone". Without it, the top or the usual keys are
            tried ("state_dict", "model", "module", "net", "params", "ema", ...); a `CrAMWarning` says which was read, where there are
            several.

    Raises:
        FileNotFoundError, ValueError: no such file, not one of these, or no state dict at that key.

    Example:
        model.load_state_dict(read("model.safetensors"))
    """
    path = Path(path)
    if key is not None and path.suffix in (".safetensors", ".json", ".onnx"):
        raise ValueError(f"read: key must be absent for anything but a torch checkpoint, got {key!r} for {str(path)!r}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"read: path must be a file, got {str(path)!r}, which is {'a folder' if path.is_dir() else 'not there'}")
    if path.suffix == ".onnx":
        raise ValueError(f"read: path must be a safetensors file or a torch checkpoint, got the ONNX model {str(path)!r}")
    return _parts(path) if path.suffix == ".json" else _checkpoint(path, key)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """`read` of a safetensors file, whatever its name."""
    own, tensors = container.opened("read", path)
    if own is None:
        return tensors
    state = {
        name: DECODERS[entry["stored"]](name, tensors, entry["dtype"], tuple(entry["shape"]), path)
        for name, entry in own["tensors"].items()
    }
    return state | {alias: state[name] for alias, name in own["aliases"].items()}


def _parts(index: Path) -> dict[str, Tensor]:
    """A model in several files, as Hugging Face's libraries write it: the index says which tensor is where."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"read: path must be an index with a weight_map, got {str(index)!r}: {error!r}") from error
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).suffix == ".json":  # an index of indices could name itself
            raise ValueError(f"read: the weight_map of {str(index)!r} must name the file of {name!r}, with tensors, got {file!r}")
        if Path(file).is_absolute() or ".." in Path(file).parts:  # a downloaded index must not open files elsewhere
            raise ValueError(f"read: the weight_map of {str(index)!r} must name files in its folder, got {file!r} for {name!r}")
    files = {name: read(index.parent / name) for name in sorted(set(places.values()))}
    if lost := [name for name, file in places.items() if name not in files[file]]:
        raise ValueError(f"read: {index.parent / places[lost[0]]} must have the tensor {lost[0]!r}, as {index.name} says, got none")
    return {name: files[file][name] for name, file in places.items()}


def _checkpoint(path: Path, key: str | None) -> dict[str, Any]:
    return state_in(path, checkpoint(path), key)


def checkpoint(path: Path) -> Any:
    """What a torch checkpoint holds, loaded with weights_only.

    Raises:
        ValueError: it is none.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's unpickler meets in a file that is none
        why = _short(error) if isinstance(error, OSError) or _may_be_torchs(path) else "torch.save did not write it"
        raise ValueError(f"read: path must be a torch checkpoint that weights_only loads, got {str(path)!r}: {why}") from error


def _may_be_torchs(path: Path) -> bool:
    """Whether a file begins as a zip archive or, as torch wrote them formerly, a pickle."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def state_in(path: Path, content: Any, key: str | None) -> dict[str, Any]:
    """The state dict in the content of a checkpoint, the object itself; key as in `read`, path for messages."""
    found = dict(_state_dicts(content))
    where = key if key is not None else _likeliest(content, found)
    state = content if where == "" else _at(content, where)
    if key is None and (others := [f"{name!r}" for name in found if name != where]) and where in found and where != "":
        warn(f"read: {path}: read the state dict under {where!r}; there is also {', '.join(others)}: key (--key) chooses")
    under = f" under {where!r}" if where else ""
    top = "; its weights are at the top: leave key (--key) out"
    keys = top if "" in found else f"; key (--key) must be one of {', '.join(map(repr, found))}" if found else ""
    if not isinstance(state, dict) or not state:
        what = "nothing" if state is None else _kind(state)
        raise ValueError(f"read: path must hold a state dict, got {str(path)!r}, which holds {what}{under}{keys}")
    if unnamed := [name for name in state if not isinstance(name, str)]:
        raise ValueError(
            f"read: path must hold a state dict, got {str(path)!r}, whose entry {unnamed[0]!r}{under} has no string for a name"
        )
    if not any(isinstance(t, Tensor) for t in state.values()):
        name = next(iter(state))
        raise ValueError(
            f"read: path must hold a state dict (at the top, or under {', '.join(map(repr, NESTED))}), got {str(path)!r}, "
            f"whose entry {name!r}{under} is {_kind(state[name])}{keys}"
        )
    return state


def _state_dicts(content: Any, where: str = "", depth: int = 4) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dict of names that holds a tensor of 2 or more dims, and the key that leads to it ("" at the top)."""
    if depth == 0 or not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        return
    if any(isinstance(t, Tensor) and t.dim() > 1 for t in content.values()):
        yield where, content
        return
    for name, inner in content.items():
        yield from _state_dicts(inner, f"{where}.{name}".removeprefix("."), depth - 1)


def _likeliest(content: Any, found: dict[str, Any]) -> str:
    """The key of a usual name, else the only one, else the top."""
    usual = sorted((NESTED.index(parts[0]), len(parts), where) for where in found if (parts := where.split("."))[0] in NESTED)
    if usual:
        return usual[0][2]
    if len(found) == 1:
        return next(iter(found))
    named = (name for name in NESTED if isinstance(content, dict) and not found and isinstance(content.get(name), dict))
    return next(named, "")


def _at(content: Any, key: str) -> Any:
    """The value at a key such as "a.b"; a name may have dots of its own. None where there is none."""
    if not isinstance(content, dict):
        return None
    for name in content:
        if key == name:
            return content[name]
        if isinstance(name, str) and key.startswith(f"{name}.") and (inner := _at(content[name], key[len(name) + 1 :])) is not None:
            return inner
    return None


def _kind(x: object) -> str:
    return f"an empty {type(x).__name__}" if x in ({}, [], ()) else f"an object of type {type(x).__name__}"


def _short(error: Exception) -> str:
    """torch says in a page that one may load with weights_only=False, which nobody should do with a file that he only wants to look at."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    if found is None:
        line = str(error).partition("\n")[0]
        return line if isinstance(error, RuntimeError) else f"{type(error).__name__}: {line}".removesuffix(": ")
    reason = found[1].partition(". Please")[0]
    return f"{reason}; save model.state_dict(), not objects" if "global" in reason.lower() else reason


def weights_in(path: str | Path, key: str | None = None) -> list[Weight]:
    """The weights in a file, each with what `cram-kernels check` asks about it: its layer, its axis of input channels, its other names.

    Args:
        path: a file that `read` reads, or an ONNX model.
        key: of a torch checkpoint, where its state dict lies, as in `read`.

    Returns:
        An object an entry of the file, tied names together. It has `name`, `aliases`, `kind` (of layer), `why_dense` (None, or why it
        cannot be N:M) and `tensor`, of shape [K, C, ...] with the input channels on axis 1, in the dtype of the file.

    Raises:
        FileNotFoundError, ValueError: as `read`.
        ImportError: the package that reads this kind of file is not installed.

    Example:
        for weight in weights_in("model.safetensors"):
            print(weight.name, weight.kind, tuple(weight.tensor.shape), weight.tensor.dtype)
    """
    path = Path(path)
    if path.suffix == ".onnx" and path.is_file() and key is None:
        from .onnx_weights import onnx_weights

        return onnx_weights(path)
    return weights_of(read(path, key))
